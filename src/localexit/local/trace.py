"""One traced forward of a model: which modules ran, in which order, and what they returned."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from localexit.local.sharding import replicating, whole


@dataclass(kw_only=True)
class Call:
    """One call of a module; `start` and `end` are positions on one clock that ticks at every start and end."""

    module: nn.Module
    start: int
    end: int = field(init=False, repr=False, compare=False)
    output: Any = None

    def encloses(self, other: Call) -> bool:
        """Whether `other` ran inside this call."""
        return self.start < other.start and other.end < self.end


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The calls of one forward in the order they started, what it returned, and the logits [B, T, V] in that."""

    calls: tuple[Call, ...]
    output: Any
    logits: Tensor

    @cached_property
    def num_calls(self) -> Counter[int]:
        """How often each module ran, by `id(module)`."""
        return Counter(id(call.module) for call in self.calls)

    def first_call(self, module: nn.Module) -> Call:
        """The first call of a module that ran."""
        return self._first_calls[id(module)]

    @cached_property
    def _first_calls(self) -> dict[int, Call]:
        return {id(call.module): call for call in reversed(self.calls)}


def trace_forward(model: nn.Module, example: Tensor | Mapping[str, Any]) -> Trace:
    """Run one forward in eval mode without gradients and record every module call; leaves the model as it was.

    Args:
        model: the model.
        example: token ids [B, T], or the keyword inputs of one forward.

    Raises:
        TypeError: the model does not return logits.
    """
    calls: list[Call] = []
    with undisturbed(model), ExitStack() as hooks:
        for handle in _recording_hooks(model, calls):
            hooks.callback(handle.remove)
        with replicating():
            output = run_model(model, example)
        logits = whole(logits_of(output))
    return Trace(calls=tuple(calls), output=output, logits=logits)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, `.logits`, or the first element of a tuple.

    Raises:
        TypeError: there are none.
    """
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, (tuple, list)) and logits else logits
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        raise TypeError(
            f"model returned {type(output).__name__} without logits [batch, tokens, vocabulary]; expected a "
            f"decoder language model whose forward returns the logits, or an object with .logits"
        )
    return logits


def random_ids(model: nn.Module, *, seed: int) -> Tensor:
    """Random token ids [2, 8] (fewer tokens for a tiny context), on the model's device, from a generator of their own.

    Raises:
        ValueError: the model has no nn.Embedding, so that its vocabulary is not known.
    """
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if not sizes:
        raise ValueError(
            "model has no nn.Embedding from which to make up token ids; pass example=, the token ids "
            "[batch, tokens] or a dict with the inputs of one forward"
        )
    # Position and token embeddings look alike here; ids and length below the smaller one fit both.
    smallest = min(sizes)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(smallest, (2, min(8, smallest)), generator=generator)
    return ids.to(next(model.parameters()).device)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast, not compiled; flags, buffers and random state are put back at the end."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(restored_buffers(model))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        # Compiled blocks would be compiled for hooks that are gone when they run the next time, each block anew, until
        # there are too many versions of them and none is used any more.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()`, and every module's own training flag back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer back: the same tensor objects with the same values."""
    saved = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in saved:
                buffer.copy_(values)
                module._buffers[name] = buffer


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of that name, or that of the model in an adapter of `peft`."""
    if name in inspect.signature(model.forward).parameters:
        return True
    get_base_model = getattr(model, "get_base_model", None)
    return callable(get_base_model) and accepts(get_base_model(), name)


def cache_argument(model: nn.Module) -> str | None:
    """What the model's forward calls the cache of keys and values that it fills, or None where it takes none.

    Models of `transformers` before 5.24 say "past_key_values", later ones "cache".
    """
    if accepts(model, "cache") and accepts(model, "use_cache"):
        return "cache"
    return "past_key_values" if accepts(model, "past_key_values") else None


def run_model(model: nn.Module, example: Tensor | Mapping[str, Any], **options: Any) -> Any:
    """The model's forward of an example; labels only where they are among the options.

    Raises:
        TypeError: the example is neither token ids nor keyword inputs.
        ValueError: it is a tensor of another shape than token ids have.
    """
    if isinstance(example, Tensor):
        if example.is_floating_point():
            raise TypeError(f"example must hold token ids as int64 or int32, got {example.dtype}")
        if example.dim() != 2 or not example.numel():
            raise ValueError(f"example must be token ids [batch, tokens], got shape {list(example.shape)}")
        return model(example, **options)
    if isinstance(example, Mapping):
        return model(**{key: value for key, value in example.items() if key != "labels"}, **options)
    raise TypeError(
        f"example must be token ids [batch, tokens] or a dict with the inputs of one forward, got "
        f"{type(example).__name__}"
    )


def _recording_hooks(model: nn.Module, calls: list[Call]) -> Iterator[Any]:
    open_calls: list[Call] = []
    clock = 0

    def tick() -> int:
        nonlocal clock
        clock += 1
        return clock

    def begin(module: nn.Module, _args: Any) -> None:
        call = Call(module=module, start=tick())
        calls.append(call)
        open_calls.append(call)

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        call = open_calls.pop()
        call.end, call.output = tick(), output

    for module in model.modules():
        yield module.register_forward_pre_hook(begin)
        yield module.register_forward_hook(end)
