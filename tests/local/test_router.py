"""The auxiliary loss of routers belongs to their own unit, and is the model's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from helpers.ranks import run_ranks
from local.decoders import build, gradients
from local.families import differing, skip_if_broken, tiny_model, token_ids
from localexit import DataParallel
from localexit.local import attach
from localexit.local.router import RouterPlace, _place, load_balancing_loss
from localexit.local.trace import Call, Trace

MODES = ("stream", "deferred")
COEFFICIENT = 0.25
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "jetmoe", "granitemoe", "phimoe")


def mixture(name: str, **changes: Any) -> Any:
    """A mixture of experts whose auxiliary loss is large enough to be seen in every gradient."""
    field = "aux_loss_coef" if name == "jetmoe" else "router_aux_loss_coef"
    return tiny_model(name, output_router_logits=True, **{field: COEFFICIENT}, **changes)


def train(local: nn.Module, mode: str, *args: Any, **kwargs: Any) -> Any:
    out = local(*args, **kwargs)
    if mode == "deferred":
        out.loss.backward()
    return out


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("with_mask", [False, True])
def test_the_loss_is_that_of_transformers(top_k: int, with_mask: bool) -> None:
    logits = tuple(torch.randn(12, 5) for _ in range(3))
    mask = (torch.arange(12).reshape(2, 6) % 5 > 0).long() if with_mask else None
    expected = load_balancing_loss_func(logits, 5, top_k, mask)
    torch.testing.assert_close(load_balancing_loss(logits, top_k, mask), expected)


def test_one_expert_a_token_is_found_too() -> None:
    routers = attach(mixture("mixtral", num_experts_per_tok=1), feedback="transport").anatomy.routers
    assert routers is not None
    assert routers.top_k == 1


def test_a_router_may_be_a_module_that_returns_its_logits_alone() -> None:
    router, logits = nn.Linear(2, 3), torch.zeros(4, 3)
    trace = Trace(calls=(Call(module=router, output=logits, start=0),), output=None, logits=logits)
    assert _place(trace, logits) == RouterPlace(module=router, index=None)


def test_a_loss_scale_multiplies_the_routers_gradients_too() -> None:
    ids, gradients_of = token_ids(), []
    for scale in (None, 8.0):
        model = mixture("mixtral")
        train(attach(model, feedback="transport", backward="stream", seed=0), "stream", ids, ids, loss_scale=scale)
        gradients_of.append(gradients(model))
    plain, scaled = gradients_of
    for name, grad in plain.items():
        torch.testing.assert_close(scaled[name], 8 * grad)


def test_shares_are_taken_in_fp32_of_logits_in_bf16() -> None:
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = load_balancing_loss([logits], 2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, load_balancing_loss([logits.float()], 2), rtol=1e-6, atol=0)


def test_an_even_load_costs_as_much_as_there_are_experts_a_token() -> None:
    # Every expert is picked twice, with probabilities as good as equal.
    logits = 1e-4 * torch.eye(4)
    torch.testing.assert_close(load_balancing_loss([logits + logits.roll(1, 1)], 2), torch.tensor(2.0))


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_top_k_and_coefficient_are_found(name: str) -> None:
    skip_if_broken(name)
    model = mixture(name)
    # Between 5.0 and 5.23 some releases forget what the configuration asks for: there is nothing to find then.
    if Version(transformers.__version__) < Version("5.23") and not model(token_ids()).router_logits:
        pytest.skip(f"{name} records no router logits in transformers {transformers.__version__}")
    routers = attach(model, feedback="transport").anatomy.routers
    assert routers is not None
    assert routers.coefficient == COEFFICIENT
    assert routers.top_k == model.config.num_experts_per_tok
    # JetMoe routes its attention too, and transformers before 5.24 counts those routers twice.
    is_counted_twice = Version(transformers.__version__) < Version("5.24")
    assert len(routers.places) == ((6 if is_counted_twice else 4) if name == "jetmoe" else 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_mask", [False, True])
def test_every_unit_learns_from_its_own_routers(mode: str, with_mask: bool) -> None:
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    inputs = {"attention_mask": mask} if with_mask else {}
    model = mixture("mixtral")
    reference = copy.deepcopy(model)
    expected = explicit_router_losses(reference, ids, mask if with_mask else None)
    out = train(attach(model, feedback="transport", backward=mode, exit_weights=(0.5, 2.0)), mode, ids, ids, **inputs)
    torch.testing.assert_close(out.router_losses, torch.stack(expected))
    torch.testing.assert_close(out.loss, (out.exit_losses + out.router_losses) @ torch.tensor([0.5, 2.0]))
    assert differing(gradients(model), gradients(reference)) == []


def explicit_router_losses(model: Any, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Both blocks of a Mixtral one after the other, each with its cross-entropy and its own balance loss."""
    body, router_losses = model.model, []
    calls: list[Any] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for layer in body.layers
    ]
    body(ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    for index, (layer, weight) in enumerate(zip(body.layers, (0.5, 2.0), strict=True)):
        (hidden, *rest), kwargs = calls[index]
        logits: list[Tensor] = []
        handle = layer.mlp.gate.register_forward_hook(lambda _m, _a, output, kept=logits: kept.append(output[0]))
        hidden = layer(hidden if index == 0 else hidden.detach(), *rest, **kwargs)
        handle.remove()
        loss = nn.functional.cross_entropy(model.lm_head(body.norm(hidden))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        router_loss = COEFFICIENT * load_balancing_loss_func(tuple(logits), 4, 2, mask)
        (weight * (loss + router_loss)).backward()
        router_losses.append(router_loss.detach())
    return router_losses


@pytest.mark.parametrize("mode", MODES)
def test_one_unit_over_all_blocks_has_the_models_own_loss(mode: str) -> None:
    ids = token_ids()
    model = mixture("qwen3_moe")
    reference = copy.deepcopy(model)
    expected = reference(ids, labels=ids).loss
    expected.backward()
    out = train(attach(model, feedback="transport", exits=[-1], backward=mode), mode, ids, ids)
    torch.testing.assert_close(out.loss.detach(), expected.detach())
    assert differing(gradients(model), gradients(reference)) == []


def test_micro_batches_count_by_their_share_of_the_labels() -> None:
    ids = token_ids()
    local = attach(mixture("mixtral"), feedback="transport")
    whole = local(ids[:1], ids[:1]).router_losses
    torch.testing.assert_close(local(ids[:1], ids[:1], num_items=60).router_losses, whole / 4)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_may_leave_it_out(mode: str) -> None:
    ids = token_ids()
    without = tiny_model("mixtral")
    train(attach(without, feedback="transport", backward=mode), mode, ids, ids)
    model = mixture("mixtral")
    out = train(attach(model, feedback="transport", backward=mode), mode, ids, ids, output_router_logits=False)
    assert out.router_losses is None
    assert differing(gradients(model), gradients(without)) == []


@pytest.mark.parametrize("asked", [{}, {"output_router_logits": True}])
def test_the_model_itself_keeps_no_router_logits_in_training(asked: dict[str, bool]) -> None:
    """Those of all blocks, with their graphs, would keep every unit's activations."""
    model = mixture("mixtral")
    seen = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["output_router_logits"]), with_kwargs=True
    )
    local, ids = attach(model, feedback="transport", backward="stream"), token_ids()
    seen.clear()
    local(ids, ids, **asked)
    assert seen == [False]


