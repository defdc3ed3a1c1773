"""Feedback through the rows of a [V, D] matrix: of a mirror learned from forward pairs, or of W itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from localexit import _checks
from localexit.feedback.base import Anchors, Error, Tokens, joined
from localexit.feedback.draws import HAS_TRITON, UNCOUNTED
from localexit.feedback.products import TERM_BYTES, fitting, left_terms, right_terms
from localexit.feedback.ridge import Apart, apart_from_mean, ridge_rows
from localexit.feedback.rounding import round_stochastically, rounding_generator, rounding_seed
from localexit.feedback.sampling import SAMPLING_OPTIONS, Sampling

Storage = Literal["fp32", "bf16"]
_DTYPES: dict[Storage, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes of the mirror, in the dtype it is solved in, that an update works on at a time.
_UPDATE_BYTES = 256 * 2**20


def runs_kernel(rows: Tensor) -> bool:
    """Whether a mirror's residual is one kernel: bf16 or fp32 on a GPU that multiplies bf16, and Triton installed."""
    if not (rows.is_cuda and HAS_TRITON and rows.dtype in _DTYPES.values()):
        return False
    return torch.cuda.get_device_properties(rows.device).major >= 8


class Rows(Sampling):
    """f = e · rows, whole or sampled."""

    options: ClassVar = SAMPLING_OPTIONS
    rows: Tensor

    def prepare(self, anchors: Anchors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        # Few rows are gathered: converting all of them would cost more.
        return (self.rows if self.sampled else self.rows.to(dtype),)

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        return self._times(error, tokens, *prepared)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Forward pairs of one exit and optimiser step, what a mirror learns from.

    Attributes:
        hidden: [P, D]; zero on rows that do not count.
        logits: [P, V] raw forward logits without the bias; zero on the same rows.
        keys: int64 [P], ascending, the tokens' keys in the step's random order (`draws.choice_keys`).
    """

    hidden: Tensor
    logits: Tensor
    keys: Tensor

    @property
    def is_counted(self) -> Tensor:
        """Bool [P], False where there was no token that counts."""
        return self.keys < UNCOUNTED

    def merged(self, earlier: Pairs, num: int) -> Pairs:
        """The `num` pairs of both with the smallest keys: those of all their tokens taken together.

        A token that is in both (its forward was recomputed) counts once, with what was measured here.
        """
        keys, order = torch.cat([self.keys, earlier.keys]).sort(stable=True)
        is_again = torch.zeros_like(keys, dtype=torch.bool)
        is_again[1:] = keys[1:] == keys[:-1]
        keys, first = torch.where(is_again, torch.iinfo(keys.dtype).max, keys).topk(min(num, len(keys)), largest=False)
        rows, is_counted = order[first], keys < UNCOUNTED

        def chosen(ours: Tensor, others: Tensor) -> Tensor:
            return torch.where(is_counted[:, None], torch.cat([ours, others])[rows], 0)

        return Pairs(hidden=chosen(self.hidden, earlier.hidden), logits=chosen(self.logits, earlier.logits), keys=keys)


def _parts(rows: Tensor, logits: Sequence[Tensor], size: int) -> Iterable[tuple[Tensor, Sequence[Tensor]]]:
    """So many tokens of the vocabulary after the other: their rows, and each exit's logits of them."""
    of_parts = zip(*(of_exit.split(size, dim=1) for of_exit in logits), strict=True)
    return zip(rows.split(size), of_parts, strict=True)


class WeightMirror(Rows):
    """f = e B with B [V, D] learned from forward pairs (h, z - b) only; eq. (11), sampled: eq. (12).

    B starts at zero and is corrected once per optimiser step by `update()`, from tokens that the step's exits
    collected, after every exit has used it. W is never read: a pair says what W did to one hidden state.
    Prior art: weight mirrors (Akrout et al. 2019), weight estimation (Kunin et al. 2020), Kolen and Pollack (1994).

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        sampled: gather few rows of B instead of multiplying with all of them.
        num_pairs: tokens an exit contributes to a step's update.
        update_every: learn in the first of every this many steps.
        ridge: λ of the update relative to the mean diagonal of H_M H_Mᵀ.
        storage: "fp32", or "bf16" for half the state; what is learned is rounded stochastically, so that corrections
            smaller than a step of bf16 are not lost.
        topk: kept exactly besides gold (sampled only).
        num_draws: tail tokens drawn (sampled only).
        seed: seed of the choice of pairs and of the draws; None draws one from torch's default generator.

    Raises:
        ValueError: an option is out of range.
    """

    codes: ClassVar = ("rows",)

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        sampled: bool = False,
        num_pairs: int = 128,
        update_every: int = 1,
        ridge: float = 1e-3,
        storage: Storage = "fp32",
        topk: int = 8,
        num_draws: int = 16,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        self._set_sampling(sampled, topk, num_draws)
        self.name = "mirror_sampled" if sampled else "mirror"
        self.num_pairs = _checks.count("num_pairs", num_pairs, minimum=1)
        self.ridge = _checks.non_negative("ridge", ridge)
        _checks.choice("storage", storage, get_args(Storage))
        self.storage = storage
        self.register_buffer("rows", torch.zeros(vocab_size, hidden_size, dtype=_DTYPES[storage]))
        self.update_every = _checks.count("update_every", update_every, minimum=1)
        # Whether the next update() learns. The count is `step` on the host: to read that one would wait for a GPU. A
        # compiled forward may depend on a bool, but not on a number that is new in every step.
        self._num_steps, self.is_learning = 0, True
        self._pairs: dict[int, Pairs] = {}

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the seed of a state_dict, and the step that was loaded before it."""
        super().set_extra_state(state)
        self._set_num_steps(int(self.step))

    @property
    def is_update_fixed(self) -> bool:
        """Whether it neither sits steps out nor rounds at random, from seeds that the host makes."""
        return self.update_every == 1 and self.storage == "fp32"

    def _set_num_steps(self, num_steps: int) -> None:
        self._num_steps, self.is_learning = num_steps, num_steps % self.update_every == 0

    def collect(self, exit_index: int, pairs: Pairs) -> None:
        """Keep an exit's forward pairs for the next `update()`: of several micro-batches those with the smallest keys.

        A token that was collected before (gradient checkpointing, a repeated forward) replaces itself.
        """
        earlier = self._pairs.get(exit_index)
        self._pairs[exit_index] = pairs if earlier is None else pairs.merged(earlier, self.num_pairs)

    @property
    def pairs(self) -> Mapping[int, Pairs]:
        """What was collected since the last `update()`, by exit."""
        return self._pairs

    def discard(self) -> None:
        """Forget the pairs collected since the last `update()`."""
        super().discard()
        self._pairs.clear()

    @torch.no_grad()
    def update(self) -> None:
        """One block Kaczmarz step, `B += (Z_M - H_M Bᵀ)ᵀ (H_M H_Mᵀ + λI)⁻¹ H_M`, on the pairs collected; eq. (11)."""
        super().update()
        self._set_num_steps(self._num_steps + 1)
        # An exit of a batch without tokens has none.
        pairs = [of_exit for _, of_exit in sorted(self._pairs.items()) if len(of_exit.keys)]
        # An autocast region around the call would round what is learned.
        with torch.autocast(self.rows.device.type, enabled=False):
            if pairs:
                self._learn(pairs)
        self._pairs.clear()

    def _learn(self, pairs: Sequence[Pairs]) -> None:
        # Solved in at least fp32, whatever dtype the pairs and the mirror are stored in.
        dtype = torch.promote_types(self.rows.dtype, torch.float32)
        apart = apart_from_mean(joined([of_exit.hidden for of_exit in pairs]).to(dtype))
        logits = [of_exit.logits.to(dtype) for of_exit in pairs]
        num_counted = joined([of_exit.is_counted for of_exit in pairs]).sum()
        back = ridge_rows(apart.hidden, num_counted, self.ridge)
        if not runs_kernel(self.rows):
            self._correct_by_parts(apart, logits, back)
        elif self.rows.dtype == torch.bfloat16:
            self._correct_by_kernel(apart, logits, back)
        else:
            self._correct_by_terms(apart, logits, back)

    def _correct_by_kernel(self, apart: Apart, logits: Sequence[Tensor], back: Tensor) -> None:
        # Triton is optional, and slow to import.
        from localexit.kernels.mirror import correct, residuals

        residual = residuals(self.rows, apart, logits)
        correct(self.rows, residual, back.to(self.rows.dtype), seed=rounding_seed(self.seed, self._num_steps))

    def _correct_by_terms(self, apart: Apart, logits: Sequence[Tensor], back: Tensor) -> None:
        # Triton is optional, and slow to import.
        from localexit.kernels.mirror import residuals

        right = right_terms(back)
        size = fitting(TERM_BYTES, len(right) * right.itemsize)
        for rows, measured in _parts(self.rows, logits, size):
            left = left_terms(residuals(rows, apart, measured).T)
            torch.addmm(rows, left, right, out_dtype=rows.dtype, out=rows)

    def _correct_by_parts(self, apart: Apart, logits: Sequence[Tensor], back: Tensor) -> None:
        dtype = back.dtype
        is_rounded = self.rows.dtype != dtype
        generator = rounding_generator(self.seed, self._num_steps, self.rows.device) if is_rounded else None
        # Row by row the update is independent: each part of B is read and written once, and nothing else is as large.
        size = _UPDATE_BYTES // (back.shape[1] * dtype.itemsize)
        for rows, measured in _parts(self.rows, logits, size):
            exact = rows.to(dtype)
            residual = apart.logits(joined(measured)).addmm_(apart.hidden, exact.T, alpha=-1)
            exact.addmm_(residual.T, back)
            if generator is not None:
                rows.copy_(round_stochastically(exact, rows.dtype, generator))


class WeightTransport(Rows):
    """The exact baseline f = e W, or its unbiased estimate from sampled rows of W; eq. (3), (12).

    The only rule that reads the unembedding on the way back.

    Args:
        hidden_size: D, width of the hidden state.
        vocab_size: V, number of tokens.
        sampled: gather few rows of W instead of multiplying with all of them.
        topk: kept exactly besides gold (sampled only).
        num_draws: tail tokens drawn (sampled only).
        seed: seed of the draws; None draws one from torch's default generator.

    Raises:
        ValueError: an option is out of range.
    """

    codes: ClassVar = ("rows",)
    needs_weight: ClassVar = True

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        sampled: bool = False,
        topk: int = 8,
        num_draws: int = 16,
        seed: int | None = 0,
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size, seed=seed)
        self._set_sampling(sampled, topk, num_draws)
        self.name = "transport_sampled" if sampled else "transport"
