"""Training that is *not* local, on the same model, exits and loss: what local training is compared with.

"joint" is end-to-end backprop through the exits' losses. With weight transport as the rule it is exact: what autograd
would compute from the sum of the losses. A model with one exit needs none of this: its one unit is the whole model.

"direct" is direct feedback alignment (Nøkland 2016; for transformers Launay et al. 2020): only the last exit has a
loss, and its error reaches every unit at once through the rule's fixed random codes. Launay et al. draw a matrix for
each block; here one matrix serves all, because all blocks write to one residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from localexit.local.exits import Exit
from localexit.local.steps import LocalOutput, StreamStep, run_backward


@dataclass(kw_only=True)
class _AtTheEnd(StreamStep):
    """Losses and dW at the exits, the blocks' backward after the last one: activations are kept until then."""

    grads: dict[Tensor, Tensor | None] = field(default_factory=dict)

    def output(self) -> LocalOutput:
        """Carry the feedback back, all of it in one backward, then as in "stream"."""
        run_backward(self.grads)
        return super().output()

    def _average_unit(self, index: int) -> None:
        """Not yet: there are no gradients before the end."""


@dataclass(kw_only=True)
class JointStep(_AtTheEnd):
    """End-to-end backprop from all exits: nothing is detached between the blocks."""

    # Training to everybody but the hooks, which keep the graphs of units apart.
    is_training: bool = False

    def _backward(self, grads: Mapping[Tensor, Tensor | None]) -> None:
        self.grads |= grads


@dataclass(kw_only=True)
class DirectStep(_AtTheEnd):
    """Direct feedback alignment: what the last exit feeds back goes to every unit; the other exits only measure."""

    normed_hiddens: list[Tensor] = field(default_factory=list)

    def learn(self, exit_: Exit, hidden: Tensor) -> None:
        """Keep the hidden; at the last exit compute the loss, dW and the feedback of all."""
        is_last = exit_.index == self.last_exit
        seen = self.seen_by(exit_)
        normed = self.normed(exit_, hidden, seen)
        self.normed_hiddens.append(normed)
        feedback = self.run_exit(exit_, normed, seen, is_trained=is_last)
        self.grads |= self.router_grads(exit_)
        if is_last:
            self.grads |= dict.fromkeys(self.normed_hiddens, feedback)
