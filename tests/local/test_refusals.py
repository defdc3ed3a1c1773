"""What attach() and its training step refuse, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from local.decoders import VOCAB, WIDTH, PlainDecoder, batch, build, count_hooks, gradients
from local.rules import attached, rule
from localexit.feedback import make_feedback
from localexit.inference.decoder import Decoder
from localexit.integrations.trainer import LocalCallback
from localexit.local import LocalOutput, StepInBackward, attach, compile_units, save_exits
from localexit.local.graph import _shortened
from localexit.measure import diagnose

MODES = ("deferred", "stream")


@pytest.mark.parametrize("rule_name", ["parallel", "parallel_gold"])
def test_parallel_rules_warn_about_a_scale_invariant_norm(rule_name: str) -> None:
    with pytest.warns(UserWarning, match=rf"feedback '{rule_name}' works along .* exits \[0, 1, 2\]"):
        attach(build("llama"), feedback=rule_name)
    with pytest.warns(UserWarning, match=r"exits \[2\]"):
        attach(build("llama"), feedback=rule_name, exit_norm="none")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"feedback": "exact"}, ValueError, "feedback must be one of"),
        ({"feedback": 3}, TypeError, "feedback must be a Feedback module"),
        ({"feedback": make_feedback("dense", WIDTH + 1, VOCAB)}, ValueError, r"was made for \[V, D\]=\[37, 13\]"),
        ({"exits": [7]}, ValueError, "pass -3..2"),
        ({"exit_norm": "layer"}, ValueError, "exit_norm must be one of shared, copy, none, or a module, got 'layer'"),
        ({"exit_norm": None}, TypeError, "exit_norm must be one of .*got NoneType"),
        ({"exit_norm": nn.Linear(WIDTH, 5)}, ValueError, "exit_norm gives D=5"),
        ({"exit_norm": nn.Linear(WIDTH, 5), "exits": [0, -1]}, ValueError, "exit_norm gives D=5"),
        ({"exit_norm": nn.LayerNorm(WIDTH), "exits": [-1]}, ValueError, "the last is the only exit"),
        ({"backward": "now"}, ValueError, "backward must be one of 'deferred', 'stream', 'joint', 'direct', got 'now'"),
        ({"example": torch.ones(2, 8)}, TypeError, "example must hold token ids as int64 or int32, got torch.float32"),
        ({"example": torch.ones(8).long()}, ValueError, r"example must be token ids .*got shape \[8\]"),
        ({"example": torch.ones(0, 8).long()}, ValueError, r"example must be token ids .*got shape \[0, 8\]"),
        ({"exit_weights": "abc"}, TypeError, "exit_weights must be 3 positive numbers, one per exit, got 'abc'"),
        ({"schedule": {"token_share": 0.5}}, TypeError, "schedule must be a localexit.ExitSchedule, got dict"),
        ({"exit_weights": (1.0, 2.0)}, ValueError, "exit_weights must be 3 positive numbers"),
        ({"exit_weights": (1.0, 0.0, 2.0)}, ValueError, "exit_weights must be 3 positive numbers"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be in"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    model = build("plain").float()
    with pytest.raises(error, match=message):
        attach(model, **{"feedback": "dense", **options})
    assert count_hooks(model) == 0


def test_only_modules_and_only_once() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        attach("llama")
    model = build("plain")
    attached(model)
    with pytest.raises(ValueError, match="attached already"):
        attached(model)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(2, 7), TypeError, r"labels must be a tensor of token ids .* got torch\.float32"),
        ([1, 2], TypeError, "labels must be a tensor of token ids .* got list"),
        (torch.zeros(7, dtype=torch.int64), ValueError, r"labels must be \[batch, tokens\]"),
        (torch.zeros(2, 6, dtype=torch.int64), ValueError, r"labels have shape \[2, 6\] but the hidden"),
        (torch.full((2, 7), VOCAB), ValueError, "outside 0..36"),
    ],
)
def test_bad_labels(labels: object, error: type[Exception], message: str) -> None:
    local = attached(build("plain"))
    with pytest.raises(error, match=message):
        local(batch()[0], labels)
    assert isinstance(local(*batch()), LocalOutput)


@pytest.mark.parametrize(
    ("token_weight", "error", "reason"),
    [
        (torch.ones(2), ValueError, "expected target's shape"),
        (torch.ones(2, 7, dtype=torch.int64), TypeError, "token_weight must have one of the dtypes"),
        ([[1.0] * 7] * 2, TypeError, "token_weight must be a tensor"),
    ],
)
def test_token_weights_are_one_number_a_label(token_weight: object, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        attached(build("plain"))(*batch(), token_weight=token_weight)


def test_loss_scale_is_for_stream_only() -> None:
    with pytest.raises(ValueError, match="loss_scale is for backward='stream'"):
        attached(build("plain"))(*batch(), loss_scale=2.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_transformers_is_refused(mode: str, use_reentrant: bool) -> None:
    model = build("llama")
    attached(model, backward=mode)
    # Its name before transformers 5.20.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    ids, labels = batch()
    with pytest.raises(ValueError, match=r"gradient_checkpointing_disable\(\)"):
        model(ids, labels=labels)


class Checkpointed(PlainDecoder):
    """A decoder that checkpoints its blocks by itself."""

    use_reentrant = True

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = torch.utils.checkpoint.checkpoint(block, hidden, self.decay, use_reentrant=self.use_reentrant)
        return self.head(self.norm(hidden))


@pytest.mark.parametrize(("use_reentrant", "mode"), [(True, "deferred"), (True, "stream"), (False, "stream")])
def test_checkpointing_inside_of_a_model_is_refused(use_reentrant: bool, mode: str) -> None:
    model = Checkpointed(3).double()
    model.use_reentrant = use_reentrant
    with pytest.raises(ValueError, match="a block runs under activation checkpointing"):
        attached(model, backward=mode)(*batch())


def test_a_model_compiled_as_a_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="compiled as a whole"):
        attached(torch.compile(build("plain"), backend="eager"))
    model = build("plain")
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled as a whole"):
        attached(model)


def test_a_routers_loss_that_would_be_left_out_is_refused() -> None:
    model = build("llama")
    attached(model)
    ids, labels = batch()
    with pytest.raises(ValueError, match="output_router_logits"):
        model(ids, labels=labels, output_router_logits=True)


class LayerDrop(PlainDecoder):
    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks[: 2 if self.training else 3]:
            hidden = block(hidden, self.decay)
        return self.head(self.norm(hidden))


def test_a_skipped_last_block_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"without running block 'blocks\.2'.*layer drop"):
        attached(LayerDrop(3).double())(*batch())


def test_an_error_in_the_middle_of_a_step_leaves_the_model_usable() -> None:
    model = build("plain")
    local = attached(model, backward="stream")
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception):
        local(*batch())
    handle.remove()
    model.zero_grad()
    fresh = build("plain")
    attached(fresh, backward="stream")(*batch())
    local(*batch())
    assert all(torch.equal(grad, gradients(fresh)[name]) for name, grad in gradients(model).items())


def test_the_rule_given_is_the_rule_used() -> None:
    given = rule("dense")
    assert attach(build("plain"), feedback=given).feedback is given


def test_logits_of_some_positions_only_are_refused() -> None:
    class LastPosition(PlainDecoder):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens)[:, -1:]

    with pytest.raises(ValueError, match=r"logits would be \[2, 8, .*the model's are \[2, 1, "):
        attach(LastPosition(), feedback="dense")


def test_hooks_of_others_on_the_tail_do_not_see_a_training_step_that_ended() -> None:
    model = build("plain")
    seen: list[int] = []
    model.norm.register_forward_pre_hook(lambda *_: seen.append(1))
    local = attached(model, backward="stream", exit_norm="shared")
    seen.clear()
    local(*batch())
    # Once an exit: after the last one the model's own tail is not run.
    assert len(seen) == local.num_exits


def test_a_long_list_of_names_is_shortened() -> None:
    assert _shortened(["a", "b", "c"]) == "a, b, c"
    assert _shortened(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def _replace_unembedding(model: nn.Module) -> None:
    model.resize_token_embeddings(VOCAB + 3)


def _replace_block(model: nn.Module) -> None:
    model.model.layers[1] = build("llama").model.layers[1]


def _replace_holder(model: nn.Module) -> None:
    model.model = build("llama").model


def _remove_norm(model: nn.Module) -> None:
    model.model.norm = nn.Identity()


def _replace_weight(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


@pytest.mark.parametrize("backward", MODES)
@pytest.mark.parametrize(
    ("replace", "what"),
    [
        (_replace_unembedding, "lm_head is another module"),
        (_replace_block, r"model\.layers\.1 is another module"),
        (_replace_holder, "model is another module"),
        (_remove_norm, r"model\.norm is another module"),
        (_replace_weight, "the unembedding's weight is another parameter"),
    ],
)
def test_parts_that_were_replaced_after_attach_are_refused(
    replace: Callable[[nn.Module], None], what: str, backward: str
) -> None:
    """Else what the model does not use any more would be trained."""
    model = build("llama")
    local = attached(model, backward=backward)
    local(*batch())
    replace(model)
    for use in (lambda: local(*batch()), lambda: local.evaluate(*batch()), lambda: local.exit_logits(0, batch()[0])):
        with pytest.raises(ValueError, match=rf"{what} than at attach\(\).*attach again"):
            use()
    local.remove()
    attach(model)(*batch())


def test_parts_may_be_wrapped_after_attach() -> None:
    """By somebody's profiler, for one: the block runs as before, inside."""
    model = build("llama")
    expected = attached(build("llama"))(*batch()).exit_losses
    local = attached(model)
    model.model.norm = nn.Sequential(model.model.norm)
    for _ in range(2):
        assert torch.equal(local(*batch()).exit_losses, expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: save_exits(model, "folder"),
        compile_units,
        lambda model: StepInBackward(model, torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda model: diagnose(model, batch()[0]),
        lambda model: Decoder(model, [1, 2]),
        LocalCallback,
    ],
)
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_what_takes_an_attached_model_refuses_others(
    use: Callable[[Any], object], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = wrap(build("llama"))
    with pytest.raises(TypeError, match=rf"the LocalModel that attach\(\) returned, got {type(model).__name__}"):
        use(model)


def test_exits_are_named_by_integers() -> None:
    local = attached(build("llama"))
    for exit_index in (0.5, "last", True):
        with pytest.raises(TypeError, match="exit must be an integer, got"):
            local.exit_logits(exit_index, batch()[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "message"),
    [("text", "ids must be an integer, got 't'"), (torch.ones(1, 2).long(), r"ids must be an integer, got \[1, 1\]")],
)
def test_a_text_is_token_ids(ids: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Decoder(attached(build("llama")), ids)


def test_a_text_may_be_a_tensor() -> None:
    assert Decoder(attached(build("llama")), torch.tensor([3, 4])).ids == [3, 4]