def test_routers_learn_from_their_loss_by_direct_feedback_too() -> None:
    ids = token_ids()
    models = [mixture("mixtral") for _ in range(2)]
    for model, options in zip(models, ({}, {"output_router_logits": False}), strict=True):
        train(attach(model, feedback="transport", backward="direct"), "direct", ids, ids, **options)
    with_loss, without = (gradients(model) for model in models)
    routers = [name for name in with_loss if name.endswith("gate.weight")]
    assert len(routers) == 2
    assert not any(torch.allclose(with_loss[name], without[name]) for name in routers)


def test_routers_whose_loss_has_no_factor_have_none() -> None:
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.0)
    assert attach(model, feedback="transport").anatomy.routers is None


def test_a_model_that_returns_no_router_logits_although_it_is_told_to_is_named() -> None:
    model = mixture("mixtral")

    class Silent(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **{**kwargs, "output_router_logits": False})

    model.__class__ = Silent
    with pytest.warns(UserWarning, match="output_router_logits is set, and the model returned no router logits"):
        local = attach(model, feedback="transport")
    assert local.anatomy.routers is None


def test_asking_for_it_when_no_routers_were_found_is_refused() -> None:
    ids = token_ids()
    model = build("llama")
    attach(model)
    with pytest.raises(ValueError, match=r"attach\(\) found no routers; set config.output_router_logits=True before"):
        model(ids % 37, labels=ids % 37, output_router_logits=True)


def test_a_loss_that_is_not_load_balancing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda logits, *_: sum(x.sum() for x in logits))
    with pytest.raises(ValueError, match="is not the load-balancing loss of its router logits"):
        attach(mixture("mixtral"), feedback="transport")


def test_a_loss_without_any_of_it_has_no_routers() -> None:
    """Whatever factor the configuration names."""
    model = mixture("mixtral")

    class Without(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            if out.loss is not None and out.aux_loss is not None:
                out.loss = out.loss - COEFFICIENT * out.aux_loss
            return out

    model.__class__ = Without
    assert attach(model, feedback="transport").anatomy.routers is None


def test_a_factor_without_a_name_is_refused() -> None:
    model = mixture("mixtral")
    model.router_aux_loss_coef = COEFFICIENT * 3
    model.config.router_aux_loss_coef = COEFFICIENT

    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            if out.loss is not None and out.aux_loss is not None:
                out.loss = out.loss + out.aux_loss
            return out

    model.__class__ = Doubled
    with pytest.raises(ValueError, match=r"contains 1\.75 times its auxiliary loss, and none of router_aux_loss_coef"):
        attach(model, feedback="transport")


def router_losses_on_a_rank() -> Tensor:
    local = attach(mixture("mixtral"), feedback="transport", backward="stream", data_parallel=DataParallel())
    return local(token_ids(), token_ids()).router_losses


def test_the_mean_over_ranks_is_the_loss_of_a_rank() -> None:
    """Both ranks have the same tokens, so half of the labels each: what either would compute alone."""
    alone = attach(mixture("mixtral"), feedback="transport", backward="stream")(token_ids(), token_ids())
    for losses in run_ranks(router_losses_on_a_rank, 2):
        torch.testing.assert_close(losses, alone.router_losses)
