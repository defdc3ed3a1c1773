"""Where the blocks, the tail and the unembedding of a model are: found in one traced forward, verified by numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from localexit.local.router import Routers, discover_routers
from localexit.local.sharding import is_sharded, replicating, shard_of, whole
from localexit.local.trace import Call, Trace, random_ids, trace_forward, undisturbed
from localexit.local.trees import first_tensor

# Where configurations keep a factor of the logits, a divisor of them, and their soft cap.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Largest difference allowed between our logits and the model's, as a share of the largest logit.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What `logits = softcap(scale * (tail(hidden) @ W.T + b))` is made of.

    Attributes:
        blocks: the blocks in the order they run; `hidden` [B, T, D'] is what the last one returns.
        blocks_name: qualified name of the module that lists them.
        tail: the modules between the last block and the unembedding, in order; often one norm.
        unembedding: the module with `weight` [V, D] and `bias` [V] or None.
        scale: constant factor of the logits.
        softcap: c of `c * tanh(logits / c)`, or None.
        routers: whose auxiliary loss the model's loss contains, or None.
        example_hidden: `hidden` of the traced forward.
    """

    blocks: tuple[nn.Module, ...]
    blocks_name: str
    tail: tuple[nn.Module, ...]
    unembedding: nn.Linear
    scale: float
    softcap: float | None
    routers: Routers | None
    example_hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    name: str
    blocks: tuple[nn.Module, ...]
    last: Call


def discover(model: nn.Module, example: Tensor | Mapping[str, Any] | None = None, *, seed: int = 0) -> Anatomy:
    """Find blocks, tail and unembedding of a model, and verify that they reproduce its logits.

    Args:
        model: a decoder language model: `forward(input_ids) -> logits [B, T, V]`, or an object with `.logits`.
        example: token ids [B, T], or the keyword inputs of one forward; None draws random ids.
        seed: seed of the random ids.

    Raises:
        ValueError: no list of blocks, no unembedding, or the logits differ; the message says which.
        TypeError: the model does not return logits.
    """
    example = random_ids(model, seed=seed) if example is None else example
    trace = trace_forward(model, example)
    unembedding = _unembedding(model, trace)
    reasons: list[str] = []
    for candidate in _candidates(model, trace, trace.first_call(unembedding)):
        tail = _tail(trace, candidate.last, trace.first_call(unembedding))
        hidden = first_tensor(candidate.last.output, what=f"the last block of {candidate.name}")
        with undisturbed(model):
            fit = _verified(model, tail, unembedding, hidden, trace.logits)
        if isinstance(fit, tuple):
            return Anatomy(
                blocks=candidate.blocks,
                blocks_name=candidate.name,
                tail=tail,
                unembedding=unembedding,
                scale=fit[0],
                softcap=fit[1],
                routers=discover_routers(model, trace, example),
                example_hidden=hidden,
            )
        names = ", ".join(type(module).__name__ for module in tail) or "nothing"
        reasons.append(f"{candidate.name} ({len(candidate.blocks)} blocks, then {names}): {fit}")
    raise ValueError(_not_found(reasons))


def apply_tail(tail: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """`hidden` [..., D'] through the modules of a tail, one after the other: [..., D]."""
    for module in tail:
        hidden = first_tensor(module(hidden), what=type(module).__name__)
    return hidden


def scaled_linear(unembedding: nn.Linear, normed: Tensor, scale: float) -> Tensor:
    """`scale * (normed @ W.T + b)` with the factor on the D columns of `normed` instead of the V of the logits."""
    bias = unembedding.bias
    if scale == 1.0:
        return whole_linear(normed, unembedding.weight, bias)
    return whole_linear(normed * scale, unembedding.weight, None if bias is None else bias * scale)


def whole_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`nn.functional.linear`, its result whole on every rank also where the weight is spread over ranks."""
    with replicating():
        return whole(nn.functional.linear(hidden, weight, bias))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)`, or the logits themselves."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _unembedding(model: nn.Module, trace: Trace) -> nn.Linear:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    module = get_output_embeddings() if callable(get_output_embeddings) else None
    if module is None:
        module = next(_linears_to(trace, trace.logits.shape[-1]), None)
    _refuse_part(model, trace.logits)
    if not _is_unembedding(module) or trace.num_calls[id(module)] != 1:
        found = "none" if module is None else type(module).__name__
        raise ValueError(
            f"model has no unembedding that ran once in its forward: expected an nn.Linear with "
            f"{trace.logits.shape[-1]} outputs (for tied embeddings: one whose weight is the embedding's), "
            f"got {found}; make the unembedding such a module"
        )
    return module


def _refuse_part(model: nn.Module, logits: Tensor) -> None:
    """Logits must be whole: those of one rank's rows could not be told from those of another model."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_sharded(module.weight):
            rows, columns = shard_of(module.weight).shape[0], logits.shape[-1]
            if rows == columns != module.out_features:
                raise ValueError(
                    f"model returns the logits of this rank's {columns} tokens only, of V={module.out_features}; "
                    f"parallelise the unembedding with ColwiseParallel(output_layouts=Replicate())"
                )


def _linears_to(trace: Trace, vocab_size: int) -> Iterator[nn.Linear]:
    for call in reversed(trace.calls):
        if isinstance(call.module, nn.Linear) and call.module.out_features == vocab_size:
            yield call.module


def _is_unembedding(module: object) -> TypeGuard[nn.Linear]:
    # A computed weight (an adapter's, a parametrisation's) is no parameter that could take dW.
    return isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter)


