"""The choice of a backend looks at its arguments only, and a named backend never falls back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from localexit import exit_cross_entropy, exit_step, make_feedback
from localexit.exits import backends, functional
from localexit.exits.backends import choose_backend, triton_refusal
from localexit.exits.loss import LossOptions

CUDA = torch.device("cuda")


def arguments(name: str = "dense", **changes: Any) -> dict[str, Any]:
    defaults = {
        "device": CUDA,
        "compute_dtype": torch.bfloat16,
        "rule": make_feedback(name, 8, 32),
        "options": LossOptions(),
    }
    return defaults | changes


def test_auto_takes_the_kernels_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    assert choose_backend("auto", **arguments(options=LossOptions(softcap=30.0))) == "triton"
    assert choose_backend("auto", **arguments(options=LossOptions(label_smoothing=0.1))) == "triton"
    assert choose_backend("auto", **arguments(compute_dtype=torch.float32)) == "triton"
    assert choose_backend("auto", **arguments()) == "triton"
    assert choose_backend("triton", **arguments("mirror_sampled")) == "triton"
    assert choose_backend("torch", **arguments()) == "torch"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "CUDA device"),
        ({"compute_dtype": torch.float16}, "float16"),
        ({"compute_dtype": torch.float64}, "float64"),
        ({"name": "parallel"}, "raw logits"),
        ({"options": LossOptions(label_smoothing=0.1, softcap=5.0)}, "label_smoothing"),
        ({"name": "transport_sampled", "options": LossOptions(label_smoothing=0.1)}, "label_smoothing"),
        ({"name": "hybrid", "options": LossOptions(label_smoothing=0.1)}, "selects tokens"),
        ({"options": LossOptions(softcap=50.0)}, "softcap=50.0"),
    ],
)
def test_a_refusal_has_a_reason_and_auto_goes_on(changes: dict[str, Any], reason: str) -> None:
    call = arguments(**changes)
    refusal = triton_refusal(**call)
    assert refusal is not None
    assert reason in refusal
    assert choose_backend("auto", **call) == "torch"
    with pytest.raises(ValueError, match=r"backend='triton'.*pass backend='auto'"):
        choose_backend("triton", **call)


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert choose_backend("auto", **arguments()) == "torch"
    with pytest.raises(ValueError, match=r"install localexit\[gpu\]; pass backend='auto' or 'torch'"):
        choose_backend("triton", **arguments())


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_is_asked_for_is_what_the_choice_gets(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU as here: only shards have no kernels."""
    asked = []

    def watched(asked_for: Any, **options: Any) -> str:
        asked.append(asked_for)
        return choose_backend(asked_for, **options)

    monkeypatch.setattr(functional, "choose_backend", watched)
    exit_step(
        torch.randn(3, 8), torch.randn(32, 8), torch.tensor([1, 2, 3]), feedback=make_feedback("dense", 8, 32),
        backend=backend,
    )  # fmt: skip
    assert asked == [backend]


def test_the_stats_name_the_backend() -> None:
    rule = make_feedback("dense", 8, 32)
    _, stats = exit_cross_entropy(
        torch.randn(3, 8), torch.randn(32, 8), torch.tensor([1, 2, 3]), feedback=rule, return_stats=True
    )
    assert stats.backend == "torch"
