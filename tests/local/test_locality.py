"""No unit hears anything from another: losses, feedback and gradients, at fixed parameters and state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from local.decoders import DECODERS, WIDTH, Block, PlainDecoder, batch, build
from local.rules import RULES, attached
from localexit.local.graph import UnitGraph
from localexit.local.steps import DeferredStep

MODES = ("deferred", "stream")
LISTS = {"plain": "blocks", "llama": "model.layers", "gpt2": "transformer.h"}
NORMS = {"plain": "norm", "llama": "model.norm", "gpt2": "transformer.ln_f"}


def truncate(name: str, model: nn.Module, num_blocks: int) -> None:
    """Cut a decoder off after some of its blocks."""
    parent, _, attribute = LISTS[name].rpartition(".")
    setattr(model.get_submodule(parent), attribute, model.get_submodule(LISTS[name])[:num_blocks])
    if hasattr(model, "config"):
        model.config.num_hidden_layers = num_blocks


@dataclass
class Observed:
    """One step: losses, the feedback of every exit, and the gradients of every unit's own parameters by name."""

    losses: Tensor
    feedback: list[Tensor]
    gradients: list[dict[str, Tensor]]


def observe(name: str, model: nn.Module, rule_name: str = "transport", **options: object) -> Observed:
    local = attached(model, rule_name, **options)
    normed: list[Tensor] = []
    feedback: dict[int, Tensor] = {}

    def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
        index = len(normed)
        normed.append(output)
        output.register_hook(lambda grad: feedback.__setitem__(index, grad.clone()))

    handle = model.get_submodule(NORMS[name]).register_forward_hook(watch)
    out = local(*batch())
    if local.backward_mode == "deferred":
        out.loss.backward()
    handle.remove()
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    gradients = [{names[id(p)]: p.grad.clone() for p in unit.parameters()} for unit in local.units]
    return Observed(losses=out.exit_losses, feedback=[feedback[i] for i in range(local.num_exits)], gradients=gradients)


