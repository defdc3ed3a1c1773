"""The attached model: a forward that trains it unit by unit, and what else its exits are good for."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from localexit import _checks
from localexit.exits.ranks import DataParallel, VocabParallel
from localexit.local.average import GradientAverage, averaged_here
from localexit.local.batch import Batch, num_targets, shifted, shifted_weight
from localexit.local.controls import DirectStep, JointStep
from localexit.local.discover import Anatomy
from localexit.local.exits import Exit
from localexit.local.hooks import BlockHooks
from localexit.local.parts import Parts
from localexit.local.predict import ExitPredictions, HiddenStep, PredictionStep, UnitStates
from localexit.local.schedule import ExitSchedule, checked_weights
from localexit.local.sharding import clip_grad_norm_, sharded_modules
from localexit.local.steps import (
    DeferredStep,
    EvaluationStep,
    ExitEvaluation,
    LocalOutput,
    LogitsStep,
    LossSettings,
    Step,
    StreamStep,
    TrainingStep,
)
from localexit.local.trace import accepts, cache_argument, eval_mode
from localexit.local.units import Unit

if TYPE_CHECKING:
    from localexit.local.in_backward import StepInBackward

# Arguments of a training forward that the model itself does not get; the third is the name `transformers` uses.
OURS = ("labels", "num_items", "num_items_in_batch", "token_weight", "loss_scale")


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """The arguments of one training forward, ours taken out.

    Attributes:
        labels: [B, T].
        num_items: normaliser of the loss, or None for the number of labels that count.
        token_weight: [B, T] like labels, or None.
        loss_scale: factor of the gradients in stream mode, or None.
        args, kwargs: what the model's own forward gets.
    """

    labels: Tensor
    num_items: Tensor | int | None
    token_weight: Tensor | None
    loss_scale: Tensor | float | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def take(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> TrainingInputs | None:
        """Split the arguments of a call of the model's forward; None when there are no labels."""
        if args and kwargs.get("labels") is None:
            # Labels given by position must not be missed: the model would silently train end to end.
            bound = inspect.signature(forward).bind_partial(*args, **{k: v for k, v in kwargs.items() if k not in OURS})
            if bound.arguments.get("labels") is not None:
                ours = {key: value for key, value in kwargs.items() if key in OURS}
                labels, bound.arguments["labels"] = bound.arguments["labels"], None
                args, kwargs = bound.args, {**bound.kwargs, **ours, "labels": labels}
        if kwargs.get("labels") is None:
            return None
        num_items = kwargs.get("num_items")
        return cls(
            labels=kwargs["labels"],
            num_items=kwargs.get("num_items_in_batch") if num_items is None else num_items,
            token_weight=kwargs.get("token_weight"),
            loss_scale=kwargs.get("loss_scale"),
            args=args,
            kwargs={key: value for key, value in kwargs.items() if key not in OURS},
        )


_STEPS: dict[str, type[StreamStep]] = {"stream": StreamStep, "joint": JointStep, "direct": DirectStep}


