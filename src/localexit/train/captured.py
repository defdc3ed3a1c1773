"""The work of a training step, recorded once in CUDA graphs and replayed from then on.

A step of a small model is hundreds of kernels of some microseconds, and the host takes longer to launch each. A graph
launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from localexit.feedback.base import Feedback
from localexit.train.errors import RunFailedError
from localexit.train.masks import masks_left_to_attention, one_sequence_a_row

# What compiles, chooses its kernels or makes its state does so in the first steps.
NUM_EAGER_STEPS = 3

Measure = Callable[[Sequence[Tensor]], Tensor]


class CapturedStep:
    """Both halves of a training step, between which the host looks at what was measured.

    The first steps run as they are, on the stream that records afterwards. From then on a step is two graphs: batches
    of the same shape go in, and everything on the device happens as it did when it was recorded. What the host counts
    does not: a rule must say that its `update()` is the same in every step (`Feedback.is_update_fixed`).

    Args:
        measure: losses and gradients of some batches, as one tensor; without a copy to the host.
        apply: the optimiser's step and the rule's update from what `measure` has left; likewise.
        optimizer: its learning rates may change from step to step.
        device: the GPU.
    """

    def __init__(
        self, measure: Measure, apply: Callable[[], None], optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._measure, self._apply, self._optimizer = measure, apply, optimizer
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._stream = torch.cuda.Stream(device)
        self._num_eager_steps = 0
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        self._batches: list[Tensor] = []
        self._measured: Tensor | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed by now."""
        return self._graphs is not None

    def forget(self) -> None:
        """Begin anew: what was recorded reads and writes tensors that were replaced, those of the optimiser for one."""
        self._num_eager_steps, self._graphs, self._measured = 0, None, None

    def measure(self, batches: Sequence[Tensor]) -> Tensor:
        """Gradients of these batches, and what is measured with them; overwritten by the next call.

        Raises:
            RunFailedError: the step cannot be recorded.
            ValueError: batches of another shape than those that were recorded.
        """
        if self._graphs is None and self._num_eager_steps < NUM_EAGER_STEPS:
            with self._on_stream(), one_sequence_a_row():
                return self._measure(batches)
        if self._graphs is None:
            self._graphs = self._recorded(batches)
        for fixed, batch in zip(self._batches, batches, strict=True):
            if fixed.shape != batch.shape:
                raise ValueError(
                    f"cuda_graph: expected batches of the shape that was recorded, {list(fixed.shape)}, got "
                    f"{list(batch.shape)}; give all the same shape"
                )
            fixed.copy_(batch)
        self._graphs[0].replay()
        assert self._measured is not None, "it was recorded"
        return self._measured

    def apply(self) -> None:
        """Step the optimiser and update the rule from the gradients of the last `measure`."""
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self._graphs is not None:
            self._graphs[1].replay()
            return
        with self._on_stream(), self._rates_on_device():
            self._apply()
        self._num_eager_steps += 1

    def _recorded(self, batches: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        self._batches = [batch.clone() for batch in batches]
        measuring, applying = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            with masks_left_to_attention(), torch.cuda.graph(measuring, stream=self._stream):
                self._measured = self._measure(self._batches)
            # Gradients and pairs live from one graph to the other: in one pool nothing else takes their place.
            with (
                self._rates_on_device(is_recording=True),
                torch.cuda.graph(applying, pool=measuring.pool(), stream=self._stream),
            ):
                self._apply()
        except RuntimeError as error:
            cause = first_cause(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).strip().partition("\n")[0]
            raise RunFailedError(
                f"cuda_graph: expected a step without copies to the host, whose kernels are the same in every step, "
                f"got a model or rule that cannot be recorded ({reason}); go on without it: --resume --no-cuda-graph"
            ) from error
        return measuring, applying

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """On the recording stream, in order with what is before and after."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    @contextmanager
    def _rates_on_device(self, *, is_recording: bool = False) -> Iterator[None]:
        """The optimiser reads its learning rates where a graph can; the schedule and checkpoints have plain numbers."""
        groups = self._optimizer.param_groups
        before = [{key: group[key] for key in ("lr", "capturable")} for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(lr=rate, capturable=is_recording)
        try:
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)


def check_machine(device: torch.device, *, num_processes: int) -> None:
    """Refuse to record steps where they cannot be.

    Raises:
        ValueError: not on a GPU, or several processes share a batch.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a CUDA device, got {str(device)!r}; pass --no-cuda-graph")
    if num_processes > 1:
        raise ValueError(
            f"cuda_graph: expected one process, got {num_processes} that share a batch; start one, or pass "
            f"--no-cuda-graph"
        )


def check_rule(feedback: Feedback) -> None:
    """Refuse a rule that a replayed `update()` would make another of.

    Raises:
        ValueError: its update differs from step to step.
    """
    if not feedback.is_update_fixed:
        raise ValueError(
            f"cuda_graph: expected a rule whose update is the same in every step, got {feedback.name!r} with storage "
            f"bf16 or update_every; leave these options out, or pass --no-cuda-graph"
        )


def first_cause(error: BaseException) -> BaseException:
    """The first of the RuntimeErrors that led to this one: a recording that is broken raises another when it ends."""
    cause = error
    while error.__context__ is not None:
        error = error.__context__
        if isinstance(error, RuntimeError):
            cause = error
    return cause
