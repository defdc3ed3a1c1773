"""Inputs of one exit, and what they must give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Shape

# Of the unembedding, as initialised; of the hidden states, besides their pull to the gold row.
_STD, _NOISE = 0.02, 0.7


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of one exit.

    Attributes:
        hidden: leaf [N, D].
        weight: leaf [V, D].
        target: int64 [N].
        total: [V, D] accumulator for steps, fp32; made on first use.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    _total: list[Tensor] = field(default_factory=list)

    @property
    def total(self) -> Tensor:
        """The accumulator of `exit_step`: there before the call, as in training."""
        if not self._total:
            self._total.append(torch.zeros_like(self.weight, dtype=torch.float32, requires_grad=False))
        return self._total[0]

    @property
    def weight_grad(self) -> Tensor:
        """dW, wherever the last call left it."""
        return self.total if self.weight.grad is None else self.weight.grad

    def clear(self) -> None:
        """No gradients, as after `zero_grad()`."""
        self.hidden.grad = self.weight.grad = None

    def restart(self) -> None:
        """No gradients, and nothing summed yet."""
        self.clear()
        for total in self._total:
            total.zero_()


def make_inputs(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, margin: float = 0.0, seed: int = 0
) -> Inputs:
    """Logits peaked at the target, as in a model that has learned something: losses near 0.9 nats.

    Args:
        shape: sizes.
        dtype: of hidden and weight.
        device: where they are.
        margin: how far the gold logit is above the log-sum-exp of the others: 9.2 gives it 0.9999.
        seed: of everything.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    weight = _STD * normal(shape.vocab_size, shape.hidden_size)
    target = torch.randint(shape.vocab_size, (shape.num_tokens,), generator=generator, device=device)
    noise = _NOISE * normal(shape.num_tokens, shape.hidden_size)
    # The other V logits are nearly normal, of the noise and of how W's rows happen to lie to the gold one.
    level = math.log(shape.vocab_size) + margin
    variance = (_NOISE * _STD) ** 2 * shape.hidden_size + level**2 / shape.hidden_size
    gold = weight[target]
    hidden = noise + (level + variance / 2) * gold / gold.square().sum(1, keepdim=True)
    return Inputs(hidden=hidden.to(dtype).requires_grad_(), weight=weight.to(dtype).requires_grad_(), target=target)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The truth: loss, dW [V, D] and dh [N, D]."""

    loss: Tensor
    weight_grad: Tensor
    hidden_grad: Tensor


def exact(inputs: Inputs, *, dtype: torch.dtype, bias: float = 0.0, rows: int = 256) -> Exact:
    """Loss and gradients in `dtype`, a few rows at a time; `bias` is added to every logit."""
    weight = inputs.weight.detach().to(dtype)
    loss, weight_grad, hidden_grad = weight.new_zeros(()), torch.zeros_like(weight), []
    for hidden, target in zip(inputs.hidden.detach().to(dtype).split(rows), inputs.target.split(rows), strict=True):
        logits = (hidden @ weight.T + bias).requires_grad_()
        part = F.cross_entropy(logits, target, reduction="sum") / len(inputs.target)
        (error,) = torch.autograd.grad(part, logits)
        loss += part.detach()
        weight_grad += error.T @ hidden
        hidden_grad.append(error @ weight)
    return Exact(loss=loss, weight_grad=weight_grad, hidden_grad=torch.cat(hidden_grad))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ over the whole tensor."""
    difference = actual.detach().to(expected.dtype) - expected
    return float(difference.norm() / expected.norm())
