"""What a config costs, without torch: parameters and FLOPs exactly, peak memory as an estimate.

Pre-flight, the tools and the trainer share these numbers. Tests hold the counts against the real model;
benchmarks/memory.py holds the estimate against measured peaks. moe/roofline.py turns them into speed.

    account(config).flops_per_token
    fit_micro_batch(config, memory_bytes=15 * 2**30, precision="fp16")

FLOPs are counted analytically: matrix products and causal attention, forward and backward, two FLOPs a
multiply-add; norms, softmax, routing and whatever is recomputed are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.config import Config
from moe.precision import BYTES, Precision
from moe.space.experts import GATED

LOGITS_CHUNK = 2**25
"""Logits held at once, in elements: moe/loss.py computes the loss in chunks of this many (128 MiB in fp32)."""

SHORT_SEQUENCE = 512
"""Positions below which attention computes in fp32 on a CPU that trains in bf16 (`python -m benchmarks.attention`).

There torch's gradient of it takes 1.2 to 6 times as long in bf16 (2.13), from here on as long or less.
"""

MUON_BATCH = 2**23
"""Elements of matrices that moe/muon.py orthogonalizes at once: a bound on memory, far above what speed needs."""

CONTEXT_BYTES = {"fp32": 170 * 2**20, "bf16": 170 * 2**20, "fp16": 700 * 2**20}
"""Memory of a process before its first tensor. fp32, bf16: torch on a CPU without the pages of files, which processes
share (157 to 185 MiB with torch 2.13). fp16: a CUDA context on a T4."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """The cost of a config: `flops` is that of its whole token budget, None for a budget in seconds."""

    parameters: int
    active_parameters: int
    flops_per_token: int
    flops: int | None


def account(config: Config) -> Account:
    """Count parameters, the part of them that one token meets, and training FLOPs.

    With expert choice a token meets `top_k` experts on average. Capacity that drops tokens is not subtracted: padded
    or dropped, the card computes it.
    """
    d, layers, mixtures = config.d_model, config.n_layers, sum(config.moe_layers)
    matrices = layers * attention_parameters(config) + config.vocab_size * d  # and the head, tied or not
    matrices += mixtures * (router_parameters(config) + config.num_shared_experts * expert_parameters(config))
    matrices += (layers - mixtures) * _feed_forward(config, config.dense_width)
    norms = (2 * layers + 1) * d + (2 * layers * d // config.n_heads if config.qk_norm else 0)
    unembedded = 0 if config.tie_embeddings else config.vocab_size * d
    active_matrices = matrices + mixtures * config.top_k * expert_parameters(config)

    # Backward costs twice the forward. Attention: two products, over (seq_len + 1) / 2 positions on average.
    attention = 6 * layers * d * (config.seq_len + 1)
    flops_per_token = 6 * active_matrices + attention
    tokens = None if config.sequences is None else config.sequences * config.seq_len
    return Account(
        parameters=matrices + norms + unembedded + mixtures * config.num_experts * expert_parameters(config),
        active_parameters=active_matrices + norms + unembedded,
        flops_per_token=flops_per_token,
        flops=None if tokens is None else tokens * flops_per_token,
    )


def expert_parameters(config: Config) -> int:
    """Of one expert of one layer."""
    return _feed_forward(config, config.d_expert)


def attention_parameters(config: Config) -> int:
    """Of the matrices of one layer's attention."""
    return config.d_model * config.d_model // config.n_heads * 2 * (config.n_heads + config.kv_heads)


def router_parameters(config: Config) -> int:
    """Of one layer's router."""
    if config.routing == "hash":
        return 0

    noisy = config.noisy_top_k and config.routing == "token_choice"
    return (2 if noisy else 1) * config.num_experts * config.d_model


