"""One optimiser step after the other, and the state that makes them repeatable."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from localexit.feedback.draws import derive_seed
from localexit.local import LocalModel, StepInBackward
from localexit.local.sharding import is_sharded
from localexit.train.batches import BatchSampler
from localexit.train.captured import CapturedStep, check_machine, check_rule
from localexit.train.checkpoint import CheckpointError, Snapshot
from localexit.train.config import TrainConfig
from localexit.train.devices import autocast
from localexit.train.errors import NonFiniteError
from localexit.train.optim import make_optimizer, make_scheduler
from localexit.train.sharded import read_shards

# Of each exit; None for one that sat the step out.
Losses = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step measured.

    Attributes:
        step: its number, from 1.
        tokens: tokens of all steps so far.
        seconds: spent in all steps so far.
        lr: learning rate of the step.
        losses: of each exit before the step, nats/token; None for one that sat the step out.
        grad_norms: of each unit and of what they share, before clipping.
        tokens_per_second: of this step.
        skipped: why batches were left out before the one this step was made with, a line each.
    """

    step: int
    tokens: int
    seconds: float
    lr: float
    losses: Losses
    grad_norms: tuple[float, ...]
    tokens_per_second: float
    skipped: tuple[str, ...] = ()


class Trainer:
    """The training state of a run, and the step that moves it on.

    Args:
        local: the model with its exits, on its device.
        sampler: source of batches.
        config: of the run.
        precision: bf16 runs forwards under autocast.

    Attributes:
        captured: replays steps, where `cuda_graph` asks for it.
        step: optimiser steps made.
        tokens: tokens seen.
        seconds: time spent in steps.
        num_skipped: batches left out because of a NaN or an infinity.
    """

    def __init__(
        self, local: LocalModel, sampler: BatchSampler, config: TrainConfig, *, precision: torch.dtype = torch.float32
    ) -> None:
        self.local = local
        self.sampler = sampler
        self.config = config
        self.precision = precision
        self.device = local.unembedding.weight.device
        self.ranks = local.data_parallel
        self.optimizer = make_optimizer(local.parameters(), config)
        self.scheduler = make_scheduler(self.optimizer, config)
        self.in_backward = (
            StepInBackward(local, self.optimizer, max_norm=config.clip) if config.optimizer == "in_backward" else None
        )
        self.captured = self._make_captured() if config.cuda_graph else None
        self.step, self.tokens, self.seconds, self.num_skipped = 0, 0, 0.0, 0

    def train_step(self) -> StepResult:
        """Forward and backward over the micro-batches, clip unit by unit, one optimiser step.

        With `non_finite="skip"` a batch whose losses or gradients are not finite is left out for the next one.

        Raises:
            NonFiniteError: a loss or gradient norm is NaN or infinite, and the batch may not be skipped; parameters
                and optimiser are as they were, unless units are stepped in the backward.
        """
        start = time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        batches, losses, grad_norms, skipped = self._finite_gradients()
        self._apply()
        self.scheduler.step()
        num_tokens = sum(ids.numel() for ids in batches) * self._num_ranks
        duration = time.perf_counter() - start
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + num_tokens, self.seconds + duration
        return StepResult(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            lr=lr,
            losses=losses,
            grad_norms=grad_norms,
            tokens_per_second=num_tokens / duration,
            skipped=tuple(skipped),
        )

    @property
    def _num_ranks(self) -> int:
        return 1 if self.ranks is None else self.ranks.size

    def snapshot(self) -> Snapshot:
        """Everything the next step depends on; all ranks of a run make it together, and all get the same."""
        optimizer = self.optimizer.state_dict()
        return Snapshot(
            step=self.step,
            tensors={
                "model": _without_aliases(self.local.state_dict()),
                "optimizer": {f"{i}.{key}": t for i, state in optimizer["state"].items() for key, t in state.items()},
                "rng": self._rng_states(),
            },
            state={
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "skipped": self.num_skipped,
                "sampler": self.sampler.state(),
                "optimizer_groups": optimizer["param_groups"],
                "scheduler": self.scheduler.state_dict(),
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of a run with the same configuration.

        Raises:
            CheckpointError: it does not fit the configuration.
        """
        try:
            self._restore(snapshot)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().replace("\n", " ")
            raise CheckpointError(f"checkpoint step-{snapshot.step} does not fit this run: {reason}") from error

    def _finite_gradients(self) -> tuple[list[Tensor], Losses, tuple[float, ...], list[str]]:
        """The next batches with finite gradients, clipped, in `.grad`; losses and norms; why others were left out."""
        skipped: list[str] = []
        while True:
            batches = [self.sampler.next_batch().to(self.device) for _ in range(self.config.accumulate)]
            took_part = [weight > 0 for weight in self.local.step_weights()]
            measured = self._measure(batches).tolist()
            losses = tuple(loss if took else None for loss, took in zip(measured, took_part, strict=False))
            norms = tuple(measured[self.local.num_exits :])
            if all(value is None or math.isfinite(value) for value in (*losses, *norms)):
                return batches, losses, norms, skipped
            skipped.append(self._skip(torch.tensor(measured), batches))

    def _measure(self, batches: Sequence[Tensor]) -> Tensor:
        return self._gradients_and_norms(batches) if self.captured is None else self.captured.measure(batches)

    def _apply(self) -> None:
        if self.captured is None:
            self._step_and_update()
        else:
            self.captured.apply()

    def _make_captured(self) -> CapturedStep:
        # `train` asks before it reads the text; whoever makes a Trainer by hand is told here.
        check_machine(self.device, num_processes=self._num_ranks)
        check_rule(self.local.feedback)
        return CapturedStep(self._gradients_and_norms, self._step_and_update, self.optimizer, self.device)

    def _gradients_and_norms(self, batches: Sequence[Tensor]) -> Tensor:
        """Gradients in `.grad`, clipped; losses of the exits and the norms before, fp64 [2 L + 1]."""
        losses = self._gradients(batches)
        return torch.cat([losses.double(), self._clip().double()])

    def _step_and_update(self) -> None:
        """What follows from gradients that are finite."""
        if self.in_backward is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        # The mirror learns from pairs that this step's W measured, after every exit has used it.
        self.local.update()

    def _clip(self) -> Tensor:
        """Clip every unit and what they share, and give the norms; with steps in the backward this ends the step."""
        if self.in_backward is not None:
            return self.in_backward.step()
        return self.local.clip_grad_norm_(self.config.clip)

    def _gradients(self, batches: Sequence[Tensor]) -> Tensor:
        """Losses of the exits [L] over all micro-batches; their gradients are in `.grad`."""
        num_items = sum(ids[:, 1:].numel() for ids in batches) * self._num_ranks
        losses = torch.zeros(self.local.num_exits, device=self.device)
        for number, ids in enumerate(batches, start=1):
            with (
                self.local.no_sync() if number < len(batches) else nullcontext(),
                autocast(self.device, self.precision),
            ):
                output = self.local(ids, ids, num_items=num_items)
            if self.local.backward_mode == "deferred":
                output.loss.backward()
            losses += output.exit_losses
        if self.local.backward_mode == "deferred":
            self.local.average_gradients()
        return losses if self.ranks is None else self.ranks.mean(losses)

    def _skip(self, measured: Tensor, batches: Sequence[Tensor]) -> str:
        """Drop the gradients of a batch and say why; the optimiser and the rule do not get to see it."""
        self.optimizer.zero_grad()
        self.local.discard()
        losses, norms = measured[: self.local.num_exits], measured[self.local.num_exits :]
        found = (
            f"step {self.step + 1}: expected finite losses and gradients, got losses {_short(losses)} and gradient "
            f"norms {_short(norms)}"
        )
        if self.config.non_finite == "stop":
            made = "the step was not made" if self.in_backward is None else "units were stepped with them"
            raise NonFiniteError(f"{found}; {made}. {self._remedy(batches)}")
        if self.num_skipped == self.config.max_skipped:
            raise NonFiniteError(
                f"{found}; {self.num_skipped} batches were skipped before, and max_skipped={self.config.max_skipped} "
                f"allows no more. {self._remedy(batches)}"
            )
        self.num_skipped += 1
        return f"{found}; the batch was left out, {self.num_skipped} of at most {self.config.max_skipped}"

    def _remedy(self, batches: Sequence[Tensor]) -> str:
        # On a GPU a target outside the vocabulary makes the loss NaN, where looking at every step would wait for it.
        vocab_size = self.local.unembedding.weight.shape[0]
        if any(bool(((ids < 0) | (ids >= vocab_size)).any()) for ids in batches):
            return f"The batch has token ids outside 0..{vocab_size - 1}: check the tokenizer against the model"
        return "Try a lower lr, a longer warm-up or fp32"

    def _restore(self, snapshot: Snapshot) -> None:
        state, tensors = snapshot.state, snapshot.tensors
        if snapshot.shards is not None:
            own = _without_aliases(self.local.state_dict())
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            tensors = {**tensors, **read_shards(snapshot.shards, own, parameters)}
        _load(self.local, tensors["model"])
        groups = [{**group, "betas": tuple(group["betas"])} for group in state["optimizer_groups"]]
        self.optimizer.load_state_dict({"state": _by_index(tensors["optimizer"]), "param_groups": groups})
        self.scheduler.load_state_dict(state["scheduler"])
        self.sampler.restore(state["sampler"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        # Runs of the first version stopped instead.
        self.num_skipped = state.get("skipped", 0)
        self._restore_rng(tensors["rng"])
        if self.captured is not None:
            self.captured.forget()

    def _rng_states(self) -> dict[str, Tensor]:
        """The generators of every rank; what is a rank's own has its number behind the name, but for the first's."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.ranks is None:
            return states
        gathered = {name: self.ranks.gather(state.to(self.device)[None]).cpu() for name, state in states.items()}
        return {_of_rank(name, rank): row for name, rows in gathered.items() for rank, row in enumerate(rows)}

    def _restore_rng(self, states: Mapping[str, Tensor]) -> None:
        rank = 0 if self.ranks is None else self.ranks.rank
        if _of_rank("cpu", rank) not in states:
            # Fewer ranks saved it.
            torch.manual_seed(derive_seed(self.config.seed, f"{rank}/{self.step}"))
            return
        torch.set_rng_state(states[_of_rank("cpu", rank)])
        if self.device.type == "cuda" and _of_rank("cuda", rank) in states:
            torch.cuda.set_rng_state(states[_of_rank("cuda", rank)], self.device)


def _of_rank(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One name for each tensor: tied weights are saved once."""
    seen: dict[tuple[int, int], str] = {}
    for name, tensor in tensors.items():
        # An empty tensor has no storage to tell it by, and a sharded one shares its with no other.
        address = 0 if is_sharded(tensor) else tensor.data_ptr()
        seen.setdefault((address or -len(seen) - 1, tensor.numel()), name)
    return {name: tensors[name] for name in seen.values()}


def _load(local: LocalModel, tensors: Mapping[str, Tensor]) -> None:
    expected = _without_aliases(local.state_dict())
    if set(expected) != set(tensors):
        odd = ", ".join(sorted(set(expected) ^ set(tensors))[:3])
        raise ValueError(f"it has other parameters than the model ({odd}, …)")
    local.load_state_dict(tensors, strict=False)


def _by_index(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = tensor
    return states


def _short(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"
