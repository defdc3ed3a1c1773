"""What happens at the exits during one forward: a training step of either kind, an evaluation, logits at one exit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from localexit.exits.functional import exit_cross_entropy, exit_step
from localexit.exits.ranks import DataParallel, VocabParallel
from localexit.feedback.base import Feedback, accumulate_dtype
from localexit.local.average import GradientAverage
from localexit.local.batch import IGNORE_INDEX, Batch, Seen, num_targets
from localexit.local.bodies import BlockCall
from localexit.local.exits import Exit, Readout


class LocalOutput(NamedTuple):
    """What a training forward returns.

    Attributes:
        loss: 0-dim, Σ over exits of weight · (loss + router loss), in nats/token. "deferred": call backward on it.
            "stream": the gradients are there already, and backward on it is an error.
        exit_losses: [num_exits], each exit's own cross-entropy, unweighted and detached; NaN for one that sat the step
            out. Of several ranks each has its own part times the number of ranks: the mean over ranks is the loss of
            the whole batch.
        logits: None; logits are never materialised in training.
        router_losses: [num_exits], the auxiliary loss of each unit's routers, likewise; None for a model without.
    """

    loss: Tensor
    exit_losses: Tensor
    logits: None = None
    router_losses: Tensor | None = None


class ExitEvaluation(NamedTuple):
    """Every exit on one batch.

    Attributes:
        loss: [num_exits], mean cross-entropy in nats/token.
        accuracy: [num_exits], share of tokens whose most likely successor is the right one.
        num_tokens: 0-dim, how many tokens counted.
    """

    loss: Tensor
    accuracy: Tensor
    num_tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Everything about the exits' loss that does not change from step to step."""

    readout: Readout
    feedback: Feedback
    label_smoothing: float
    z_loss: float
    data_parallel: DataParallel | None = None
    vocab_parallel: VocabParallel | None = None


@dataclass(kw_only=True)
class Step:
    """One forward's business at the exits.

    Attributes:
        settings: of the loss.
        last_exit: index of the exit after which nothing more is run.
        is_training: whether units have graphs that must be kept apart.
    """

    settings: LossSettings
    last_exit: int
    is_training: bool = False

    def at_exit(self, exit_: Exit, call: BlockCall) -> None:
        """Called at every exit, in order, with what its block was given and returned."""
        raise NotImplementedError


