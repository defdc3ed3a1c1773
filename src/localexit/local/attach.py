"""Train any decoder language model unit by unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from localexit import _checks
from localexit.exits.heads import feedback_for
from localexit.exits.ranks import DataParallel, VocabParallel
from localexit.exits.vocab import local_weight
from localexit.feedback import Feedback
from localexit.local.bodies import add_bodies
from localexit.local.discover import Anatomy, discover
from localexit.local.exits import Exit, Readout, make_exits, warn_if_scale_invariant
from localexit.local.model import LocalModel
from localexit.local.schedule import ExitSchedule
from localexit.local.sharding import is_sharded, parameters_of_blocks, reshard, shard_of, sharded_modules
from localexit.local.steps import LossSettings
from localexit.local.trace import random_ids
from localexit.local.units import exit_blocks, make_units

BACKWARD_MODES = ("deferred", "stream", "joint", "direct")


def attach(
    model: nn.Module,
    *,
    feedback: str | Feedback = "mirror_sampled",
    exits: str | Iterable[int] = "every",
    exit_norm: str | nn.Module = "shared",
    exit_body: str = "norm",
    backward: str = "deferred",
    exit_weights: Sequence[float] | None = None,
    schedule: ExitSchedule | None = None,
    example: Tensor | Mapping[str, Any] | None = None,
    seed: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    data_parallel: DataParallel | None = None,
) -> LocalModel:
    """Give a model exits, and train it unit by unit from their losses.

    Blocks, unembedding and what lies between are found by one traced forward on random tokens, and verified: the
    exits' logits must be the model's. `LocalModel.remove()` undoes everything.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=12, n_layer=3, n_head=2))
    >>> local = attach(model.train(), exits="every:2")
    >>> [unit.block_indices for unit in local.units]
    [(0, 1), (2,)]
    >>> tokens = torch.randint(50, (2, 8))
    >>> output = local(tokens, labels=tokens)
    >>> output.loss.backward()
    >>> output.exit_losses.shape
    torch.Size([2])

    Args:
        model: a causal language model of `transformers`, or any decoder: `forward(input_ids) -> logits [B, T, V]`, or
            an object with `.logits`.
        feedback: a rule or its name.
        exits: "every" block, "every:k" for every k-th, or block indices. The last block always has one.
        exit_norm: what stands between a block and the unembedding at all exits but the last, which has the model's own:
            "shared" (the model's own, trained by all), "copy" (a copy each), "none", or a module.
        exit_body: what all exits but the last have of their own in front of that, trained with their units: "norm" for
            nothing more, "mlp" for a residual MLP, "block" for a copy of the exit's block, called with what that is
            called with; what is frozen in the block is frozen in its copy.
        backward: "deferred": the loss has its graph, and any outer backward trains the model; until then every unit's
            activations and every exit's [V, D] gradient of the unembedding are kept. "stream": gradients are made
            during the forward, one unit's activations live at a time, and all exits share one such gradient. Two
            controls that are not local, their gradients made in the forward too: "joint", end-to-end backprop from all
            exits, and "direct", direct feedback alignment from the last exit; see `localexit.local.controls`.
        exit_weights: what each exit's loss counts in the sum, positive; 1 each by default.
        schedule: a warm-up of the weights; fewer exits or fewer tokens a step, to make exits cheaper. None: every exit
            sees all tokens in every step.
        example: token ids [B, T], or a dict with the inputs of one forward, where random ids would not do.
        seed: seed of the rule when given by name, of the exits' bodies, and of the random tokens.
        label_smoothing: of the training loss, in [0, 1).
        z_loss: factor of lse² in the training loss.
        data_parallel: the ranks that share each batch, every one with batches of one shape and the same model. With
            "stream" a forward leaves the gradients of the whole batch on every rank, a unit's averaged while the next
            one computes; with "deferred" call `LocalModel.average_gradients()`, or wrap the result in DDP. Blocks may
            be wrapped in DDP, or sharded with `fully_shard`, one by one and before.

    An unembedding that is a `DTensor` sharded by rows over a mesh of one dimension (by `parallelize_module`, or
    `distribute_tensor`) makes every exit vocabulary parallel: the ranks of that mesh need the same batches and dropout,
    and the rule, made for all V tokens, is divided among them.

    Raises:
        ValueError: an option is out of range, the model's parts cannot be found, its logits cannot be reproduced, it is
            attached already, or it is compiled as a whole.
        TypeError: an argument is of the wrong type.
    """
    _check_model(model)
    _checks.choice("backward", backward, BACKWARD_MODES)
    schedule = schedule or ExitSchedule()
    if backward == "direct" and schedule.exits_per_step is not None:
        raise ValueError(
            "exits_per_step is not for backward='direct', whose only loss is the last exit's; leave it out"
        )
    _checks.loss_options("mean", label_smoothing, z_loss, None)
    example = random_ids(model, seed=seed) if example is None else example
    anatomy = discover(model, example)
    # The forward has left whole parameters where units are to find sharded ones.
    reshard(sharded_modules(model))
    model_exits, exit_norms = make_exits(exit_blocks(exits, len(anatomy.blocks)), anatomy, exit_norm)
    model_exits, exit_bodies = add_bodies(model, model_exits, anatomy, exit_body, example=example, seed=seed)
    vocab_parallel = _vocab_parallel(model, anatomy)
    rule = feedback_for(feedback, anatomy.unembedding.weight, seed=seed)
    warn_if_scale_invariant(model_exits, anatomy.example_hidden, rule.name)
    units, shared = make_units(
        model,
        anatomy.blocks,
        [exit_.block_index for exit_ in model_exits],
        shared=_shared_by_exits(anatomy, model_exits, exit_norm),
        modules=[exit_.modules for exit_ in model_exits],
    )
    readout = Readout(unembedding=anatomy.unembedding, scale=anatomy.scale, softcap=anatomy.softcap)
    local = LocalModel(
        model,
        anatomy=anatomy,
        units=units,
        shared=shared,
        exits=model_exits,
        exit_norms=exit_norms,
        exit_bodies=exit_bodies,
        exit_norm=exit_norm if isinstance(exit_norm, str) else None,
        exit_body=exit_body,
        settings=LossSettings(
            readout=readout,
            feedback=rule,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            data_parallel=data_parallel,
            vocab_parallel=vocab_parallel,
        ),
        backward_mode=backward,
        exit_weights=exit_weights,
        schedule=schedule,
    )
    _start_from_first_rank(local)
    return local


def _start_from_first_rank(local: LocalModel) -> None:
    """Give all ranks the first one's parameters, and its rule's seed and state, whatever each was built with."""
    rule, ours = local.feedback, parameters_of_blocks(local.model)
    vocab, data = local.vocab_parallel, local.data_parallel
    # A parameter that is spread over ranks is one already; each rank that shares an unembedding has rows of a rule.
    if vocab is not None:
        of_rows = {id(buffer) for buffer in vocab.parts(rule)}
        same = (*local.parameters(), *local.buffers())
        _copy_from_first([t for t in same if not is_sharded(t) and id(t) not in of_rows], rule, vocab.group)
    if data is not None:
        every = [shard_of(t.detach()) for t in (*local.parameters(), *local.buffers()) if id(t) not in ours]
        _copy_from_first(every, rule, data.group)


def _copy_from_first(tensors: Sequence[Tensor], rule: Feedback, group: dist.ProcessGroup | None) -> None:
    seed = rule.get_extra_state().to(rule.step.device)
    for tensor in (*tensors, seed):
        dist.broadcast(tensor.detach(), group=group, group_src=0)
    rule.set_extra_state(seed)


def _vocab_parallel(model: nn.Module, anatomy: Anatomy) -> VocabParallel | None:
    """The ranks that share the unembedding, if it is a `DTensor`.

    Raises:
        ValueError: it, or another parameter, is spread over ranks in a way that is not understood.
    """
    weight, in_blocks = anatomy.unembedding.weight, parameters_of_blocks(model)
    spread: dict[str, Any] = {n: p for n, p in model.named_parameters() if is_sharded(p) and id(p) not in in_blocks}
    if not spread:
        return None
    inside = {id(parameter) for block in anatomy.blocks for parameter in block.parameters()}
    mesh: Any = getattr(weight, "device_mesh", None)
    for name, parameter in spread.items():
        is_by_rows = list(map(str, parameter.placements)) == ["S(0)"]
        if id(parameter) in inside or parameter.device_mesh != mesh or not is_by_rows:
            raise ValueError(
                f"{name} is a DTensor with placements {list(parameter.placements)} over {parameter.device_mesh}, but "
                f"attach() takes parameters that are whole on every rank, blocks that fully_shard() was called on, and "
                f"an unembedding (and embedding) that is sharded by rows, [Shard(0)], over one mesh of one dimension: "
                f"of a mesh of several pass mesh['vocab'], its dimension of the vocabulary. Redistribute it, or "
                f"replace it with its full_tensor()"
            )
    if anatomy.unembedding.bias is not None and not is_sharded(anatomy.unembedding.bias):
        raise ValueError(
            "the unembedding's bias is whole, but its weight is sharded by rows; distribute it with [Shard(0)] too"
        )
    return local_weight(weight, None)[1]


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise ValueError(
            "model is compiled as a whole, and exits inside one compiled graph cannot train its units one "
            "by one; attach to the model as it was before, and compile its blocks one by one"
        )
    if is_sharded(model):
        raise ValueError(
            "model is sharded as a whole, and its unembedding has to be whole at every exit; call fully_shard() on "
            "its blocks one by one and not on the model, before attach(..., data_parallel=)"
        )
    forward = getattr(model.__dict__.get("forward"), "func", None)
    if isinstance(getattr(forward, "__self__", None), LocalModel):
        raise ValueError("model is attached already; call remove() on that LocalModel first")


def _shared_by_exits(anatomy: Anatomy, exits: Sequence[Exit], exit_norm: str | nn.Module) -> list[nn.Parameter]:
    shared = list(anatomy.unembedding.parameters())
    if exit_norm == "shared" or isinstance(exit_norm, nn.Module):
        shared += [parameter for module in exits[0].norm for parameter in module.parameters()]
    return shared