def _candidates(model: nn.Module, trace: Trace, unembedding: Call) -> list[_Candidate]:
    """Lists of modules that could be the blocks: the outermost first (experts are inside blocks), then the longest."""
    ran = trace.num_calls
    lists = [
        (name, [child for child in module.children() if ran[id(child)]])
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    ]
    found: list[_Candidate] = []
    for name, children in lists:
        calls = sorted((trace.first_call(child) for child in children), key=lambda call: call.start)
        is_homogeneous = isinstance(model.get_submodule(name), nn.ModuleList) or len({type(c) for c in children}) == 1
        runs_once = all(ran[id(child)] == 1 for child in children)
        if calls and is_homogeneous and runs_once and calls[-1].end < unembedding.start:
            blocks = tuple(call.module for call in calls)
            found.append(_Candidate(name=name or type(model).__name__, blocks=blocks, last=calls[-1]))
    return sorted(found, key=lambda candidate: (_depth(candidate, found, trace), -len(candidate.blocks)))


def _depth(candidate: _Candidate, others: Sequence[_Candidate], trace: Trace) -> int:
    """In how many of the other lists' blocks this list runs."""
    return sum(
        trace.first_call(block).encloses(candidate.last)
        for other in others
        for block in other.blocks
    )  # fmt: skip


def _tail(trace: Trace, last_block: Call, unembedding: Call) -> tuple[nn.Module, ...]:
    between = [call for call in trace.calls if last_block.end < call.start and call.end < unembedding.start]
    return tuple(call.module for call in between if not any(other.encloses(call) for other in between))


def _verified(
    model: nn.Module, tail: Sequence[nn.Module], unembedding: nn.Linear, hidden: Tensor, logits: Tensor
) -> tuple[float, float | None] | str:
    """The factor and soft cap with which we get the model's logits, or why there are none."""
    try:
        normed = apply_tail(tail, hidden)
    except (TypeError, RuntimeError, IndexError) as error:
        return f"these modules cannot be applied one after the other to the last block's hidden ({error})"
    if normed.shape[-1] != unembedding.weight.shape[1]:
        return f"they give D={normed.shape[-1]}, but the unembedding is [V, D]={list(unembedding.weight.shape)}"
    if unembedding.weight.shape[0] != logits.shape[-1] or normed.shape[:-1] != logits.shape[:-1]:
        return (
            f"logits would be {[*normed.shape[:-1], unembedding.weight.shape[0]]}, the model's are {list(logits.shape)}"
        )
    errors = {
        (scale, softcap): _relative_error(capped(scaled_linear(unembedding, normed, scale), softcap), logits)
        for scale, softcap in product(_scales(model), _softcaps(model))
    }
    best = min(errors, key=errors.__getitem__)
    if errors[best] <= _tolerance(logits, unembedding.weight):
        return best
    return (
        f"the logits differ by {errors[best]:.1e} of the largest one with scale={best[0]} and "
        f"softcap={best[1]}; is there anything between the last block and the logits that is not a module, "
        f"or a factor that the configuration does not name?"
    )


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours.double() - theirs.double()).abs().max()
    return float(difference / theirs.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def _tolerance(logits: Tensor, weight: Tensor) -> float:
    # TF32 products keep ten bits of the mantissa, as fp16 does.
    is_tf32 = weight.is_cuda and torch.get_float32_matmul_precision() != "highest"
    loosest = max(TOLERANCE[logits.dtype], TOLERANCE[weight.dtype])
    return max(loosest, TOLERANCE[torch.float16]) if is_tf32 else loosest


def _scales(model: nn.Module) -> list[float]:
    return [1.0, *_numbers(model, MULTIPLIERS), *(1.0 / value for value in _numbers(model, DIVISORS))]


def _softcaps(model: nn.Module) -> list[float | None]:
    return [None, *_numbers(model, SOFTCAPS)]


def _numbers(model: nn.Module, names: Sequence[str]) -> list[float]:
    """Positive numbers under these names in the model's configuration, its text part, or on the model itself."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    places = (config, get_text_config() if callable(get_text_config) else None, model)
    values = (getattr(place, name, None) for place in places for name in names)
    return [float(value) for value in values if isinstance(value, int | float) and value > 0 and value != 1]


def _not_found(reasons: Sequence[str]) -> str:
    if not reasons:
        return (
            "model has no list of blocks: expected an nn.ModuleList (or an nn.ModuleDict or nn.Sequential "
            "of one class) whose modules each run once per forward, before the unembedding; put the blocks "
            "into one"
        )
    return (
        "the exits cannot reproduce the model's logits: expected softcap(scale * (tail(hidden) @ W.T + b)), "
        "tried " + "; ".join(reasons)
    )
