"""Units stepped in the backward end up where the ordinary optimiser brings them; one unit's gradients at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from local.decoders import DECODERS, batch, build
from local.rules import attached
from localexit.local import ExitSchedule, LocalModel, StepInBackward

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.2),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.03, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
}


def trained(local: LocalModel, optimizer: str, *, max_norm: float, is_in_backward: bool) -> tuple[Tensor, Tensor]:
    """Five steps; losses [5, L] and norms [5, L + 1] on the way."""
    made = OPTIMIZERS[optimizer](local.parameters())
    stepper = StepInBackward(local, made, max_norm=max_norm) if is_in_backward else None
    losses, norms = [], []
    for seed in range(5):
        losses.append(local(*batch(seed)).exit_losses)
        if stepper is not None:
            norms.append(stepper.step())
        else:
            norms.append(local.clip_grad_norm_(max_norm))
            made.step()
            made.zero_grad()
        local.update()
    return torch.stack(losses), torch.stack(norms)


def compare(make: Callable[[], LocalModel], optimizer: str = "adamw", max_norm: float = 0.05) -> None:
    whole, stepped = make(), make()
    expected = trained(whole, optimizer, max_norm=max_norm, is_in_backward=False)
    got = trained(stepped, optimizer, max_norm=max_norm, is_in_backward=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
    for (name, parameter), reference in zip(stepped.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter, reference, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert parameter.grad is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [0.05, float("inf")])
def test_three_units_equal_the_ordinary_optimiser(optimizer: str, max_norm: float) -> None:
    compare(lambda: attached(build("plain"), "mirror_sampled", backward="stream"), optimizer, max_norm)


@pytest.mark.parametrize("name", DECODERS)
def test_tied_embeddings_are_stepped_once(name: str) -> None:
    compare(lambda: attached(build(name, is_tied=True), backward="stream"))


@pytest.mark.parametrize(
    "options",
    [
        {"exit_norm": "copy"},
        {"exits": "every:2"},
        {"schedule": ExitSchedule(exits_per_step=1)},
        {"schedule": ExitSchedule(token_share=0.5)},
    ],
)
def test_other_exits(options: dict[str, Any]) -> None:
    compare(lambda: attached(build("plain"), backward="stream", **options))


def test_parameters_that_blocks_of_two_units_share_are_stepped_once() -> None:
    def make() -> LocalModel:
        model = build("plain")
        model.blocks[2].mix = model.blocks[0].mix
        return attached(model, backward="stream")

    compare(make)


def test_frozen_units_stay() -> None:
    def make() -> LocalModel:
        model = build("plain")
        model.blocks[1].requires_grad_(False)
        return attached(model, backward="stream")

    before = [parameter.clone() for parameter in build("plain").blocks[1].parameters()]
    compare(make)
    local = make()
    trained(local, "adamw", max_norm=1.0, is_in_backward=True)
    assert all(torch.equal(p, q) for p, q in zip(local.model.blocks[1].parameters(), before, strict=True))


def test_the_gradients_of_one_unit_live_at_a_time() -> None:
    model = build("plain", 5)
    local = attached(model, backward="stream")
    stepper = StepInBackward(local, torch.optim.SGD(local.parameters(), lr=0.1))
    alive: list[list[int]] = []

    def record(_module: nn.Module, _args: object) -> None:
        alive.append([unit.index for unit in local.units if any(p.grad is not None for p in unit.parameters())])

    for block in model.blocks:
        block.register_forward_pre_hook(record)
    local(*batch())
    record(model, ())
    assert alive == [[]] * 6
    assert all(parameter.grad is not None for parameter in local.shared_parameters())
    stepper.step()
    assert all(parameter.grad is None for parameter in local.parameters())


def test_accumulation_is_refused() -> None:
    local = attached(build("plain"), backward="stream")
    stepper = StepInBackward(local, torch.optim.SGD(local.parameters(), lr=0.1))
    local(*batch())
    with pytest.raises(RuntimeError, match=r"a second forward before step\(\).*cannot be accumulated"):
        local(*batch())
    stepper.step()
    local(*batch())


@pytest.mark.parametrize("backward", ["deferred", "joint", "direct"])
def test_other_ways_to_make_gradients_are_refused(backward: str) -> None:
    local = attached(build("plain"), backward=backward)
    with pytest.raises(ValueError, match=f"attached with backward='stream', got '{backward}'"):
        StepInBackward(local, torch.optim.SGD(local.parameters(), lr=0.1))


def test_loss_scaling_is_refused() -> None:
    local = attached(build("plain"), backward="stream")
    StepInBackward(local, torch.optim.SGD(local.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="loss_scale with steps in the backward"):
        local(*batch(), loss_scale=8.0)


@pytest.mark.parametrize("kept", [0, 5])
def test_an_optimiser_that_lacks_parameters_is_refused(kept: int) -> None:
    """It would train some of the model or nothing, and leave gradients behind."""
    local = attached(build("plain"), backward="stream")
    some = [*local.parameters()][:kept] or [nn.Parameter(torch.zeros(2))]
    num_missing = len([*local.parameters()]) - kept
    with pytest.raises(ValueError, match=rf"but {num_missing} are not in it, the first is model\..*local.parameters"):
        StepInBackward(local, torch.optim.SGD(some, lr=0.1))
    local(*batch())
    assert local.in_backward is None


def test_an_optimiser_may_lack_what_is_frozen() -> None:
    local = attached(build("plain"), backward="stream")
    block = local.model.blocks[1].requires_grad_(False)
    trained = [parameter for parameter in local.parameters() if parameter.requires_grad]
    before = [parameter.clone() for parameter in trained]
    stepper = StepInBackward(local, torch.optim.SGD(trained, lr=0.1))
    local(*batch())
    stepper.step()
    assert len(trained) == len([*local.parameters()]) - len([*block.parameters()])
    assert not any(torch.equal(p, q) for p, q in zip(trained, before, strict=True))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), "1"])
def test_a_limit_of_norms_that_is_not_positive_is_refused(max_norm: Any) -> None:
    """torch takes a negative one and turns the gradients round."""
    local = attached(build("plain"), backward="stream")
    local(*batch())
    with pytest.raises((ValueError, TypeError), match="max_norm must be a positive number"):
        local.clip_grad_norm_(max_norm)
    with pytest.raises((ValueError, TypeError), match="max_norm must be a positive number"):
        StepInBackward(local, torch.optim.SGD(local.parameters(), lr=0.1), max_norm=max_norm)
