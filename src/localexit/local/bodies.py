"""What an exit can have of its own in front of its norm: a residual MLP, or a copy of its block."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from localexit import _checks
from localexit.feedback.draws import derive_seed
from localexit.local.discover import TOLERANCE, Anatomy
from localexit.local.graph import reached
from localexit.local.sharding import is_sharded
from localexit.local.trace import accepts, run_model, undisturbed
from localexit.local.trees import first_tensor, tensors_requiring_grad

if TYPE_CHECKING:
    from localexit.local.exits import Exit

EXIT_BODIES = ("norm", "mlp", "block")


class ExitMlp(nn.Module):
    """A body of an exit: `hidden + down(gelu(up(norm(hidden))))`, token by token, four times as wide as the hidden.

    `down` starts at zero, and with it the exit as if it had no body.

    Args:
        width: of the hidden.
        generator: of the weights, on the CPU.
    """

    def __init__(self, width: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        with torch.no_grad():
            self.up.weight.normal_(std=width**-0.5, generator=generator)
            self.down.weight.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., D'] with what the MLP adds."""
        added: Tensor = self.down(nn.functional.gelu(self.up(self.norm(hidden))))
        return hidden + added


@runtime_checkable
class BranchingCache(Protocol):
    """A cache of keys and values that has another one for each exit's copy of a block."""

    def branch(self, exit_index: int) -> Any:
        """The cache of the copy at this exit."""


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """One call of the last block of a unit: what its exit reads from.

    Attributes:
        block: the block.
        args, kwargs: what it was called with, kept apart from other units.
        hidden: [B, T, D'], what it returned.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockBody:
    """A copy of a unit's last block, called with the hidden that the block returned and whatever else it was given.

    Attributes:
        module: the copy.
        exit_index: of the exit that it belongs to.
        place: where a block gets its hidden: position or name of the argument.
    """

    module: nn.Module
    exit_index: int
    place: int | str

    def __call__(self, call: BlockCall) -> Tensor:
        """The hidden [B, T, D'] after the copy.

        Raises:
            ValueError: the block was given a cache which has no room for the copy's keys and values.
        """
        if self.module.training != call.block.training:
            # Whoever switches the model means its exits as well.
            self.module.train(call.block.training)
        args = [call.hidden if index == self.place else self._own(arg) for index, arg in enumerate(call.args)]
        kwargs = {name: call.hidden if name == self.place else self._own(value) for name, value in call.kwargs.items()}
        return first_tensor(self.module(*args, **kwargs), what=f"the body of exit {self.exit_index}")

    def _own(self, value: Any) -> Any:
        if isinstance(value, BranchingCache):
            return value.branch(self.exit_index)
        if hasattr(value, "get_seq_length"):
            raise ValueError(
                f"past_key_values: exit {self.exit_index} has a block of its own (exit_body='block'), whose keys and "
                f"values this {type(value).__name__} has no place for; pass use_cache=False instead, or write with "
                f"localexit.inference, which keeps them"
            )
        return value


def add_bodies(
    model: nn.Module,
    exits: Sequence[Exit],
    anatomy: Anatomy,
    exit_body: str,
    *,
    example: Tensor | Mapping[str, Any],
    seed: int,
) -> tuple[tuple[Exit, ...], nn.ModuleList]:
    """The exits with bodies of their own, and these; the last exit, which is the model itself, has none.

    Args:
        model: the model.
        exits: the exits.
        anatomy: the model's parts.
        exit_body: "norm" for none, "mlp", or "block".
        example: the inputs with which `anatomy` was found.
        seed: of an MLP's weights.

    Raises:
        ValueError: unknown name, no exit would have a body, or the model's blocks cannot be copied, or called again.
    """
    _checks.choice("exit_body", exit_body, EXIT_BODIES)
    if exit_body == "norm":
        return tuple(exits), nn.ModuleList()
    if len(exits) == 1:
        raise ValueError(
            f"exit_body={exit_body!r} is for all exits but the last, and the last is the only exit; leave exit_body "
            f"out, or give more blocks an exit with exits="
        )
    *early, last = exits
    if exit_body == "mlp":
        mlps = _mlps(len(early), anatomy.example_hidden, seed)
        return (*(replace(exit_, body=(mlp,)) for exit_, mlp in zip(early, mlps, strict=True)), last), mlps
    bodies = _blocks(model, early, anatomy, example)
    modules = nn.ModuleList(body.module for body in bodies)
    return (*(replace(exit_, block=body) for exit_, body in zip(early, bodies, strict=True)), last), modules


def _mlps(num: int, like: Tensor, seed: int) -> nn.ModuleList:
    generator = torch.Generator().manual_seed(derive_seed(seed, "exit bodies"))
    # Made on the CPU, so that a seed means the same on every device; without a draw of torch's own generator.
    with torch.random.fork_rng(devices=[]):
        return nn.ModuleList(
            ExitMlp(like.shape[-1], generator=generator).to(like.device, like.dtype) for _ in range(num)
        )


def _blocks(
    model: nn.Module, exits: Sequence[Exit], anatomy: Anatomy, example: Tensor | Mapping[str, Any]
) -> list[BlockBody]:
    """Copies of the exits' blocks, verified by their numbers."""
    names = {module: name for name, module in model.named_modules()}
    if anatomy.routers is not None:
        raise _refused(
            "the routers in the copies would learn without their auxiliary loss; set "
            "config.output_router_logits=False to train without it"
        )
    places = _places(model, anatomy, example)
    bodies = []
    for exit_ in exits:
        block = anatomy.blocks[exit_.block_index]
        place = places[max(exit_.block_index - 1, 0)]
        bodies.append(BlockBody(module=_copied(block, names[block]), exit_index=exit_.index, place=place))
    _verify(model, bodies, [anatomy.blocks[exit_.block_index] for exit_ in exits], anatomy, example)
    return bodies


def _copied(block: nn.Module, name: str) -> nn.Module:
    if any(is_sharded(module) or isinstance(module, DistributedDataParallel) for module in block.modules()):
        raise _refused(f"{name} is sharded, or wrapped in DDP, and cannot be copied so")
    try:
        copied = copy.deepcopy(block)
    except Exception as error:  # whatever a stranger's module raises
        raise _refused(f"{name} cannot be copied ({error})") from error
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _places(model: nn.Module, anatomy: Anatomy, example: Tensor | Mapping[str, Any]) -> list[int | str]:
    """For every block but the first, which of its arguments is what the one before it returned."""
    places: list[int | str] = []
    returned: list[Tensor] = []

    def before(block: nn.Module, args: Any, kwargs: Any) -> None:
        if returned:
            given = {**dict(enumerate(args)), **kwargs}
            place = next((key for key, value in given.items() if value is returned[-1]), None)
            if place is None:
                index = anatomy.blocks.index(block)
                raise _refused(f"no argument of block {index} is what block {index - 1} returned")
            places.append(place)

    def after(_block: nn.Module, _args: Any, output: Any) -> None:
        returned.append(first_tensor(output, what="a block"))

    with ExitStack() as hooks:
        for block in anatomy.blocks:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after).remove)
        _run(model, example)
    return places


