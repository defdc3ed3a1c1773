"""The drop-in heads give the original's numbers from the original's state dicts, where the original was right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from helpers.budget import assert_close
from localexit import ExactParallelExitHead, FactorizedExitHead

FOLDER = Path(__file__).parents[1] / "data" / "golden"
HEADS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "dense": (FactorizedExitHead, {"mode": "dense", "rank": 24}),
    "hybrid": (FactorizedExitHead, {"mode": "hybrid", "rank": 64, "rank_exact": 16, "topk": 4}),
    "parallel_gold": (
        ExactParallelExitHead,
        {"mode": "parallel_gold", "residual_rank": 16, "residual_lambda": 0.3},
    ),
    "parallel_only": (ExactParallelExitHead, {"mode": "parallel_only"}),
}
FILES = ("dense_mean", "dense_sum", "hybrid_mean", "hybrid_sum", "parallel_gold_sum", "parallel_only_sum")


@dataclass(frozen=True)
class Golden:
    """One file: a head with its state, inputs, and what came out."""

    head: nn.Module
    reduction: str
    tensors: dict[str, Tensor]


def load(file: str) -> Golden:
    with safe_open(FOLDER / f"{file}.safetensors", "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        reduction = opened.metadata()["reduction"]
    vocab_size, d_model = tensors["weight"].shape
    kind, options = HEADS[file.removesuffix(f"_{reduction}")]
    head = kind(d_model, vocab_size, seed=0, **options)
    state = {key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")}
    head.load_state_dict(state, strict=True)
    return Golden(head=head, reduction=reduction, tensors=tensors)


@pytest.mark.parametrize("file", FILES)
def test_golden(file: str) -> None:
    golden = load(file)
    tensors = golden.tensors
    hidden, weight = tensors["h"].requires_grad_(), tensors["weight"].requires_grad_()
    logits = golden.head(hidden, weight, tensors["target"])
    loss = F.cross_entropy(logits.flatten(0, 1), tensors["target"].flatten(), reduction=golden.reduction)
    loss.backward()
    results = {"logits": logits, "loss": loss.reshape(1), "grad_h": hidden.grad, "grad_weight": weight.grad}
    for key, tensor in results.items():
        assert tensor is not None
        assert_close(tensor.detach(), tensors[key], tolerance=1e-5)


@pytest.mark.parametrize("file", FILES)
def test_a_state_dict_survives_a_round_trip(file: str) -> None:
    head = load(file).head
    names = {key for key in load(file).tensors if key.startswith("state.")}
    assert {f"state.{key}" for key in head.state_dict()} == names


def test_all_golden_files_are_used() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(FILES)
