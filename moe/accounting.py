"""What a config costs, computed exactly and without torch: parameters, FLOPs, peak memory.

Pre-flight, the tools and the trainer share these numbers; tests hold them against the real model.

    account(config).flops_per_token
    fit_micro_batch(config, memory_bytes=15 * 2**30, precision="fp16")

FLOPs are counted analytically: matrix products and causal attention, forward and backward, two FLOPs a
multiply-add; norms, softmax, routing and recomputed logits are left out. What a card makes of them, its speed, is
measured elsewhere.

Letters: D d_model, L n_layers, T seq_len, V vocab_size, E num_experts, K top_k, F d_expert, N tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.config import Config

LOGITS_CHUNK = 2**25
"""Logits held at once, in elements: moe/model.py computes the loss in chunks of this many (128 MiB in fp32)."""

CONTEXT_BYTES = {"fp32": 350 * 2**20, "fp16": 700 * 2**20}
"""Memory before the first tensor. fp32: resident torch on CPU (measured, 2.13); fp16: a CUDA context on a T4."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """The cost of a config: `flops` is that of its whole token budget, None for a budget in seconds."""

    parameters: int
    active_parameters: int
    flops_per_token: int
    flops: int | None


def account(config: Config) -> Account:
    """Count parameters, the part of them that one token meets, and training FLOPs."""
    d, layers = config.d_model, config.n_layers
    expert = (3 if config.expert_kind == "swiglu" else 2) * d * config.d_expert
    matrices = layers * (4 * d * d + d * config.num_experts) + config.vocab_size * d  # attention, router, tied head
    norms = (2 * layers + 1) * d
    active_matrices = matrices + layers * config.top_k * expert

    # Backward costs twice the forward. A token attends to (T + 1) / 2 keys on average, in two products of width D.
    attention = 6 * layers * d * (config.seq_len + 1)
    flops_per_token = 6 * active_matrices + attention
    tokens = None if config.steps is None else config.steps * config.batch_size * config.seq_len
    return Account(
        parameters=matrices + norms + layers * config.num_experts * expert,
        active_parameters=active_matrices + norms,
        flops_per_token=flops_per_token,
        flops=None if tokens is None else tokens * flops_per_token,
    )


def activation_bytes(config: Config, precision: Literal["fp32", "fp16"]) -> int:
    """Bytes that the forward pass of one micro-batch keeps for the backward, without the logits.

    In fp16 the residual stream, the norms and the router stay in fp32, as in moe/model.py.
    """
    d, k, f = config.d_model, config.top_k, config.d_expert
    low = 4 if precision == "fp32" else 2
    hidden = 4 * f if config.expert_kind == "swiglu" else 2 * f
    attention = 4 * 2 * d + low * 8 * d  # residual, norm; qkv, rotated q and k, output and its transpose
    routing = 4 * 2 * d + 4 * 3 * config.num_experts + 24 * k
    experts = low * k * (2 * d + hidden)  # gathered inputs, hidden layer, outputs
    return config.micro_batch_size * config.seq_len * config.n_layers * (attention + routing + experts)


def peak_memory_bytes(config: Config, precision: Literal["fp32", "fp16"]) -> int:
    """An estimate of a training process's peak memory at the config's micro-batch.

    On a card for fp16, in resident memory for fp32. Weights, gradients and both AdamW moments are fp32; fp16 adds
    a copy of the weights.
    """
    tokens = config.micro_batch_size * config.seq_len
    logits = min(tokens * config.vocab_size, max(LOGITS_CHUNK, config.vocab_size))
    head = 12 * tokens * config.d_model + 4 * config.vocab_size * config.d_model
    states = account(config).parameters * (16 if precision == "fp32" else 18)
    return states + activation_bytes(config, precision) + 12 * logits + head + CONTEXT_BYTES[precision]


def fit_micro_batch(config: Config, memory_bytes: int, precision: Literal["fp32", "fp16"]) -> int | None:
    """The largest micro-batch, at most the config's, that computes the same gradients within `memory_bytes`."""
    for size in range(config.micro_batch_size, 0, -1):
        if config.batch_size % size or size % config.routing_group:
            continue

        smaller = config.model_copy(update={"micro_batch_size": size})
        if peak_memory_bytes(smaller, precision) <= memory_bytes:
            return size

    return None