class LocalModel(nn.Module):
    """A model whose units each learn from their own exit's loss; made by `localexit.attach`.

    In training mode with gradients enabled and `labels` given, a forward computes the exits' losses instead of the
    model's own logits and loss: through this object, and through the model itself alike. In every other case (eval,
    no_grad, inference_mode, generate(), no labels) the model computes what it always did, bitwise; a backward from its
    own loss in eval mode, which is end-to-end backprop, warns.

    `parameters()` and `state_dict()` hold everything: the model, exit norms of their own, the feedback's state.

    Attributes:
        model: the model.
        exit_norms: the exits' norms that are not part of the model.
        exit_bodies: what the exits have of their own in front of their norms.
        feedback: the rule that all exits share.
        anatomy: the parts of the model that attach() found.
        units: what learns together, first to last; unit i ends in exit i.
        exits: the exits, first to last.
        exit_norm: the name given to `attach`; None when it was a module.
        exit_body: the name given to `attach`.
        blocks: the model's blocks, first to last.
        backward_mode: "deferred" or "stream"; "joint" or "direct" for the controls that are not local.
        in_backward: what steps each unit after its backward, a `StepInBackward`, or None.
        rows_since_update: tokens of the optimiser step so far, on all ranks; part of what a forward's draws depend on.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        anatomy: Anatomy,
        units: tuple[Unit, ...],
        shared: tuple[nn.Parameter, ...],
        exits: tuple[Exit, ...],
        exit_norms: nn.ModuleList,
        exit_bodies: nn.ModuleList,
        exit_norm: str | None,
        exit_body: str,
        settings: LossSettings,
        backward_mode: str,
        exit_weights: Sequence[float] | None,
        schedule: ExitSchedule,
    ) -> None:
        super().__init__()
        self.model = model
        self.exit_norms = exit_norms
        self.exit_bodies = exit_bodies
        self.feedback = settings.feedback
        self.anatomy = anatomy
        self.units = units
        self.exits = exits
        self.exit_norm = exit_norm
        self.exit_body = exit_body
        self.backward_mode = backward_mode
        self.exit_weights = (1.0,) * len(exits) if exit_weights is None else exit_weights
        self.blocks = anatomy.blocks
        self.schedule = schedule
        self.in_backward: StepInBackward | None = None
        self._shared = shared
        self._settings = settings
        self._checkpointing = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        after_blocks = (*anatomy.tail, anatomy.unembedding)[0]
        self._hooks: BlockHooks | None = BlockHooks(
            model,
            anatomy.blocks,
            after_blocks,
            units,
            exits,
            Parts(model, (*anatomy.blocks, *anatomy.tail, anatomy.unembedding), anatomy.unembedding),
            () if anatomy.routers is None else anatomy.routers.places,
        )
        self._replaced_forward = model.__dict__.get("forward")
        self._original_forward = model.forward
        # Not traced, so that the error is the caller's and not one that the compiler catches to go on without it.
        self._refuse_compilation = torch.compiler.disable(_refuse_compilation)
        self._takes = frozenset(name for name in ("use_cache", "output_router_logits") if accepts(model, name))
        # Tokens since the last update(): draws belong to (seed, step, exit, row), and the next forward's rows follow.
        self.rows_since_update = 0
        self._is_synced = True
        self._averaged = averaged_here(model, units, shared)
        # What DDP must not overwrite with rank 0's at every forward: each rank's rule keeps its own.
        self._ddp_params_and_buffers_to_ignore = [f"feedback.{name}" for name, _ in self.feedback.named_buffers()]
        # A partial can carry the signature of what it replaces (Trainer reads it), a bound method cannot.
        self._new_forward = functools.wraps(model.forward)(functools.partial(self._model_forward))
        model.__dict__["forward"] = self._new_forward

    @property
    def num_exits(self) -> int:
        """How many exits there are; as many as units."""
        return len(self.exits)

    @property
    def data_parallel(self) -> DataParallel | None:
        """The ranks that share each batch, if there are several."""
        return self._settings.data_parallel

    @property
    def vocab_parallel(self) -> VocabParallel | None:
        """The ranks that share the unembedding, if it is spread over several."""
        return self._settings.vocab_parallel

    def refuse_vocab_parallel(self, what: str) -> None:
        """For what needs the unembedding, or the rule, whole on this rank.

        Raises:
            ValueError: they are spread over ranks.
        """
        if self.vocab_parallel is not None:
            raise ValueError(
                f"{what} is not there for an unembedding that is spread over ranks; load the whole parameters into a "
                f"model of one process, and attach that"
            )

    @property
    def unembedding(self) -> nn.Linear:
        """The model's unembedding, with `weight` [V, D]."""
        return self._settings.readout.unembedding

    @property
    def loss_settings(self) -> LossSettings:
        """What the exits' loss is made of."""
        return self._settings

    @property
    def exit_weights(self) -> tuple[float, ...]:
        """What each exit's loss counts in the sum; may be set between steps (a warm-up, for one)."""
        return self._exit_weights

    @exit_weights.setter
    def exit_weights(self, weights: Sequence[float]) -> None:
        self._exit_weights = checked_weights(weights, self.num_exits)

    @property
    def is_sharded(self) -> bool:
        """Whether `fully_shard` has spread some of the model over ranks."""
        return bool(sharded_modules(self.model))

    @property
    def schedule(self) -> ExitSchedule:
        """What exits do from step to step; may be set between steps."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: ExitSchedule) -> None:
        if not isinstance(schedule, ExitSchedule):
            raise TypeError(f"schedule must be a localexit.ExitSchedule, got {type(schedule).__name__}; build one")
        schedule.check(self.num_exits)
        self._schedule = schedule

    def step_weights(self) -> tuple[float, ...]:
        """What each exit's loss counts in this optimiser step, by the schedule; 0 where it sits the step out."""
        if not self.schedule.depends_on_step:
            return self.exit_weights
        # Waits for the device: which blocks run is decided on the host.
        return self.schedule.weights(self.exit_weights, seed=self.feedback.seed, step=int(self.feedback.step))

    def exit_position(self, exit_index: int) -> int:
        """The position 0..L-1 of an exit that may be counted from the last.

        Raises:
            ValueError: there is no such exit.
            TypeError: not an integer.
        """
        _checks.integer("exit", exit_index)
        if not -self.num_exits <= exit_index < self.num_exits:
            raise ValueError(f"exit must be in {-self.num_exits}..{self.num_exits - 1}, got {exit_index}")
        return exit_index % self.num_exits

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that several units' losses reach: unembedding, a shared exit norm, weights blocks share."""
        return list(self._shared)

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_items: Tensor | int | None = None,
        token_weight: Tensor | None = None,
        loss_scale: Tensor | float | None = None,
        **inputs: Any,
    ) -> Any:
        """One training forward in training mode with labels; the model's own forward otherwise.

        Args:
            input_ids: int64 [B, T], the first argument of the model's forward.
            labels: int64 [B, T], token ids like the input's, -100 where nothing is to be learned. The token at t + 1 is
                predicted at t: the shift is made here.
            num_items: what the summed loss is divided by; by default the number of labels that count. Give the number
                of a whole batch when it is made of several forwards; with `data_parallel` that of all ranks together.
            token_weight: floating point [B, T], negative allowed: what the loss of predicting each label is multiplied
                by; shifted with the labels. The normaliser stays the number of labels, whatever the weights.
            loss_scale: factor of the gradients, for GradScaler; "stream" only.
            inputs: the model's other inputs.

        Returns:
            `LocalOutput` for a training forward, else what the model returns.

        Raises:
            ValueError: labels that do not fit, or labels outside of training for a model that does not take any.
        """
        ours = {"labels": labels, "num_items": num_items, "token_weight": token_weight, "loss_scale": loss_scale}
        given = {name: value for name, value in ours.items() if value is not None}
        is_training = self.model.training and torch.is_grad_enabled()
        if labels is not None and not is_training and not accepts(self.model, "labels"):
            raise ValueError(
                "labels given outside of training (eval mode, or gradients are disabled), but the model's "
                "own forward takes none; use evaluate(input_ids, labels) for the loss of every exit"
            )
        if not (labels is not None and is_training) and given.keys() - {"labels"}:
            names = " and ".join(sorted(given.keys() - {"labels"}))
            raise ValueError(
                f"{names} given, but this is no training forward: that takes labels, training mode and gradients; "
                f"leave {names} out, or call train() and pass labels"
            )
        return self.model(*_positional(input_ids), **given, **inputs)

    def run(self, step: Step, input_ids: Tensor | None, **inputs: Any) -> None:
        """One forward in eval mode, up to the step's last exit, with `step` to be told every exit's hidden.

        What measurements are made of; gradients are computed as the caller has them enabled or not.

        Args:
            step: what is done at the exits.
            input_ids: int64 [B, T].
            inputs: the model's other inputs.
        """
        with eval_mode(self), self._running_hooks().running(step):
            self.model(*_positional(input_ids), **self._without_extras(inputs))

    def evaluate(self, input_ids: Tensor | None, labels: Tensor, **inputs: Any) -> ExitEvaluation:
        """Loss and accuracy of every exit on one batch, in eval mode, without gradients and without [B, T, V] logits.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T], as in training.
            inputs: the model's other inputs.
        """
        step = EvaluationStep(settings=self._settings, last_exit=self.num_exits - 1, target=shifted(labels))
        with torch.no_grad():
            self.run(step, input_ids, **inputs)
        return step.output()

    def predictions(self, input_ids: Tensor | None, labels: Tensor, **inputs: Any) -> ExitPredictions:
        """What every exit predicts on one batch, token by token, in eval mode and without gradients.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T], as in training.
            inputs: the model's other inputs.
        """
        step = PredictionStep(settings=self._settings, last_exit=self.num_exits - 1, target=shifted(labels))
        with torch.no_grad(), eval_mode(self), self._running_hooks().running(step):
            self.model(*_positional(input_ids), **self._without_extras(inputs))
        return step.output()

    @torch.no_grad()
    def run_units(
        self,
        first: int,
        last: int,
        /,
        input_ids: Tensor,
        *,
        hidden: Tensor | None = None,
        reading: Collection[int] | None = None,
        **inputs: Any,
    ) -> UnitStates:
        """Hidden states after unit `last`; of the blocks only those of the units `first` to `last` are run.

        Positions, masks and whatever else the model gives its blocks, it makes from the token ids and from `inputs`,
        as in any forward. With a cache in `inputs`, the units' blocks see and fill their own part of it. A model whose
        blocks pass more than their hidden to later units cannot be run like this; whether this one does must be tried
        (`localexit.inference.decoder.check_catching_up` does).

        Args:
            first: the first unit to run.
            last: the last one.
            input_ids: int64 [B, T].
            hidden: [B, T, D'], the hidden states of these tokens after unit `first - 1`; None for `first` 0.
            reading: the exits that read these tokens; None for the one at unit `last`. With a cache, an exit that has a
                block of its own must read every token that its unit reads, or none.
            inputs: the model's other inputs.

        Returns:
            The hidden states for the units after `last`, and what the exit there reads, for `logits_from`.

        Raises:
            ValueError: the blocks before unit `first` have not run yet.
        """
        hooks = self._running_hooks()
        num_skipped = self.units[first].block_indices[0]
        step = HiddenStep(settings=self._settings, last_exit=last, reading=(last,) if reading is None else reading)
        with hooks.running(step), hooks.skipping(num_skipped, input_ids if hidden is None else hidden):
            self.model(input_ids, **inputs)
        assert step.states is not None, "the forward ended at the wanted exit"
        return step.states

    def train_units(
        self,
        first: int,
        last: int,
        /,
        input_ids: Tensor,
        labels: Tensor,
        *,
        num_items: Tensor | int,
        hidden: Tensor | None = None,
        send: Callable[[Tensor], None] | None = None,
    ) -> LocalOutput:
        """A training forward through the units `first` to `last` only: those of one stage of a pipeline.

        Args:
            first: the first unit to train.
            last: the last one.
            input_ids: int64 [B, T].
            labels: int64 [B, T].
            num_items: what the summed losses are divided by.
            hidden: [B, T, D'], the hidden states of these tokens after unit `first - 1`; None for `first` 0.
            send: called with the hidden states after unit `last`, as soon as they are there.

        Returns:
            As a training forward does, NaN for the exits of other units.

        Raises:
            ValueError: the model is not attached with backward="stream", or the blocks before unit `first` cannot be
                left out.
        """
        if self.backward_mode != "stream":
            raise ValueError(
                f"some units are trained by themselves with backward='stream' only, got {self.backward_mode!r}; attach "
                f"with that"
            )
        step = self._training_step(
            TrainingInputs(
                labels=labels, num_items=num_items, token_weight=None, loss_scale=None, args=(input_ids,), kwargs={}
            )
        )
        assert isinstance(step, StreamStep), "what backward='stream' makes"
        step = replace(step, last_exit=last, send=send)
        hooks, num_skipped = self._running_hooks(), self.units[first].block_indices[0]
        self.feedback.train()
        with hooks.running(step), hooks.skipping(num_skipped, input_ids if hidden is None else hidden):
            self._original_forward(input_ids, **self._without_extras({}))
        return step.output()

    @torch.no_grad()
    def logits_from(self, exit_index: int, hidden: Tensor) -> Tensor:
        """Logits [..., V] of one exit from what it reads [..., D']."""
        return self._settings.readout.logits(self.exits[exit_index], hidden)

    @torch.no_grad()
    def exit_logits(
        self, exit_index: int, /, input_ids: Tensor | None = None, *, logits_to_keep: int = 0, **inputs: Any
    ) -> Tensor:
        """Logits at one exit, without gradients; the blocks after it are not run.

        With `past_key_values=` (an object of `transformers`, whose models call it `cache` from 5.24 on) and
        `use_cache=True` the blocks up to the exit update their part of the cache; a cache belongs to one exit, and one
        with a block of its own takes none.

        Args:
            exit_index: which exit; negative ones count from the last.
            input_ids: int64 [B, T].
            logits_to_keep: only the last this many positions; 0 for all.
            inputs: the model's other inputs.

        Returns:
            [B, T, V], or [B, logits_to_keep, V]; at the last exit bitwise what the model returns.

        Raises:
            ValueError: there is no such exit, use_cache without a cache to fill, or a cache without room for a block of
                the exit's own.
        """
        last_exit = self.exit_position(exit_index)
        if inputs.get("use_cache"):
            name = cache_argument(self.model) or "past_key_values"
            if inputs.get(name) is None and inputs.get("past_key_values") is None:
                raise ValueError(f"use_cache=True needs {name}=, the cache to fill: only logits are returned")
        if self.exits[last_exit].block is not None and "use_cache" in self._takes:
            # A cache that the model makes by itself would have the block's keys where those of its copy belong.
            inputs.setdefault("use_cache", False)
        step = LogitsStep(
            settings=self._settings,
            last_exit=last_exit,
            positions=slice(-logits_to_keep, None) if logits_to_keep else slice(None),
        )
        with self._running_hooks().running(step):
            self.model(*_positional(input_ids), **inputs)
        assert step.logits is not None, "the forward ended at the wanted exit"
        return step.logits

    def update(self) -> None:
        """Call once per optimiser step, after its forwards: the feedback's own learning and its draws' counter.

        Micro-batches of a step count as one batch: the mirror learns from the pairs that it would have chosen there.
        """
        self.rows_since_update = 0
        self.feedback.update()

    def discard(self) -> None:
        """Call instead of `update()` when a batch is left out: the rule neither learns from it nor counts it."""
        self.rows_since_update = 0
        self.feedback.discard()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forwards inside leave the gradients of this rank as they are, for the first micro-batches of a step.

        The forward after it averages over ranks what has been accumulated. Without this every forward does so, which
        gives the same gradients with more communication. Blocks wrapped in DDP or FSDP have a switch of their own.
        """
        before, self._is_synced = self._is_synced, False
        try:
            yield
        finally:
            self._is_synced = before

    def average_gradients(self) -> None:
        """Replace gradients by their means over ranks, as a forward does with backward="stream".

        For "deferred", after the last backward of a step, where no DDP around this object does it. Parameters in blocks
        that are wrapped in DDP or FSDP are left to them.
        """
        average = self._gradient_average()
        if average is not None:
            average.finish()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradient of every unit by itself, and of what units share as one more group.

        One norm over all parameters would be communication between units: a large gradient in one would shrink the
        step of all others.

        Args:
            max_norm: largest norm allowed, for each group; infinity does not clip.

        Returns:
            [num_units + 1], the norms before clipping; the shared parameters' last.

        Raises:
            ValueError: `max_norm` is not a positive number.
        """
        groups = [*(unit.parameters() for unit in self.units), self.shared_parameters()]
        device = self.unembedding.weight.device
        norms = [clip_grad_norm_(group, max_norm, device=device) for group in groups]
        return torch.stack([norm.to(device) for norm in norms])

    def remove(self) -> None:
        """Take everything off the model again: hooks, and the training forward. What it learned stays."""
        if self._hooks is None:
            return
        self._hooks.remove()
        self._hooks = None
        # Whoever wrapped the forward after us keeps the wrapper; without hooks ours only passes the call on.
        if self.model.__dict__.get("forward") is self._new_forward:
            del self.model.__dict__["forward"]
            if self._replaced_forward is not None:
                self.model.__dict__["forward"] = self._replaced_forward

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's forward is while this object is attached."""
        if self._hooks is None or not torch.is_grad_enabled():
            return self._original_forward(*args, **kwargs)
        if not self.model.training:
            return _watched(self._original_forward(*args, **kwargs))
        inputs = TrainingInputs.take(self._original_forward, args, kwargs)
        if inputs is None:
            return self._original_forward(*args, **kwargs)
        if self.backward_mode != "deferred":
            self._refuse_compilation(self.backward_mode, torch.compiler.is_dynamo_compiling())
        self._refuse_unsupported(inputs)
        # Whoever switches the model to training means its feedback as well.
        self.feedback.train()
        step = self._training_step(inputs)
        with self._hooks.running(step):
            self._original_forward(*inputs.args, **self._without_extras(inputs.kwargs))
        return step.output()

    def _training_step(self, inputs: TrainingInputs) -> TrainingStep:
        target = shifted(inputs.labels)
        weights = self.step_weights()
        has_router_loss = inputs.kwargs.get("output_router_logits", True)
        batch = Batch(
            target=target,
            num_items=num_targets(target, self.data_parallel) if inputs.num_items is None else inputs.num_items,
            token_weight=None if inputs.token_weight is None else shifted_weight(inputs.token_weight, inputs.labels),
            weights=weights,
            token_share=self.schedule.token_share,
            first_row=self._count_rows(target),
            routers=self.anatomy.routers if has_router_loss else None,
            router_mask=_token_mask(inputs.kwargs.get("attention_mask"), target),
        )
        last_exit = max(index for index, weight in enumerate(weights) if weight > 0)
        if self.backward_mode == "deferred":
            return DeferredStep(settings=self._settings, last_exit=last_exit, batch=batch)
        loss_scale = 1.0 if inputs.loss_scale is None else inputs.loss_scale
        if self.in_backward is not None:
            self.in_backward.begin()
        return _STEPS[self.backward_mode](
            settings=self._settings,
            last_exit=last_exit,
            batch=batch,
            loss_scale=loss_scale,
            average=self._gradient_average() if self._is_synced else None,
            after_unit=None if self.in_backward is None else self.in_backward.step_unit,
        )

    def _count_rows(self, target: Tensor) -> int:
        """Number of the first token of this forward among those since the last `update()`."""
        ranks = self.data_parallel
        num_rows, rank, size = target.numel(), *((0, 1) if ranks is None else (ranks.rank, ranks.size))
        first_row = self.rows_since_update + rank * num_rows
        self.rows_since_update += size * num_rows
        return first_row

    def _gradient_average(self) -> GradientAverage | None:
        return None if self.data_parallel is None else GradientAverage(self.data_parallel, *self._averaged)

    def _refuse_unsupported(self, inputs: TrainingInputs) -> None:
        if inputs.loss_scale is not None and self.in_backward is not None:
            raise ValueError(
                "loss_scale with steps in the backward: units are stepped before the gradients can be scaled back; "
                "train in bf16 or fp32, or use an ordinary optimiser"
            )
        if self.backward_mode != "deferred" and DistributedDataParallel._active_ddp_module is not None:
            raise ValueError(
                f"this model is attached with backward={self.backward_mode!r} and wrapped in one "
                f"DistributedDataParallel, which waits for a backward() that never comes: ranks would train apart. "
                f"Pass data_parallel=localexit.DataParallel() to attach() and drop the wrapper, or attach with "
                f"backward='deferred'"
            )
        if inputs.loss_scale is not None and self.backward_mode == "deferred":
            raise ValueError(
                "loss_scale is for backward='stream'; with 'deferred' the loss has its graph: multiply it "
                "before backward()"
            )
        if any(module.gradient_checkpointing for module in self._checkpointing):
            raise ValueError(
                "gradient (activation) checkpointing is enabled; call "
                "model.gradient_checkpointing_disable(): attached with backward='stream' every unit frees "
                "its activations before the next one starts, and recomputation would only cost time"
            )
        if inputs.kwargs.get("output_router_logits") and self.anatomy.routers is None:
            raise ValueError(
                "output_router_logits asks for the routers' auxiliary loss, and attach() found no routers; set "
                "config.output_router_logits=True before attach(), so that it looks for them and verifies the loss"
            )

    def _without_extras(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keys, values and router logits that a model collects would keep every unit's activations alive."""
        extras = {"use_cache": False, **inputs, "output_router_logits": False}
        return {name: value for name, value in extras.items() if name in inputs or name in self._takes}

    def _running_hooks(self) -> BlockHooks:
        if self._hooks is None:
            raise RuntimeError("this LocalModel was removed from its model; attach again")
        return self._hooks


def check_attached(local: object) -> None:
    """For what takes an attached model.

    Raises:
        TypeError: it is something else: the model itself, for one, or a wrapper around it.
    """
    if not isinstance(local, LocalModel):
        raise TypeError(f"local must be the LocalModel that attach() returned, got {type(local).__name__}; pass that")


def _watched(output: Any) -> Any:
    """A model's output in eval mode; a backward from its loss is not what somebody meant who attached exits."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad and not torch.compiler.is_compiling():
        loss.register_hook(_warn_of_backprop)
    return output


def _warn_of_backprop(_grad: Tensor) -> None:
    warnings.warn(
        "a backward from the model's own loss, computed in eval mode: that is end-to-end backprop, and no exit learns "
        "from it; call train() before the forward (from_pretrained leaves a model in eval mode)",
        stacklevel=2,
    )


def _refuse_compilation(backward_mode: str, is_compiled: bool) -> None:
    if is_compiled:
        raise ValueError(
            f"this model is attached with backward={backward_mode!r} and compiled as a whole (torch.compile around the "
            f"model, or around a function that calls it): backwards run inside of its forward, and the graph would "
            f"break at every block. Compile the blocks one by one after attach(): localexit.compile_units(local)"
        )


def _positional(input_ids: Tensor | None) -> tuple[Tensor, ...]:
    return () if input_ids is None else (input_ids,)


def _token_mask(attention_mask: Tensor | None, target: Tensor) -> Tensor | None:
    """The mask of padding among a model's inputs; a mask of another form says nothing about single tokens."""
    is_one_a_token = attention_mask is not None and attention_mask.shape == target.shape
    return attention_mask if is_one_a_token else None
