"""The contract of a feedback rule, and the view of the error it works on.

A rule never receives the unembedding. It sees, for a chunk of tokens, the error through `Error`, the tokens' hidden
states and targets through `Tokens`, and what it prepared once for the call from its own codes and from forward
measurements (`Anchors`). `WeightTransport`, the exact baseline, is the one rule that declares `needs_weight`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from localexit import _checks
from localexit.feedback.draws import fresh_seed
from localexit.feedback.groups import draw, largest


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)


# Every rule's class by its full name: what `registry.from_spec` builds from, rules defined elsewhere included.
RULE_CLASSES: dict[str, type[Feedback]] = {}


def spec_text(rule: type[Feedback], **options: str | float | bool | None) -> str:
    """A rule's class and options as text, read by `registry.from_spec`.

    A Python literal and not JSON, whose encoder torch.compile cannot trace; floats in hexadecimal, which is exact, and
    makes a constant of a number that a compilation with dynamic=True took for a variable.
    """
    floats = {key: value.hex() for key, value in options.items() if isinstance(value, float)}
    others = {key: value for key, value in options.items() if key not in floats}
    return repr((rule.full_name(), others, floats))


@dataclass(frozen=True, kw_only=True)
class Error:
    """View of the error e [n, V] of one chunk: `e = scale[:, None] * values`.

    Keeping the loss weight of a row apart means that no rounding happens at the size of 1/count, and that a rule
    which is homogeneous in the rows (every rule is) costs one multiplication a row for it.

    Attributes:
        values: [n, V], the error for a row weight of one.
        scale: fp32 or fp64 [n]; zero on ignored rows, negative for negative token weights.
        logit_product: [n], `<values, z - b>` with z the raw logits, for rules with `needs_logits`.
    """

    values: Tensor
    scale: Tensor
    logit_product: Tensor | None = None

    def matmul(self, codes: Tensor) -> Tensor:
        """`e @ codes` for codes [V, R] in the dtype of `values`: [n, R], in the accumulation dtype."""
        return self._scaled(product(self.values, codes, self.scale.dtype))

    @property
    def vocab_size(self) -> int:
        """V, how many tokens there are."""
        return self.values.shape[1]

    def gather(self, ids: Tensor) -> Tensor:
        """The entries e[i, ids[i, j]] for int64 ids [n, k]: [n, k]."""
        return self._scaled(self.values.gather(1, ids))

    def topk(self, k: int, exclude: Tensor) -> Tensor:
        """Ids [n, k] of the k entries largest in magnitude, leaving out `exclude` [n] (the gold token)."""
        return largest(self.values, k, exclude)

    def kept(self, k: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """The gold token, target [n], and the k largest others, at most V - 1: ids, all different, and their entries.

        Returns:
            ids int64 [n, 1 + k] and entries [n, 1 + k].
        """
        ids = torch.cat([target[:, None], self.topk(min(k, self.vocab_size - 1), target)], dim=1)
        return ids, self.gather(ids)

    def dot_logits(self) -> Tensor:
        """`<e, z - b>` with the raw logits z: [n]."""
        assert self.logit_product is not None, "the rule does not declare needs_logits"
        return self.scale * self.logit_product

    def sample(self, uniforms: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
        """Draw tokens with probability proportional to |e|, never one of `exclude`; eq. (12).

        Args:
            uniforms: fp32 [n, m] in [0, 1), one draw each.
            exclude: int64 [n, k], tokens that are counted exactly elsewhere.

        Returns:
            ids int64 [n, m] and weights [n, m] such that `Σ_j weights[j] b[ids[j]]` is an unbiased estimate of
            `Σ_{v not in exclude} e_v b_v`: each weight is the sign of its entry times (remaining mass) / m.
        """
        ids, is_drawn, total = draw(self.values, uniforms.to(self.scale.dtype), exclude)
        weights = self.values.gather(1, ids).sign().to(self.scale.dtype) * is_drawn * total / uniforms.shape[1]
        return ids, self._scaled(weights)

    def select(self, k: int, uniforms: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of an unbiased estimate of `e @ rows` from few rows: gold, the top-k, and draws from the rest.

        Args:
            k: entries kept besides gold, at most V - 1 are.
            uniforms: fp32 [n, m] in [0, 1).
            target: int64 [n].

        Returns:
            ids int64 [n, 1 + k + m] and weights [n, 1 + k + m]; eq. (12) is their sum of weighted rows.
        """
        kept, entries = self.kept(k, target)
        drawn, weights = self.sample(uniforms, kept)
        return torch.cat([kept, drawn], dim=1), torch.cat([entries, weights], dim=1)

    def weighted_rows(self, ids: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """Σ_j weights[i, j] rows[ids[i, j]] for each i, without a [n, k, D] tensor: [n, D] in the weights' dtype."""
        if rows.dtype == weights.dtype:
            return nn.functional.embedding_bag(ids, rows, per_sample_weights=weights, mode="sum")
        # Rows in low precision: their dtype can hold neither the weights of a mean over many tokens nor the sum.
        total = weights.new_zeros(ids.shape[0], rows.shape[1])
        for column, weight in zip(ids.T, weights.T, strict=True):
            total.addcmul_(rows[column].to(weights.dtype), weight[:, None])
        return total

    def weighted_codes(self, ids: Tensor, weights: Tensor, codes: Tensor) -> Tensor:
        """The same for codes [V, R] so narrow that [n, k, R] may be made: [n, R] in the weights' dtype."""
        return torch.einsum("nk,nkr->nr", weights, codes[ids].to(weights.dtype))

    def _scaled(self, rows: Tensor) -> Tensor:
        return self.scale[:, None] * rows.to(self.scale.dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in `dtype`: a GPU's low-precision products are summed, and here also returned, in fp32."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat(parts)`, without a copy where there is only one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a rule may know of the n tokens of a chunk besides their error.

    Attributes:
        hidden: [n, D] what the exit received; zero on ignored rows.
        target: int64 [n] the gold token; 0 on ignored rows.
        logits: [n, V] raw logits, for rules with `needs_logits`, else None.
        log_normaliser: [n] log-sum-exp of the logits the loss saw, likewise.
        softcap: the logits' soft cap, if any.
        uniforms: fp32 [n, m] for rules with `num_draws`, else None.
    """

    hidden: Tensor
    target: Tensor
    logits: Tensor | None = None
    log_normaliser: Tensor | None = None
    softcap: float | None = None
    uniforms: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """V, for rules with `needs_logits`."""
        assert self.logits is not None, "the rule does not declare needs_logits"
        return self.logits.shape[1]

    def top_logits(self, k: int) -> tuple[Tensor, Tensor]:
        """The largest raw logits of each token, at most k, falling, and whose they are: [n, k] each."""
        assert self.logits is not None, "the rule does not declare needs_logits"
        top = self.logits.topk(min(k, self.logits.shape[1]))
        return top.values, top.indices


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Forward measurements of the unembedding on some of the batch's own tokens.

    Attributes:
        hidden: [M, D]; zero on rows that do not count (when the batch has fewer than M tokens that do).
        logits: [M, V] raw forward logits without the bias; zero on the same rows.
        count: 0-dim, how many rows count.
    """

    hidden: Tensor
    logits: Tensor
    count: Tensor


# So many training forwards of an exit without update() are a forgotten call, not gradient accumulation.
FORWARDS_WITHOUT_UPDATE = 512


class Feedback(nn.Module):
    """What reaches the hidden state in place of `e @ W`.

    Codes and learned state are buffers: they are saved, moved and sharded with the model. One instance is meant to be
    shared by all exits of a model. A rule is homogeneous in every row: scaling the error of a token scales its
    feedback, for any sign.

    Class attributes:
        options: names of the plain attributes that, with `codes`, determine what the rule computes.
        codes: names of the buffers the rule reads.
        needs_weight: True only for the exact baseline: it alone is given the unembedding.
        needs_logits: the rule reads `Error.dot_logits()` or `Tokens.logits`.
        selects: the rule asks the error for its largest entries, or for draws.
        is_additive: f(e1 + e2) = f(e1) + f(e2) for fixed logits, anchors and draws.
    """

    options: ClassVar[tuple[str, ...]] = ()
    codes: ClassVar[tuple[str, ...]] = ()
    needs_weight: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False

    name: str
    is_additive: bool = True
    selects: bool = False
    # How many tokens the rule wants as anchors of a call, draws a token, forward pairs an exit and step.
    num_anchors: int = 0
    num_draws: int = 0
    num_pairs: int = 0
    step: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        RULE_CLASSES[cls.full_name()] = cls

    @classmethod
    def full_name(cls) -> str:
        """Module and name of the rule's class."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def __init__(self, *, hidden_size: int, vocab_size: int, seed: int | None) -> None:
        super().__init__()
        self.hidden_size = _checks.count("hidden_size", hidden_size, minimum=1)
        self.vocab_size = _checks.count("vocab_size", vocab_size, minimum=1)
        self.seed = fresh_seed(seed)
        self._num_forwards: Counter[int] = Counter()
        # Part of the state: draws and anchors after a resume are those of the uninterrupted run.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def prepare(self, anchors: Anchors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What the rule needs for a whole call, made once before the loop over chunks.

        Args:
            anchors: forward measurements, for rules with `num_anchors`.
            dtype: dtype of the error's values; products with the error use it.
        """
        raise NotImplementedError

    def forward(self, error: Error, tokens: Tokens, prepared: tuple[Tensor, ...]) -> Tensor:
        """The feedback of one chunk: [n, D] in the accumulation dtype."""
        raise NotImplementedError

    @property
    def is_update_fixed(self) -> bool:
        """Whether a CUDA graph of a forward and of `update()` may be replayed in later steps.

        It may if both do the same work in every step, write the rule's tensors in place, and count nothing on the host.
        """
        return True

    @torch.no_grad()
    def update(self) -> None:
        """End of an optimiser step: call once, after every exit of the step has used the rule."""
        self.step += 1
        self._num_forwards.clear()

    def discard(self) -> None:
        """Forget what was collected since the last `update()`: the batch is left out."""
        self._num_forwards.clear()

    def note_forward(self, exit_index: int) -> None:
        """Count a training forward at an exit; warns when there are so many that `update()` was forgotten."""
        if torch.compiler.is_compiling():
            # A number that is new in every step would be compiled anew in every step.
            return
        self._num_forwards[exit_index] += 1
        if self._num_forwards[exit_index] == FORWARDS_WITHOUT_UPDATE:
            warnings.warn(
                f"{FORWARDS_WITHOUT_UPDATE} training forwards without update(); call it once after every optimiser "
                f"step: feedback {self.name!r} learns and changes its draws only there",
                stacklevel=3,
            )

    def get_extra_state(self) -> Tensor:
        """The seed, as part of the state_dict: a rule made with another seed continues with the saved one's draws."""
        return torch.tensor(self.seed)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the seed of a state_dict."""
        self.seed = int(state)

    def state(self, weight: Tensor) -> list[Tensor]:
        """The tensors the rule computes from, in the order of `codes`; only `needs_weight` makes `weight` one."""
        if self.needs_weight:
            return [weight.detach()]
        return [getattr(self, name) for name in self.codes]

    def spec(self) -> str:
        """The rule without its tensors, as text: what a custom operator can carry."""
        return spec_text(type(self), name=self.name, **{name: getattr(self, name) for name in self.options})

    def extra_repr(self) -> str:
        shown = {"hidden_size": self.hidden_size, "vocab_size": self.vocab_size}
        shown |= {name: getattr(self, name) for name in self.options}
        return ", ".join(f"{key}={value!r}" for key, value in shown.items())

    @classmethod
    def _bare(cls, options: dict[str, object], state: Sequence[Tensor]) -> Feedback:
        """An instance around given tensors, without drawing codes: the inverse of `spec()` and `state()`."""
        rule = cls.__new__(cls)
        nn.Module.__init__(rule)
        for key, value in options.items():
            setattr(rule, key, value)
        for key, tensor in zip(cls.codes, state, strict=True):
            rule.register_buffer(key, tensor)
        return rule
