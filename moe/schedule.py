"""How a run unfolds, as pure functions of its config: batch sizes, sequence lengths, learning rates. Torch-free.

A run is followed by a Position. Its progress is the fraction that is done: of the training sequences for a budget in
tokens (so it never depends on the machine's speed), of the clock for a budget in seconds. `batch_doublings` and
`length_doublings` cut a run into stages of equal progress; at 0 there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe.config import Config


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: sequences (of seq_len tokens) trained on, and seconds of training."""

    sequences: int = 0
    seconds: float = 0.0

    def fraction(self, config: Config) -> float:
        """How much of the budget is used, 0 to 1."""
        if config.budget_tokens is not None:
            return self.sequences / (config.budget_tokens // config.seq_len)

        assert config.budget_seconds is not None
        return self.seconds / config.budget_seconds


def batch_at(config: Config, position: Position) -> int:
    """Sequences of the step that begins there, each of seq_len tokens; 0 where the budget is used up."""
    stage = _stage(config, position, config.batch_doublings)
    size = config.batch_size >> (config.batch_doublings - stage)
    if config.budget_tokens is not None:
        return size if (position.sequences + size) * config.seq_len <= config.budget_tokens else 0

    return size if position.fraction(config) < 1.0 else 0


def pieces_at(config: Config, position: Position) -> int:
    """Into how many equal pieces each sequence of that step is cut."""
    return 1 << (config.length_doublings - _stage(config, position, config.length_doublings))


def micro_batch_rows(config: Config, size: int, processes: int = 1) -> int:
    """Sequences of a micro-batch, for a step of `size`: the most up to micro_batch_size that give all equal work.

    Where the routing groups of a step cannot be dealt out evenly, micro-batches are as large as for one process.
    """
    whole = math.gcd(config.micro_batch_size, size)
    groups = range(config.routing_group, whole + 1, config.routing_group)
    return max((rows for rows in groups if whole % rows == 0 and size // rows % processes == 0), default=whole)


def progress_at(config: Config, position: Position) -> float:
    """Where the schedule of the learning rate stands for that step: at the step's middle, or at the clock."""
    if config.sequences is None:
        return position.fraction(config)

    return (position.sequences + batch_at(config, position) / 2) / config.sequences


def learning_rate(config: Config, progress: float) -> float:
    """Linear warm-up to `lr`, then down to `lr * min_lr_ratio` at progress 1 in the shape of `schedule`.

    cosine: SGDR, arXiv:1608.03983, one period. linear: arXiv:2502.15938. wsd: constant until the last decay_fraction
    of the whole run, then linear (arXiv:2404.06395, arXiv:2405.18392).
    """
    warmup = config.warmup_fraction
    if progress < warmup:
        return config.lr * progress / warmup

    after = min(1.0, (progress - warmup) / (1.0 - warmup))
    if config.schedule == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * after))
    elif config.schedule == "linear":
        height = 1.0 - after
    else:
        height = min(1.0, max(0.0, 1.0 - progress) / config.decay_fraction)

    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * height)


def _stage(config: Config, position: Position, doublings: int) -> int:
    stages = doublings + 1
    if config.budget_tokens is not None:  # in whole numbers, as Config counts its steps
        return min(doublings, stages * position.sequences // (config.budget_tokens // config.seq_len))

    return min(doublings, math.floor(stages * position.fraction(config)))
