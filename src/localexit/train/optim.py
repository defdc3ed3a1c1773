"""The optimiser and its schedule: torch's own, from a configuration."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from localexit.local.sharding import is_sharded
from localexit.train.config import TrainConfig

# LinearLR refuses a factor of zero, and a first step without learning would be a step lost.
WARMUP_START = 0.02


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are to be trained; weight decay on matrices and embeddings only."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in some if (p.dim() >= 2) == is_matrix], "weight_decay": config.weight_decay * is_matrix}
        # What is sharded cannot be stepped in one operation with what is not.
        for some in ([p for p in trained if not is_sharded(p)], [p for p in trained if is_sharded(p)])
        for is_matrix in (True, False)
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> LRScheduler:
    """Linear warm-up, then linear or cosine decay to `final_lr` of the peak at the last step."""
    decay_steps = max(config.steps - config.warmup_steps - 1, 1)
    if config.decay == "cosine":
        decay: LRScheduler = CosineAnnealingLR(optimizer, T_max=decay_steps, eta_min=config.final_lr * config.lr)
    else:
        decay = LinearLR(optimizer, start_factor=1.0, end_factor=config.final_lr, total_iters=decay_steps)
    if config.warmup_steps == 0:
        return decay
    warmup = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=config.warmup_steps)
    return SequentialLR(optimizer, [warmup, decay], milestones=[config.warmup_steps])