def activation_bytes(config: Config, precision: Precision) -> int:
    """Bytes that the forward pass of one micro-batch keeps for the backward, without the logits.

    In fp16 and bf16 the residual stream, the norms and the router stay in fp32, as in moe/layers.py.
    """
    tokens = config.micro_batch_size * config.seq_len
    if config.activation_checkpointing:  # the input of each block; of routers what their losses need
        return tokens * 4 * (config.d_model * config.n_layers + (2 * config.num_experts + 1) * sum(config.moe_layers))

    return tokens * sum(_layers_bytes(config, precision))


def peak_memory_bytes(config: Config, precision: Precision) -> int:
    """An estimate of a training process's peak memory at the config's micro-batch.

    Memory of the card for fp16, resident memory of a CPU process otherwise. Weights, AdamW's two moments (Muon has one)
    and the average of the weights are fp32 and always there; so are gradients, with several micro-batches. On top comes
    the largest need of four points in a step. benchmarks/memory.py measures how near this comes.
    """
    low, parameters = BYTES[precision], account(config).parameters
    gradients = 4 * parameters
    accumulated = gradients if config.micro_batch_size < config.batch_size else 0
    tokens = config.micro_batch_size * config.seq_len
    kept = activation_bytes(config, precision) + 4 * config.vocab_size * config.d_model  # and the head's gradient
    kept += (low + 8) * tokens * config.d_model  # of the last norm, and the gradient that the loss has made for it
    if low < 4 and not config.activation_checkpointing:  # copies of the matrices stay until the backward pass
        kept += low * parameters

    # While the backward pass works on a layer: the gradient of the experts' stacks, and gradients of its activations.
    layer = tokens * max(_layers_bytes(config, precision))
    stack = 4 * config.num_experts * expert_parameters(config)
    working = 2 * layer // 5
    recomputed = layer + (low * stack // 4 if low < 4 else 0) if config.activation_checkpointing else 0
    in_loss = accumulated + kept + _logits_bytes(config, low)
    in_last_layer = accumulated + kept + recomputed + stack + working
    in_first_layer = gradients + layer + working + (stack if accumulated else 0)
    in_optimizer = gradients + (_muon_bytes(config, precision) if config.optimizer == "muon" else 0)
    most = max(in_loss, in_last_layer, in_first_layer, in_optimizer)
    return CONTEXT_BYTES[precision] + checkpoint_bytes(config) + most


def weights_bytes(config: Config) -> int:
    """Bytes of the final weights on disk (checkpoint.pt), in fp32."""
    return 4 * account(config).parameters


def checkpoint_bytes(config: Config) -> int:
    """Bytes of a resumable checkpoint, in memory and on disk: weights, their average and the moments, in fp32."""
    moments = 2 * weights_bytes(config) - (4 * muon_parameters(config) if config.optimizer == "muon" else 0)
    return weights_bytes(config) * (2 if config.ema_decay > 0.0 else 1) + moments


def disk_bytes(config: Config) -> int:
    """The most that a training run has on disk at once: two checkpoints, and a third one that is being written.

    The final weights come when no third will; metrics and log are small beside them.
    """
    return 3 * checkpoint_bytes(config)


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Equal matrices that Muon orthogonalizes: how many of the whole model, their shorter side and their longer one."""

    count: int
    short: int
    long: int


def muon_matrices(config: Config) -> tuple[Matrices, ...]:
    """What Muon takes: attention, experts and dense layers, each projection by itself, in moe/optim.py's groups."""
    d, layers, mixtures = config.d_model, config.n_layers, sum(config.moe_layers)
    # Queries and the output, keys and values.
    shapes = [(2 * layers, d, d), (2 * layers, d // config.n_heads * config.kv_heads, d)]
    for projections in (2, 1) if config.expert_kind in GATED else (2,):
        shapes += [
            (projections * mixtures * config.num_experts, config.d_expert, d),
            (projections * mixtures, config.num_shared_experts * config.d_expert, d),
            (projections * (layers - mixtures), config.dense_width, d),
        ]

    return tuple(
        Matrices(count=count, short=min(sides), long=max(sides)) for count, *sides in shapes if count and min(sides)
    )


def muon_parameters(config: Config) -> int:
    """Of the matrices that Muon takes."""
    return sum(matrices.count * matrices.short * matrices.long for matrices in muon_matrices(config))


def muon_flops(matrices: Matrices, steps: int) -> int:
    """Of one optimizer step: three products in each step of the Newton-Schulz iteration (moe/muon.py)."""
    return steps * matrices.count * (4 * matrices.short**2 * matrices.long + 2 * matrices.short**3)


def fit_micro_batch(
    config: Config, memory_bytes: int | None, precision: Precision, *, most: int | None = None
) -> int | None:
    """The largest micro-batch, at most the config's and `most`, that computes the same gradients.

    It is one whose peak is within `memory_bytes`, where that is given. None: there is none.
    """
    limit = config.micro_batch_size if most is None else min(most, config.micro_batch_size)
    for size in range(limit, 0, -1):
        if config.batch_size % size or size % config.routing_group:
            continue

        smaller = config.model_copy(update={"micro_batch_size": size})
        if memory_bytes is None or peak_memory_bytes(smaller, precision) <= memory_bytes:
            return size

    return None


def memory_class(config: Config, precision: Precision) -> str:
    """A name shared by all configs that need the same memory at every micro-batch, as far as this module knows.

    What was found out on a card about one of them holds for the others.
    """
    one, two = (peak_memory_bytes(config.model_copy(update={"micro_batch_size": size}), precision) for size in (1, 2))
    return f"{precision} {one} + {two - one} bytes a sequence"


def _feed_forward(config: Config, width: int) -> int:
    return (3 if config.expert_kind in GATED else 2) * config.d_model * width


def _logits_bytes(config: Config, low: int) -> int:
    # Of a chunk: in the compute type and in fp32, and the squares that a soft cap needs.
    chunk = min(config.micro_batch_size * config.seq_len * config.vocab_size, max(LOGITS_CHUNK, config.vocab_size))
    return ((4 if low == 4 else low + 4) + (4 if config.logit_softcap > 0.0 else 0)) * chunk


def _muon_bytes(config: Config, precision: Precision) -> int:
    # Of one batch of matrices: as given in fp32, before a product and after it, two squares of the shorter side; in
    # bf16 most where it is taken in or handed back.
    most = 0
    for each in muon_matrices(config):
        size, square = each.short * each.long, each.short**2
        count = min(each.count, max(1, MUON_BATCH // size))
        most = max(most, count * (10 * size + 4 * square if precision == "bf16" else 12 * size + 8 * square))

    return most


def _layers_bytes(config: Config, precision: Precision) -> list[int]:
    return [_layer_bytes(config, precision, mixture=mixture) for mixture in config.moe_layers]


def _layer_bytes(config: Config, precision: Precision, *, mixture: bool) -> int:
    # For each token: what moe/layers.py, moe/fused.py and moe/dispatch.py keep of one layer for the backward pass.
    d, k, f, low = config.d_model, config.top_k, config.d_expert, BYTES[precision]
    keys = 2 * d // config.n_heads * config.kv_heads  # with the values
    gated = config.expert_kind in GATED
    # The stream before each norm; inputs and outputs of the products, before and after the rotation.
    attention = 4 * d + low * (d + (d + keys) + (d + keys // 2) + 2 * d)
    if precision == "bf16" and config.seq_len < SHORT_SEQUENCE:  # queries, keys, values and their sums in fp32
        attention = 4 * d + low * 2 * d + 4 * (2 * d + keys)

    normed = low * d if low == 4 or not mixture else (4 + low) * d  # a router reads it in fp32
    width = config.num_shared_experts * f if mixture else config.dense_width
    feed_forward = 4 * d + normed + low * (4 if gated else 2) * width
    if not mixture:
        return attention + feed_forward

    routing = 4 * 3 * config.num_experts + 8 * (4 * k + 1)
    return attention + feed_forward + routing + low * k * (2 if gated else 1) * f
