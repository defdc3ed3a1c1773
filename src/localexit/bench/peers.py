"""What a user would take instead: exact heads of other packages, and the heads this project started from.

A package that is not there, or does not run with the versions that are, is "not available" with its reason; it is
never counted as beaten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contenders import Contender
from .inputs import Inputs
from .plans import PEERS, Peer

EAGER: Peer = "F.cross_entropy"
_NEED_CUDA: tuple[Peer, ...] = PEERS[3:]
# From hidden [N, D], weight [V, D] and target [N] to the mean loss.
_Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

ORIGINALS: dict[str, tuple[str, dict[str, Any]]] = {
    "original dense": ("FactorizedExitHead", {"mode": "dense", "rank": 128}),
    "original hybrid": ("FactorizedExitHead", {"mode": "hybrid", "rank": 128}),
    "original parallel": ("ExactParallelExitHead", {"mode": "parallel_only"}),
    "original parallel_gold": ("ExactParallelExitHead", {"mode": "parallel_gold"}),
    "original parallel_topmass": ("ExactParallelExitHead", {"mode": "parallel_topmass"}),
}


def plain_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Plain PyTorch: logits in the products' dtype, the loss in fp32."""
    return F.cross_entropy((hidden @ weight.T).float(), target)


def peer_contenders(peers: Sequence[Peer], device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """Those that can be loaded, and why the others cannot."""
    contenders: list[Contender] = []
    reasons: dict[str, str] = {}
    for name in peers:
        try:
            loss = _load(name, device)
        except Exception as error:
            # A package may break in its own way on import; whatever it is, it is the reason.
            reasons[name] = reason_of(error)
            continue
        contenders.append(
            Contender(
                name=name,
                kind="exact",
                run=partial(run_loss, loss),
                is_exact=name in PEERS[:3],
                is_compiled=name == "torch.compile",
            )
        )
    return contenders, reasons


def reason_of(error: Exception) -> str:
    """One short line about what went wrong."""
    if isinstance(error, ModuleNotFoundError):
        return f"package {error.name} is not installed"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _load(name: Peer, device: torch.device) -> _Loss:
    if name in _NEED_CUDA and device.type != "cuda":
        raise RuntimeError("needs a CUDA device")
    return _LOADERS[name]()


def _compiled() -> _Loss:
    # One graph a shape: what was compiled for others would be reused with symbolic sizes, and slower.
    torch.compiler.reset()
    return torch.compile(plain_loss, dynamic=False)


def _torch_chunked() -> _Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def _cut_cross_entropy() -> _Loss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _cut_cross_entropy_exact() -> _Loss:
    from cut_cross_entropy import linear_cross_entropy

    # Without the filter: every error counts.
    return partial(linear_cross_entropy, filter_eps=None)


def _liger() -> _Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, target: loss(weight, hidden, target)


def _quack() -> _Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


_LOADERS: dict[Peer, Callable[[], _Loss]] = {
    "F.cross_entropy": lambda: plain_loss,
    "torch.compile": _compiled,
    "F.linear_cross_entropy": _torch_chunked,
    "cut-cross-entropy": _cut_cross_entropy,
    "cut-cross-entropy-exact": _cut_cross_entropy_exact,
    "liger": _liger,
    "quack": _quack,
}


def run_loss(loss: _Loss, inputs: Inputs) -> Tensor:
    """Loss and its backward."""
    value = loss(inputs.hidden, inputs.weight, inputs.target)
    value.backward()
    return value.detach()


def original_contenders(path: Path | None, inputs: Inputs) -> list[Contender]:
    """The heads this project started from, when their file, which is not part of it, is given."""
    if path is None:
        return []
    loader = SourceFileLoader("original_heads", str(path))
    module = ModuleType(loader.name)
    loader.exec_module(module)
    vocab_size, hidden_size = inputs.weight.shape
    heads = {
        name: getattr(module, kind)(hidden_size, vocab_size, seed=0, **options).to(inputs.weight.device)
        for name, (kind, options) in ORIGINALS.items()
    }
    return [Contender(name=name, kind="original", run=partial(_original, head)) for name, head in heads.items()]


def _original(head: torch.nn.Module, inputs: Inputs) -> Tensor:
    logits = head(inputs.hidden[None], inputs.weight, inputs.target[None])
    loss = F.cross_entropy(logits[0].float(), inputs.target)
    loss.backward()
    return loss.detach()
