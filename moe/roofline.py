"""How fast a card trains a config, and where the time goes: from the config alone, without a card and without torch.

    speed(PRESETS["t4"]).tokens_per_second

A micro-batch takes what the card computes, or what the host needs to launch it if that is longer; an optimizer step
adds the passes over weights and moments, and a fixed cost (Williams et al. 2009, doi:10.1145/1498765.1498785, with a
launch cost). FLOPs, parameters and the bytes that autograd keeps come from moe/accounting.py; what a card makes of them
was fitted to a thousand measurements on a T4 of another, dense model, which `python -m benchmarks.t4_speed` repeats
and prints with its errors; what our model asks for was counted by `python -m benchmarks.kernels`. No mixture of experts
has been timed on a T4 yet.

Left out: uneven load of the experts, the host waiting once a layer for their loads, data loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe.accounting import account, activation_bytes, muon_flops, muon_matrices
from moe.config import Config
from moe.precision import BYTES, Precision, precision_on


@dataclass(frozen=True, kw_only=True)
class CardModel:
    """What a card and its host sustain. Rates in units a second; `matmul_flops` is that of endless products.

    Products whose narrowest dimension is `half_width` run at half of that rate, wider ones at more.
    """

    name: str
    matmul_flops: Mapping[Precision, float]
    half_width: Mapping[Precision, float]
    bytes_per_second: float
    launch_seconds: float
    step_seconds: float
    watts: float


@dataclass(frozen=True, kw_only=True)
class Products:
    """Matrix products of one kind: FLOPs, bytes of operands and results, and the narrowest of their dimensions."""

    flops: float
    bytes_moved: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one optimizer step asks of card and host; all but the last three fields are those of one micro-batch.

    `bytes_moved` is what everything but matrix products reads and writes; `launches` counts kernels.
    """

    body: tuple[Products, ...]
    head: tuple[Products, ...]
    bytes_moved: float
    launches: float
    micro_batches: int
    optimizer_bytes: float
    optimizer: tuple[Products, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Predicted speed, and the seconds of one optimizer step by what they go to; `step` is their sum.

    `waiting` is time in which the card has nothing to do, because the host has not launched it yet.
    """

    tokens_per_second: float
    joules_per_token: float
    step: float
    body: float
    head: float
    elementwise: float
    waiting: float
    optimizer: float
    fixed: float


T4 = CardModel(
    name="Tesla T4",
    matmul_flops={"fp32": 3.42e12, "fp16": 23.7e12},
    half_width={"fp32": 30.4, "fp16": 187.0},
    bytes_per_second=254e9,
    launch_seconds=34.5e-6,
    step_seconds=7.1e-3,
    watts=69.7,
)
"""Fitted by benchmarks/t4_speed.py. Its nominal 65 (fp32: 8.1) TFLOP/s and 320 GB/s do not last within 70 W.

The launch time is that of the host it was measured on, with PyTorch in eager mode.
"""

RECOMPUTED = 4 / 3
"""Work of a step with activation checkpointing: two forward passes and a backward pass, which counts as two more."""

KEPT_PASSES: Mapping[Precision, float] = {"fp32": 10.6, "fp16": 12.9}
"""Bytes moved for each byte that autograd keeps: eager PyTorch reads and writes every intermediate (counted)."""

WEIGHT_BYTES: Mapping[Precision, float] = {"fp32": 0.5, "fp16": 12.5}
"""Bytes moved for each parameter and micro-batch: in fp16 casts there and back (counted)."""

LOGIT_BYTES: Mapping[Precision, float] = {"fp32": 28.0, "fp16": 42.0}
"""Bytes moved for each logit by moe/loss.py, read off its lines: written (4; 2 and a cast of 6), the largest one (4),
softmax in place (8), the largest again (4), in fp16 scaled and cast back (8, 6), read by two products (8; 4)."""

OPTIMIZER_BYTES: Mapping[Precision, float] = {"fp32": 40.0, "fp16": 48.0}
"""Bytes moved for each parameter and step: fused AdamW 28, the norm and clipping 12, unscaling 8."""

MODEL_LAUNCHES: Mapping[Precision, float] = {"fp32": 86.0, "fp16": 91.0}
LAYER_LAUNCHES: Mapping[Precision, float] = {"fp32": 59.0, "fp16": 74.0}
EXPERT_LAUNCHES: Mapping[Precision, float] = {"fp32": 16.0, "fp16": 18.0}
"""Kernels of a micro-batch, both ways: of the model around its layers, of a layer, of an expert (counted).

A test counts again and fails where work_of() is off by more than 15 %."""


def speed(config: Config, card: CardModel = T4) -> Speed:
    """What `card` makes of `config` at its micro-batch, in batches of full size and length.

    Raises:
        ValueError: the card has no rate in the config's precision: a T4 has none in bf16.
    """
    precision = precision_on("cuda", config.precision)
    if precision not in card.matmul_flops:
        raise ValueError(f"nothing is known of the speed of a {card.name} in {precision}")

    return predict(work_of(config, precision), config.batch_size * config.seq_len, precision, card)


def work_of(config: Config, precision: Precision) -> Work:
    """What one optimizer step of moe/train.py asks for."""
    tokens = config.micro_batch_size * config.seq_len
    cost = account(config)
    head = config.vocab_size * config.d_model
    size = BYTES[precision]
    logits = tokens * config.vocab_size
    again = RECOMPUTED if config.activation_checkpointing else 1.0
    kept = activation_bytes(config.model_copy(update={"activation_checkpointing": False}), precision)
    experts = sum(config.moe_layers) * config.num_experts
    return Work(
        body=(
            Products(
                flops=again * (cost.flops_per_token - 6 * head) * tokens,
                bytes_moved=4 * size * (cost.parameters - head),  # weights three times, and their gradients
                width=min(config.d_model, config.d_expert, tokens * config.top_k / config.num_experts),
            ),
        ),
        head=(
            Products(
                flops=6 * head * tokens,
                bytes_moved=4 * size * (head + logits),
                width=min(config.d_model, tokens),
            ),
        ),
        bytes_moved=again * KEPT_PASSES[precision] * kept
        + WEIGHT_BYTES[precision] * cost.parameters
        + LOGIT_BYTES[precision] * logits,
        launches=MODEL_LAUNCHES[precision]
        + again * (config.n_layers * LAYER_LAUNCHES[precision] + experts * EXPERT_LAUNCHES[precision]),
        micro_batches=config.batch_size // config.micro_batch_size,
        optimizer_bytes=OPTIMIZER_BYTES[precision] * cost.parameters,
        optimizer=_orthogonalization(config) if config.optimizer == "muon" else (),
    )


def predict(work: Work, tokens: float, precision: Precision, card: CardModel) -> Speed:
    """The time of `work`, an optimizer step over `tokens` tokens."""
    body = work.micro_batches * sum(_seconds(products, precision, card) for products in work.body)
    head = work.micro_batches * sum(_seconds(products, precision, card) for products in work.head)
    elementwise = work.micro_batches * work.bytes_moved / card.bytes_per_second
    launching = work.micro_batches * work.launches * card.launch_seconds
    waiting = max(0.0, launching - body - head - elementwise)
    optimizer = work.optimizer_bytes / card.bytes_per_second
    optimizer += sum(_seconds(products, "fp32", card) for products in work.optimizer)  # fp16 is too narrow for Muon
    step = body + head + elementwise + waiting + optimizer + card.step_seconds
    return Speed(
        tokens_per_second=tokens / step,
        joules_per_token=card.watts * step / tokens,
        step=step,
        body=body,
        head=head,
        elementwise=elementwise,
        waiting=waiting,
        optimizer=optimizer,
        fixed=card.step_seconds,
    )


def _orthogonalization(config: Config) -> tuple[Products, ...]:
    # The three products of each step read or write the matrix five times and squares of its shorter side six times.
    return tuple(
        Products(
            flops=muon_flops(matrices, config.muon_steps),
            bytes_moved=4.0
            * config.muon_steps
            * matrices.count
            * (5 * matrices.short * matrices.long + 6 * matrices.short**2),
            width=matrices.short,
        )
        for matrices in muon_matrices(config)
    )


def _seconds(products: Products, precision: Precision, card: CardModel) -> float:
    rate = card.matmul_flops[precision] / (1 + card.half_width[precision] / products.width)
    return max(products.flops / rate, products.bytes_moved / card.bytes_per_second)