def _verify(
    model: nn.Module,
    bodies: Sequence[BlockBody],
    blocks: Sequence[nn.Module],
    anatomy: Anatomy,
    example: Tensor | Mapping[str, Any],
) -> None:
    """Run the model once with its copies at work: they must do what the blocks do, with parameters of their own.

    Raises:
        ValueError: they do not, or the model feels that they ran.
    """
    body_of = dict(zip(blocks, bodies, strict=True))
    hiddens: list[Tensor] = []

    def look(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = BlockCall(block=block, args=args, kwargs=kwargs, hidden=first_tensor(output, what="a block"))
        if block in body_of:
            _verify_body(body_of[block], call)
        hiddens.append(call.hidden)

    with ExitStack() as hooks:
        for block in anatomy.blocks:
            hooks.callback(block.register_forward_hook(look, with_kwargs=True).remove)
        _run(model, example)
    if not _is_same(hiddens[-1], anatomy.example_hidden):
        raise _refused("the model gives other logits when the copies run: its blocks share more than their hidden")


def _verify_body(body: BlockBody, call: BlockCall) -> None:
    try:
        body.module.eval()
        again = first_tensor(body.module(*call.args, **call.kwargs), what="a copy of a block")
        with torch.enable_grad():
            read = body(call)
    except Exception as error:  # whatever a stranger's module raises
        raise _refused(f"the block of exit {body.exit_index} cannot be called once more ({error})") from error
    if not _is_same(again, call.hidden) or read.shape != call.hidden.shape:
        raise _refused(f"the copy of the block of exit {body.exit_index} gives other numbers than the block")
    allowed = {*map(id, body.module.parameters()), *map(id, tensors_requiring_grad((call.args, call.kwargs)))}
    if any(id(leaf) not in allowed for leaf in reached([read])[0]):
        raise _refused(
            f"the copy of the block of exit {body.exit_index} computes with parameters of the model (was its forward "
            f"replaced, by torch.compile for one? compile after attaching)"
        )


def _run(model: nn.Module, example: Tensor | Mapping[str, Any]) -> None:
    with undisturbed(model):
        run_model(model, example, **({"use_cache": False} if accepts(model, "use_cache") else {}))


def _is_same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= TOLERANCE[expected.dtype] * expected.abs().max()
    )


def _refused(reason: str) -> ValueError:
    return ValueError(f"exit_body='block': {reason}; or take exit_body='mlp', which needs nothing of the blocks")