def assert_no_notice_of_later_units(name: str, rule_name: str, mode: str, *, is_tied: bool = False) -> None:
    whole = observe(name, build(name, is_tied=is_tied), rule_name, backward=mode)
    assert all(tensor.any() for tensor in whole.feedback)
    for num_blocks in (1, 2):
        model = build(name, is_tied=is_tied)
        truncate(name, model, num_blocks)
        cut = observe(name, model, rule_name, backward=mode)
        assert torch.equal(cut.losses, whole.losses[:num_blocks])
        for unit in range(num_blocks):
            assert torch.equal(cut.feedback[unit], whole.feedback[unit])
            assert cut.gradients[unit].keys() == whole.gradients[unit].keys()
            for key, grad in cut.gradients[unit].items():
                assert torch.equal(grad, whole.gradients[unit][key]), key


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule_name", RULES)
def test_earlier_units_do_not_notice_later_ones(rule_name: str, mode: str) -> None:
    assert_no_notice_of_later_units("plain", rule_name, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rule_name", ["transport", "anchors"])
def test_earlier_units_do_not_notice_later_ones_in(name: str, is_tied: bool, rule_name: str, mode: str) -> None:
    assert_no_notice_of_later_units(name, rule_name, mode, is_tied=is_tied)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("exits", ["every", "every:2"])
def test_the_gradient_of_another_units_loss_is_zero(
    name: str, is_tied: bool, exits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeferredStep, "output", lambda step: step)
    local = attached(build(name, 4, is_tied=is_tied), exits=exits)
    losses = local(*batch()).losses
    for i, unit in enumerate(local.units):
        for j, loss in losses.items():
            grads = torch.autograd.grad(loss, unit.parameters(), retain_graph=True, allow_unused=True)
            assert all((grad is not None and grad.any()) if i == j else grad is None for grad in grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DECODERS)
def test_the_weight_of_one_exit_changes_only_its_unit_and_what_is_shared(name: str, mode: str) -> None:
    """From the outside, without looking at graphs: the loss of unit 1 counts twice, units 0 and 2 stay bitwise."""
    once = observe(name, build(name), backward=mode)
    twice = observe(name, build(name), backward=mode, exit_weights=(1.0, 2.0, 1.0))
    for unit in range(3):
        is_same = [torch.equal(grad, twice.gradients[unit][key]) for key, grad in once.gradients[unit].items()]
        assert all(is_same) if unit != 1 else not any(is_same)


def test_this_file_notices_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the detach of what was made before block 1, the first unit does hear the others."""
    monkeypatch.setattr(UnitGraph, "enter", lambda _graph, value: value)
    monkeypatch.setattr(UnitGraph, "check", lambda *_: [])
    with pytest.raises(AssertionError):
        assert_no_notice_of_later_units("plain", "transport", "deferred")


def test_a_leak_is_an_error_in_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnitGraph, "enter", lambda _graph, value: value)
    with pytest.raises(ValueError, match=r"blocks\.1 depends on parameters of another unit \(decay\)"):
        attached(build("plain"))(*batch())


class SideChannel(PlainDecoder):
    """Its last block reads what its first one left on the model: no hook sees that."""

    class Reader(Block):
        def __init__(self, width: int, notes: dict[str, Tensor]) -> None:
            super().__init__(width)
            self.notes = notes

        def forward(self, hidden: Tensor, decay: Tensor) -> Tensor:
            return super().forward(hidden + self.notes["embedded"], decay)

    def __init__(self) -> None:
        super().__init__(3)
        self.notes: dict[str, Tensor] = {}
        self.blocks[2] = self.Reader(WIDTH, self.notes)
        self.embed.register_forward_hook(lambda _m, _a, output: self.notes.__setitem__("embedded", output))


def test_a_way_around_the_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.2 depends on parameters of another unit \(embed\.weight\)"):
        attached(SideChannel().double())(*batch())


class WithoutGradient(Block):
    def forward(self, hidden: Tensor, decay: Tensor) -> Tensor:
        return super().forward(hidden, decay).detach()


def test_a_unit_that_would_not_train_is_refused() -> None:
    model = PlainDecoder(3).double()
    model.blocks[1] = WithoutGradient(WIDTH).double()
    with pytest.raises(ValueError, match=r"would not train blocks\.1"):
        attached(model)(*batch())


class Idle(Block):
    """Has parameters and does not use them."""

    def forward(self, hidden: Tensor, decay: Tensor) -> Tensor:
        return 1.0 * hidden


def test_a_block_of_a_unit_that_would_not_train_is_refused_too() -> None:
    model = PlainDecoder(4).double()
    model.blocks[3] = Idle(WIDTH).double()
    with pytest.raises(ValueError, match=r"the exit after blocks\.3 would not train blocks\.3"):
        attached(model, exits="every:2")(*batch())


class ValueEmbeddings(PlainDecoder):
    """Hands every block a slice of one embedding, made anew for each: a different tensor every time."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__(num_blocks)
        self.values = nn.Embedding(40, num_blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        values = self.values(tokens).mean((0, 1))
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, values[index])
        return self.head(self.norm(hidden))


@pytest.mark.parametrize("mode", MODES)
def test_slices_made_before_the_first_block_are_detached_inside_later_units_too(mode: str) -> None:
    """Units of two blocks: the second block's slice must go, the hidden from the first block must stay."""
    torch.manual_seed(0)
    model = ValueEmbeddings().double()
    local = attached(model, exits="every:2", backward=mode)
    with pytest.warns(UserWarning, match=r"values\.weight reach blocks\.2 .* nothing trains it by this way"):
        out = local(*batch())
    if mode == "deferred":
        out.loss.backward()
    reached = model.values.weight.grad.any(0)
    assert reached.tolist() == [True, True, False, False]
    assert all(parameter.grad.any() for parameter in model.blocks.parameters())


class MixedBetweenBlocks(PlainDecoder):
    """Adds the embedding to the hidden between the blocks of one unit."""

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden + embedded, self.decay.detach())
        return self.head(self.norm(hidden))


def test_a_tensor_that_mixes_two_units_is_refused() -> None:
    model = MixedBetweenBlocks(4).double()
    with pytest.raises(ValueError, match=r"depends both on its own unit and on embed\.weight"):
        attached(model, exits="every:2")(*batch())


class LateValues(PlainDecoder):
    """One block gets something learned that no earlier block uses."""

    def __init__(self) -> None:
        super().__init__(3)
        self.late = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, self.late if index == 2 else self.decay)
        return self.head(self.norm(hidden))


def test_parameters_that_only_later_units_use_are_reported() -> None:
    with pytest.warns(UserWarning, match=r"late reach blocks\.2 or a later block of its unit"):
        attached(LateValues().double())(*batch())


class LateInput(PlainDecoder):
    """One block gets something that the caller learns, and no earlier block uses."""

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        hidden = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, prompt if index == 2 and prompt is not None else self.decay)
        return self.head(self.norm(hidden))


def test_an_input_with_a_gradient_is_no_parameter_of_the_model() -> None:
    """It is detached like all that comes to a later unit, and nobody is told of a parameter."""
    ids, labels = batch()
    prompt = torch.zeros((), dtype=torch.float64, requires_grad=True)
    local = attached(LateInput().double(), backward="stream")
    local(ids, labels, prompt=prompt)
    assert prompt.grad is None


def test_units_are_checked_in_their_first_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def watched(graph: UnitGraph, hidden: Tensor, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        checked.append([name for name, _ in blocks])
        check(graph, hidden, blocks)

    check = UnitGraph.check
    monkeypatch.setattr(UnitGraph, "check", watched)
    local = attached(build("plain"))
    for _ in range(2):
        local(*batch())
    assert checked == [["blocks.0"], ["blocks.1"], ["blocks.2"]]