@dataclass(kw_only=True)
class TrainingStep(Step):
    """A step that trains: the common part of "deferred" and "stream".

    Attributes:
        batch: what is learned from.
        router_logits: of the routers that have run since the last exit.
        losses, router_losses: by index of the exits that have taken part.
    """

    batch: Batch
    router_logits: list[Tensor] = field(default_factory=list)
    losses: dict[int, Tensor] = field(default_factory=dict)
    router_losses: dict[int, Tensor] = field(default_factory=dict)
    is_training: bool = True

    def at_exit(self, exit_: Exit, call: BlockCall) -> None:
        """Let the unit learn, unless its exit sits this step out."""
        self.batch.check(call.hidden)
        if self.batch.weights[exit_.index] > 0:
            self.learn(exit_, exit_.reads(call))
        self.router_logits.clear()

    def learn(self, exit_: Exit, hidden: Tensor) -> None:
        """The exit's loss from what it reads, and what follows from that."""
        raise NotImplementedError

    def seen_by(self, exit_: Exit) -> Seen:
        """The tokens that an exit sees."""
        rule = self.settings.feedback
        return self.batch.seen_by(exit_.index, seed=rule.seed, step=rule.step)

    def normed(self, exit_: Exit, hidden: Tensor, seen: Seen) -> Tensor:
        """The normed hidden of the tokens that the exit sees, with its graph."""
        return self.settings.readout.normed(exit_, seen.of(hidden))

    def router_loss(self, exit_: Exit) -> Tensor | None:
        """The auxiliary loss of the routers in the unit that ends here, with its graph; 0-dim, None without routers.

        Like the cross-entropy it is a mean over tokens: a part of a batch counts by its share of the labels, and the
        mean over ranks is that of all.
        """
        batch = self.batch
        if batch.routers is None:
            return None
        if not self.router_logits:
            loss = batch.target.new_zeros((), dtype=torch.float32)
        else:
            ranks = self.settings.data_parallel
            share = num_targets(batch.target) / batch.num_items * (1 if ranks is None else ranks.size)
            loss = batch.routers.loss(self.router_logits, batch.router_mask) * share
        self.router_losses[exit_.index] = loss.detach()
        return loss

    def output(self) -> LocalOutput:
        """The result, after the last exit."""
        raise NotImplementedError

    def _output(self, loss: Tensor) -> LocalOutput:
        return LocalOutput(
            loss=loss,
            exit_losses=self._per_exit(self.losses),
            router_losses=None if self.batch.routers is None else self._per_exit(self.router_losses),
        )

    def _per_exit(self, losses: Mapping[int, Tensor]) -> Tensor:
        """[num_exits], NaN for exits that have not taken part: of a pipeline's stage that may be all of its own."""
        dtype = next((loss.dtype for loss in losses.values()), torch.float32)
        missing = torch.full((), torch.nan, dtype=dtype, device=self.batch.target.device)
        return torch.stack([losses.get(index, missing).detach() for index in range(len(self.batch.weights))])

    def _weighted_sum(self, losses: Mapping[int, Tensor]) -> Tensor:
        """Σ weight · loss over the exits that have taken part."""
        if not losses:
            return self.batch.target.new_zeros((), dtype=torch.float32)
        # Numbers of the host: a tensor of them would be a copy to the device, for which a CUDA graph has no place.
        weights = self.batch.weights
        weighted = [loss if weights[index] == 1 else loss * weights[index] for index, loss in losses.items()]
        return torch.stack(weighted).sum()


@dataclass(kw_only=True)
class DeferredStep(TrainingStep):
    """Losses keep their graphs, one per unit and apart from each other; whoever calls backward makes the gradients.

    Attributes:
        objectives: what each unit minimises, its exit's loss and its routers'.
    """

    objectives: dict[int, Tensor] = field(default_factory=dict)

    def learn(self, exit_: Exit, hidden: Tensor) -> None:
        """Compute the exit's loss with its graph."""
        settings, seen = self.settings, self.seen_by(exit_)
        loss = exit_cross_entropy(
            self.normed(exit_, hidden, seen),
            settings.readout.weight,
            seen.target,
            feedback=settings.feedback,
            linear_bias=settings.readout.bias(),
            num_items=seen.num_items,
            token_weight=seen.token_weight,
            label_smoothing=settings.label_smoothing,
            z_loss=settings.z_loss,
            softcap=settings.readout.softcap,
            exit_index=exit_.index,
            first_row=self.batch.first_row,
            data_parallel=settings.data_parallel,
        )
        self.losses[exit_.index] = loss
        of_routers = self.router_loss(exit_)
        self.objectives[exit_.index] = loss if of_routers is None else loss + of_routers

    def output(self) -> LocalOutput:
        """Σ weight · (loss + router loss) with its graph."""
        return self._output(self._weighted_sum(self.objectives))


