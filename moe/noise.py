"""The random numbers of noisy top-k: a function of the run's seed and of a sequence's number in it, nothing else.

So the noise is the same however a batch is split into micro-batches, and after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.config import Config
from moe.seeded import generator_of


def router_noise(config: Config, *, seed: int, first: int, count: int) -> Tensor | None:
    """Standard normal noise [L, N, E] for the sequences numbered `first` and on, L counting layers with experts.

    None for a config without noisy_top_k. On the CPU, in fp32.
    """
    if not config.noisy_top_k:
        return None

    shape = (sum(config.moe_layers), config.seq_len, config.num_experts)
    names = [f"noise/{seed}/{number}" for number in range(first, first + count)]
    return torch.cat([torch.randn(shape, generator=generator_of(name)) for name in names], dim=1)
