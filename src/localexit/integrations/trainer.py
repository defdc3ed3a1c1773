"""Local training inside `transformers.Trainer`: what its loop does not do by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from localexit.local import LocalModel, restore_exits, save_exits
from localexit.local.in_backward import left_out
from localexit.local.model import check_attached


class LocalCallback(TrainerCallback):
    """Clips unit by unit, lets the rule learn after every optimiser step, and keeps the exits with the checkpoints.

        local = localexit.attach(model)
        optimizer = torch.optim.AdamW(local.parameters(), lr=1e-3)
        arguments = TrainingArguments(max_grad_norm=0, ...)
        Trainer(model, arguments, optimizers=(optimizer, None), callbacks=[LocalCallback(local)], ...).train()

    Trainer's own accumulation, evaluation (of the last exit), checkpoints and resume work as ever. `exits.safetensors`
    lies in each checkpoint beside the model, so that `localexit.load_exits` reads a checkpoint too.

    Args:
        local: the model that Trainer trains, attached with backward="deferred".
        max_grad_norm: largest norm of the gradient of each unit, and of what units share; None does not clip.

    Raises:
        TypeError: `local` is not attached.
    """

    def __init__(self, local: LocalModel, *, max_grad_norm: float | None = 1.0) -> None:
        check_attached(local)
        self.local = local
        self.max_grad_norm = max_grad_norm

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer has moved the model to its device: the rule and what exits have of their own follow."""
        self._follow_model()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse settings that do not go together, and take up the exits of the checkpoint that training resumes from.

        Raises:
            ValueError: so it is, or the checkpoint has no exits.
        """
        self._check(args, kwargs["optimizer"])
        self._follow_model()
        if state.global_step:
            restore_exits(self.local, _checkpoint(args, state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip each unit by itself."""
        if self.max_grad_norm is not None:
            self.local.clip_grad_norm_(self.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The rule's own learning, and the next step's draws."""
        self.local.update()
        # Trainer clears the gradients of the model it was given, which has no exit norms of their own.
        self.local.zero_grad()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the exits beside the model."""
        if state.is_world_process_zero:
            save_exits(self.local, _checkpoint(args, state))

    def _follow_model(self) -> None:
        self.local.to(self.local.unembedding.weight.device)

    def _check(self, args: TrainingArguments, optimizer: Any) -> None:
        if self.local.backward_mode != "deferred":
            raise ValueError(
                f"backward: Trainer calls backward() on the loss, expected a model attached with 'deferred', got "
                f"{self.local.backward_mode!r}; attach again without backward="
            )
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm: expected TrainingArguments(max_grad_norm=0), got {args.max_grad_norm}; one over all "
                f"parameters is communication between units, LocalCallback(max_grad_norm=...) clips each by itself"
            )
        if args.fp16 and self.max_grad_norm is not None:
            raise ValueError("fp16: its gradients are scaled when units are clipped; use bf16, or max_grad_norm=None")
        missing = left_out(optimizer, self.local)
        if missing:
            raise ValueError(
                f"optimizers: expected one over local.parameters(), but {missing[0]} is in none; pass "
                f"optimizers=(torch.optim.AdamW(local.parameters(), ...), None) to Trainer"
            )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
