"""The random numbers of noisy top-k: a function of the run's seed and of a sequence's number in it, nothing else.

So the noise is the same however a batch is split into micro-batches, and after a resume.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moe.config import Config


def router_noise(config: Config, *, seed: int, first: int, count: int) -> Tensor | None:
    """Standard normal noise [L, N, E] for the sequences numbered `first` and on, L counting layers with experts.

    None for a config without noisy_top_k. On the CPU, in fp32.
    """
    if not config.noisy_top_k:
        return None

    shape = (sum(config.moe_layers), config.seq_len, config.num_experts)
    drawn = [torch.randn(shape, generator=_generator(seed, first + index)) for index in range(count)]
    return torch.cat(drawn, dim=1)


def _generator(seed: int, number: int) -> torch.Generator:
    digest = hashlib.blake2b(f"noise/{seed}/{number}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