@dataclass(kw_only=True)
class StreamStep(TrainingStep):
    """Each unit's backward runs at its exit, and frees the unit's activations before the next unit starts.

    Attributes:
        loss_scale: what gradients are multiplied by, for loss scaling in fp16.
        average: takes the means over ranks, where there are several.
        after_unit: called with the index of a unit whose gradients are there.
        send: called with the hidden after the last unit, before that learns from it.
    """

    loss_scale: Tensor | float = 1.0
    average: GradientAverage | None = None
    after_unit: Callable[[int], None] | None = None
    send: Callable[[Tensor], None] | None = None
    is_in_backward: bool = False

    def __post_init__(self) -> None:
        readout = self.settings.readout
        self.weight_grad = SharedGradient(readout.weight)
        self.bias_grad = SharedGradient(readout.unembedding.bias, factor=readout.scale)

    def at_exit(self, exit_: Exit, call: BlockCall) -> None:
        """Hand the hidden on where somebody waits for it, and let the unit learn."""
        if self.send is not None and exit_.index == self.last_exit:
            self.send(call.hidden.detach())
        super().at_exit(exit_, call)

    def learn(self, exit_: Exit, hidden: Tensor) -> None:
        """Loss, dW and feedback of the exit, then the backward of its unit."""
        seen = self.seen_by(exit_)
        normed = self.normed(exit_, hidden, seen)
        feedback = self.run_exit(exit_, normed, seen)
        self._backward({normed: feedback, **self.router_grads(exit_)})
        self._average_unit(exit_.index)
        if self.after_unit is not None:
            self.after_unit(exit_.index)

    def run_exit(self, exit_: Exit, normed: Tensor, seen: Seen, *, is_trained: bool = True) -> Tensor | None:
        """Keep the exit's loss, unweighted; add its dW to the sum; return its feedback. Not trained, only the loss."""
        settings, readout = self.settings, self.settings.readout
        factor = self.batch.weights[exit_.index] * self.loss_scale
        # To divide by one would be two launches an exit for nothing.
        is_scaled = isinstance(factor, Tensor) or factor != 1.0
        bias = readout.bias()
        result = exit_step(
            normed.detach(),
            readout.weight.detach(),
            seen.target,
            feedback=settings.feedback,
            linear_bias=None if bias is None else bias.detach(),
            # Loss, dW and feedback are all proportional to 1 / num_items: dividing it scales the three at once.
            num_items=seen.num_items / factor if is_scaled else seen.num_items,
            token_weight=seen.token_weight,
            label_smoothing=settings.label_smoothing,
            z_loss=settings.z_loss,
            softcap=readout.softcap,
            grad_weight=self.weight_grad.total if is_trained else None,
            grad_bias=self.bias_grad.total if is_trained else None,
            exit_index=exit_.index,
            first_row=self.batch.first_row,
            need_feedback=is_trained and normed.requires_grad,
            data_parallel=settings.data_parallel,
        )
        self.losses[exit_.index] = result.loss / factor if is_scaled else result.loss
        return result.feedback

    def router_grads(self, exit_: Exit) -> dict[Tensor, Tensor | None]:
        """The auxiliary loss of the unit's routers, and what its gradient is multiplied by."""
        loss = self.router_loss(exit_)
        if loss is None or not loss.requires_grad:
            return {}
        return {loss: torch.ones_like(loss) * self.batch.weights[exit_.index] * self.loss_scale}

    def output(self) -> LocalOutput:
        """Add dW to the parameters' gradients; the loss is for reading only."""
        self.weight_grad.fold()
        self.bias_grad.fold()
        if self.average is not None:
            self.average.finish()
        objectives = dict(self.losses)
        for index, of_routers in self.router_losses.items():
            objectives[index] = objectives[index] + of_routers
        return self._output(_readable(self._weighted_sum(objectives)))

    def _backward(self, grads: Mapping[Tensor, Tensor | None]) -> None:
        """The unit's backward from the tensors that depend on its parameters, given what arrives at each."""
        self.is_in_backward = True
        run_backward(grads)
        self.is_in_backward = False
        # Autocast keeps a copy of every weight it cast until its region ends: with depth, the copies of all units.
        torch.clear_autocast_cache()

    def _average_unit(self, index: int) -> None:
        if self.average is not None:
            self.average.start(index)


def run_backward(grads: Mapping[Tensor, Tensor | None]) -> None:
    """One backward from several tensors, given what arrives at each; None, and tensors without a graph, are left out.

    Autocast is off: autograd gives every operation the dtype of its forward by itself.
    """
    found = [(tensor, grad) for tensor, grad in grads.items() if grad is not None and tensor.requires_grad]
    if not found:
        return
    tensors, arriving = zip(*found, strict=True)
    with torch.autocast(tensors[0].device.type, enabled=False):
        torch.autograd.backward(tensors, arriving)


