"""AdamW and its learning rate.

The learning rate is a pure function of progress: the fraction of optimizer steps done for a budget in tokens (so it
never depends on the machine's speed), of the clock for a budget in seconds.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from moe.config import Config

ADAM_EPS = 1e-8  # Adam, arXiv:1412.6980


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW (about 3 times faster than foreach on CPU); weights of one dimension and embeddings do not decay."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim == 1 or name == "embedding" else decayed).append(parameter)

    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=ADAM_EPS, fused=True)


def learning_rate(config: Config, progress: float) -> float:
    """Linear warm-up to `lr`, then a cosine down to `lr * min_lr_ratio` at progress 1."""
    warmup = config.warmup_fraction
    if progress < warmup:
        return config.lr * progress / warmup

    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def progress_of(config: Config, step: int, seconds: float) -> float:
    """Where in its budget a run stands before `step` (counted from 0): the middle of that step, or the clock."""
    if config.steps is not None:
        return (step + 0.5) / config.steps

    assert config.budget_seconds is not None
    return seconds / config.budget_seconds


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
