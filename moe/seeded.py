"""Random numbers that depend on a name alone, not on what was drawn before or on the order of construction."""

from __future__ import annotations

import hashlib

import torch


def generator_of(name: str) -> torch.Generator:
    """A generator on the CPU, seeded with a hash of `name`; equal names give equal numbers."""
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