class SharedGradient:
    """The sum over exits of one shared parameter's gradient, in fp32 (fp64 for fp64 parameters).

    It is the parameter's own `.grad` where that has the sum's dtype. Otherwise it is a buffer of its own, and
    `fold()` rounds once after the last exit instead of once per exit.

    Args:
        parameter: the parameter; None or frozen skips the work.
        factor: what `fold()` multiplies the sum by.
    """

    def __init__(self, parameter: Tensor | None, *, factor: float = 1.0) -> None:
        self.parameter = parameter if parameter is not None and parameter.requires_grad else None
        self.factor = factor
        self.total = self._buffer()

    @torch.no_grad()
    def fold(self) -> None:
        """Add the sum to the parameter's gradient."""
        if self.parameter is None or self.total is None or self.total is self.parameter.grad:
            return
        total = (self.total if self.factor == 1.0 else self.total * self.factor).to(self.parameter.dtype)
        if self.parameter.grad is None:
            self.parameter.grad = total
        else:
            self.parameter.grad += total

    def _buffer(self) -> Tensor | None:
        if self.parameter is None:
            return None
        dtype, grad = accumulate_dtype(self.parameter.dtype), self.parameter.grad
        # A tied embedding's backward leaves a whole gradient, also where the parameter is spread over ranks.
        is_alike = getattr(grad, "placements", None) == getattr(self.parameter, "placements", None)
        if (
            grad is not None
            and is_alike
            and grad.dtype == dtype
            and self.factor == 1.0
            and grad.layout == torch.strided
        ):
            return grad
        return torch.zeros_like(self.parameter, dtype=dtype, requires_grad=False)


@dataclass(kw_only=True)
class EvaluationStep(Step):
    """Loss and accuracy at every exit, without logits."""

    target: Tensor
    losses: list[Tensor] = field(default_factory=list)
    accuracies: list[Tensor] = field(default_factory=list)

    def at_exit(self, exit_: Exit, call: BlockCall) -> None:
        """Measure the exit."""
        settings, readout = self.settings, self.settings.readout
        loss, stats = exit_cross_entropy(
            readout.normed(exit_, exit_.reads(call)),
            readout.weight,
            self.target,
            feedback=settings.feedback,
            linear_bias=readout.bias(),
            softcap=readout.softcap,
            exit_index=exit_.index,
            return_stats=True,
        )
        self.losses.append(loss)
        self.accuracies.append(stats.is_correct.sum() / num_targets(self.target))

    def output(self) -> ExitEvaluation:
        """The result, after the last exit."""
        return ExitEvaluation(
            loss=torch.stack(self.losses),
            accuracy=torch.stack(self.accuracies),
            num_tokens=(self.target != IGNORE_INDEX).sum(),
        )


@dataclass(kw_only=True)
class LogitsStep(Step):
    """Logits at one exit; the blocks after it are not run.

    Attributes:
        positions: which positions of the hidden to take, as an index of its second dimension.
    """

    positions: slice | Tensor = field(default_factory=lambda: slice(None))
    logits: Tensor | None = None

    def at_exit(self, exit_: Exit, call: BlockCall) -> None:
        """Compute the logits at the wanted exit, nothing at the others."""
        if exit_.index == self.last_exit:
            self.logits = self.settings.readout.logits(exit_, exit_.reads(call)[:, self.positions])


def _readable(loss: Tensor) -> Tensor:
    """The same number, as a tensor whose backward says why there is none."""
    marker = torch.zeros((), device=loss.device, requires_grad=True)
    readable: Tensor = _NoBackward.apply(loss.detach(), marker)
    return readable


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, loss: Tensor, _marker: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "backward() on the loss of a model attached with backward='stream': the gradients were made "
            "during the forward and are in .grad already; drop the backward() call (scale losses beforehand "
            "with num_items= or loss_scale=), or attach with backward='deferred'"
        )
