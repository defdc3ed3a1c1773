"""In stream mode the activations of one unit live at a time: their peak does not depend on depth."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from local.decoders import DECODERS, batch, build
from local.rules import attached
from localexit import LocalModel
from localexit.local.steps import SharedGradient, Step


class SavedBytes:
    """Bytes of the tensors that autograd keeps for a backward, parameters aside; the memory behind one counts once."""

    def __init__(self, model: nn.Module) -> None:
        self.ignored = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.live: dict[int, int] = {}
        self.peak = 0

    class Held:
        """What autograd holds instead of the tensor: its end is the end of the saved activation."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(self, tensor: Tensor) -> Held:
        held = self.Held(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.ignored:
            key = id(held)
            self.live[key] = storage.nbytes()
            weakref.finalize(held, self.live.pop, key)
            self.peak = max(self.peak, sum(self.live.values()))
        return held

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor):
            yield


def peak_bytes(name: str, num_blocks: int, mode: str, **options: object) -> int:
    model = build(name, num_blocks)
    local = attached(model, backward=mode, **options)
    saved = SavedBytes(model)
    with saved.watching():
        out = local(*batch())
        if mode == "deferred":
            out.loss.backward()
    del out
    assert not saved.live
    return saved.peak


def test_a_shared_gradient_takes_no_second_copy_of_itself_unless_it_is_to_be_scaled() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    assert SharedGradient(parameter).total is parameter.grad
    for factor, expected in ((0.5, [3, 3, 3]), (2.0, [11, 11, 11])):
        scaled = SharedGradient(parameter, factor=factor)
        scaled.total += 4
        scaled.fold()
        assert parameter.grad.tolist() == expected


def train_deferred(local: LocalModel) -> None:
    local(*batch()).loss.backward()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("mode", "use"),
    [
        ("stream", lambda local: local(*batch())),
        ("deferred", train_deferred),
        ("stream", lambda local: local.evaluate(*batch())),
        ("stream", lambda local: local.predictions(*batch())),
        ("stream", lambda local: local.exit_logits(0, batch()[0])),
    ],
    ids=["stream", "deferred", "evaluate", "predictions", "logits"],
)
def test_a_step_is_freed_without_the_garbage_collector(name: str, mode: str, use: Callable[[LocalModel], Any]) -> None:
    """It holds hidden states and a sum of dW, which must not wait until Python looks for reference cycles."""
    local = attached(build(name, 3), backward=mode)
    use(local)
    gc.collect()
    gc.disable()
    try:
        use(local)
        # Some objects are proxies, which `isinstance` would look behind.
        assert [type(thing) for thing in gc.get_objects() if issubclass(type(thing), Step)] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("name", DECODERS)
def test_saved_activations_do_not_grow_with_depth(name: str) -> None:
    assert peak_bytes(name, 8, "stream") == peak_bytes(name, 2, "stream")


def test_units_of_two_blocks_hold_two_blocks() -> None:
    two = peak_bytes("plain", 8, "stream", exits="every:2")
    assert two == peak_bytes("plain", 2, "stream", exits="every:2")
    assert 1.5 < two / peak_bytes("plain", 8, "stream") < 2.5


@pytest.mark.parametrize("name", DECODERS)
def test_this_probe_sees_depth_where_there_is_some(name: str) -> None:
    assert peak_bytes(name, 8, "deferred") > 3 * peak_bytes(name, 2, "deferred")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_block_output_outlives_the_next_unit(name: str) -> None:
    """Keys and values in a cache, or outputs collected on the way, would keep all of them alive."""
    model = build(name, 6)
    local = attached(model, backward="stream")
    most_alive = 0
    outputs: list[weakref.ref[Tensor]] = []

    def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
        nonlocal most_alive
        outputs.append(weakref.ref(output))
        most_alive = max(most_alive, sum(ref() is not None for ref in outputs))

    # The key projections' outputs would stay in a cache, the blocks' own in a list of hidden states.
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(watch)
    local(*batch())
    per_block = len(outputs) // 6
    assert most_alive <= per_block


class Casts(TorchDispatchMode):
    """The memory behind every copy in bf16 that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Not the gradients, which go back to fp32.
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.made.append(StorageWeakRef(result.untyped_storage()))
        return result

    @property
    def num_alive(self) -> int:
        return sum(not storage.expired() for storage in self.made)


def test_what_autocast_has_cast_for_a_unit_is_freed_with_it() -> None:
    """Not only where the region ends: until then the copies of all units' weights would add up."""
    local = attached(build("plain").float(), backward="stream")
    ids, labels = batch()
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        local(ids, labels)
        assert len(casts.made) > 3 * len(local.blocks)
        assert casts.num_alive == 0
