"""How well moe/roofline.py predicts what was measured on a T4: fits its constants and prints them with their errors.

    .venv/bin/python -m benchmarks.t4_speed [CSV]

benchmarks/data/t4_dense.csv holds 1,080 timings made on a T4 with another training script, rounded. Its model was
dense: Hugging Face's GLM-4 with 8 heads, 32,000 words, the depth and width of the row, and all other sizes left at
their defaults; every block computed twice (activation checkpointing), and AdamW as a loop over parameters. None of that
is written in the file: it is read from the memory column, which it explains to the parameter (benchmarks/README.md).
"""

from __future__ import annotations

import csv
import statistics
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from moe.precision import BYTES, Precision
from moe.presets import PRESETS
from moe.roofline import T4, CardModel, Products, Speed, Work, predict, speed

DATA = Path(__file__).parent / "data" / "t4_dense.csv"

VOCABULARY, FEED_FORWARD, QUERIES, KEYS = 32_000, 13_696, 8 * 128, 2 * 128
ELEMENTWISE = {"fp32": (1_436_496, 684), "fp16": (791_376, 830)}
"""Bytes a token and layer beside matrix products: a constant, and per unit of width (counted as in kernels.py)."""

CAST_BYTES = {"fp32": 0, "fp16": 30}  # a parameter and step, counted
OPTIMIZER_BYTES = {"fp32": 80, "fp16": 88}  # a parameter: AdamW as nine PyTorch operations; unscaling
LOGIT_BYTES = {"fp32": 32.0, "fp16": 44.0}  # log-softmax and its gradient, in fp16 also casts (counted)
LAYER_LAUNCHES = {"fp32": 200, "fp16": 278}  # counted
MODEL_LAUNCHES = {"fp32": 49, "fp16": 56}

FITTED = ("matmul_flops", "half_width", "bytes_per_second", "launch_seconds", "step_seconds")
START = (3e12, 20e12, 50.0, 100.0, 200e9, 30e-6, 5e-3)


class Shape(NamedTuple):
    """One configuration of the grid; `batch` counts sequences."""

    layers: int
    width: int
    batch: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def layer_parameters(self) -> int:
        """Attention of 8 heads of 128 with 2 key heads and biases, a gated feed-forward, four norms."""
        return self.width * (2 * QUERIES + 2 * KEYS + 3 * FEED_FORWARD + 4) + QUERIES + 2 * KEYS

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + (2 * VOCABULARY + 1) * self.width


class Measured(NamedTuple):
    """A configuration in one precision, medians over its rows without torch.compile."""

    shape: Shape
    precision: Precision
    seconds: float
    memory_gib: float
    watts: float
    compile_gain: float | None  # tokens/s with torch.compile over without; None where it was not in effect


def read(path: Path) -> list[Measured]:
    """The grid, with rows told apart that were compiled in fact.

    The peak memory of equal programs is equal to the byte, so rows that say compile but have the memory of those that
    do not were not compiled. Whether the shapes were static changes neither memory nor speed (median ratio 1.000).
    """
    rows: dict[tuple[Shape, Precision], dict[bool, list[tuple[float, float, float]]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            shape = Shape(*(int(row[name]) for name in ("layers", "d_model", "bs", "seqlen")))
            precision: Precision = "fp32" if row["prec"] == "fp32" else "fp16"
            values = float(row["tps"]), float(row["mem_gb"]), float(row["avg_power_w"])
            kinds = rows.setdefault((shape, precision), {True: [], False: []})
            kinds[row["compile"] == "True"].append(values)

    measured = []
    for (shape, precision), kinds in rows.items():
        in_effect = {memory for _, memory, _ in kinds[True]} != {memory for _, memory, _ in kinds[False]}
        eager = kinds[False] if in_effect else kinds[False] + kinds[True]
        tokens_per_second, memory, watts = (statistics.median(column) for column in zip(*eager, strict=True))
        compiled = statistics.median(speed for speed, _, _ in kinds[True])
        gain = compiled / tokens_per_second if in_effect else None
        measured.append(Measured(shape, precision, shape.tokens / tokens_per_second, memory, watts, gain))

    return measured


def dense_work(shape: Shape, precision: Precision) -> Work:
    """What a step of the measured model asks for."""
    n, d, layers = shape.tokens, shape.width, shape.layers
    size = BYTES[precision]

    def products(inner: int, outer: int, forwards: int, times: int) -> tuple[Products, ...]:
        moved = times * size * (n * inner + n * outer + inner * outer)
        one = Products(flops=2 * times * n * inner * outer, bytes_moved=moved, width=min(n, inner, outer))
        return (one,) * (forwards + 2)

    matrices = ((d, QUERIES), (d, KEYS), (d, KEYS), (QUERIES, d), (d, 2 * FEED_FORWARD), (FEED_FORWARD, d))
    attention = 8 * layers * n * QUERIES * shape.seq_len  # half of all pairs, two products; twice that backward
    body = [product for inner, outer in matrices for product in products(inner, outer, 2, layers)]
    body.append(Products(flops=attention, bytes_moved=0, width=min(128, shape.seq_len)))
    constant, per_width = ELEMENTWISE[precision]
    return Work(
        body=tuple(body),
        head=products(d, VOCABULARY, 1, 1),
        bytes_moved=n * layers * (constant + per_width * d)
        + n * VOCABULARY * LOGIT_BYTES[precision]
        + CAST_BYTES[precision] * shape.parameters,
        launches=layers * LAYER_LAUNCHES[precision] + MODEL_LAUNCHES[precision],
        micro_batches=1,
        optimizer_bytes=OPTIMIZER_BYTES[precision] * shape.parameters,
    )


def dense_speed(row: Measured, card: CardModel) -> Speed:
    """What the roofline predicts for a measured configuration."""
    return predict(dense_work(row.shape, row.precision), row.shape.tokens, row.precision, card)


def fit(rows: Sequence[Measured]) -> CardModel:
    """The constants, to three digits, that minimize relative errors; a soft loss, for a few timings are disturbed."""
    works = [(row, dense_work(row.shape, row.precision)) for row in rows]

    def errors(logs: Iterable[float]) -> list[float]:
        card = _card(np.exp(np.asarray(logs)).tolist(), T4.watts)
        return [
            float(np.log(predict(work, row.shape.tokens, row.precision, card).step / row.seconds))
            for row, work in works
        ]

    found = least_squares(errors, np.log(START), loss="soft_l1", f_scale=0.1, diff_step=np.full(len(START), 1e-4))
    busy = [row.watts for row in rows if row.seconds > 0.5]
    return _card([float(f"{value:.3g}") for value in np.exp(found.x)], round(statistics.median(busy), 1))


def held_out(row: Measured) -> bool:
    """Half of the configurations, by name: both precisions of one are on the same side."""
    return zlib.crc32(repr(tuple(row.shape)).encode()) % 2 == 1


def relative_errors(rows: Iterable[Measured], card: CardModel) -> list[float]:
    """Absolute relative errors of the predicted tokens/s."""
    return [abs(row.seconds / dense_speed(row, card).step - 1) for row in rows]


def energy_errors(rows: Iterable[Measured], card: CardModel) -> list[float]:
    """Absolute relative errors of the predicted joules a token, with the power at the card's limit throughout."""
    joules = ((row, row.watts * row.seconds / row.shape.tokens) for row in rows)
    return [abs(dense_speed(row, card).joules_per_token / measured - 1) for row, measured in joules]


def predicted_memory(shape: Shape, precision: Precision) -> float:
    """Peak bytes: the highest of three peaks, over what is always there.

    The loss: logits, softmax and gradient, but no gradients of weights yet. The last block's backward: all gradients,
    the block computed again, and the logits, which the script still holds. AdamW: two copies of the largest matrix.
    """
    size = BYTES[precision]
    logits, width = VOCABULARY * shape.tokens, shape.width
    hidden = (6 * 4 if precision == "fp32" else 7 * 2) * FEED_FORWARD  # fp16: with copies in fp32
    loss = (12 if precision == "fp32" else 14) * logits + 4 * VOCABULARY * width
    block = 4 * shape.parameters + size * logits + shape.tokens * (hidden + 30 * width)
    optimizer = 4 * shape.parameters + size * logits + 8 * VOCABULARY * width
    return 12 * shape.parameters + 143.4e6 + max(loss, block, optimizer)  # nothing tells what the 143.4 MB are


def accounted_memory(shape: Shape, precision: Precision) -> float:
    """The same by the formula of moe/accounting.py, which adds all peaks up, for a model that computes blocks twice."""
    size = BYTES[precision]
    states = shape.parameters * (16 if precision == "fp32" else 18)
    block = 24 * shape.width + size * (4 * QUERIES + 4 * KEYS + 4 * FEED_FORWARD)
    logits = 12 * shape.tokens * (VOCABULARY + shape.width) + 4 * VOCABULARY * shape.width
    return states + shape.tokens * (4 * shape.width * shape.layers + block) + logits


def main() -> None:
    """Prints the tables."""
    rows = read(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA)
    card = fit([row for row in rows if not held_out(row)])
    print("constant fitted in moe/roofline.py")
    for name in (*FITTED, "watts"):
        print(f"{name:17} {getattr(card, name)!s:38} {getattr(T4, name)}")

    print("\nerror of tokens/s                            precision  rows  median   90 %  largest")
    _print_errors("fitted on them", [row for row in rows if not held_out(row)], T4)
    _print_errors("configurations left out", [row for row in rows if held_out(row)], T4)
    for name, left_out in _EXTRAPOLATIONS.items():
        other = fit([row for row in rows if not left_out(row.shape)])
        _print_errors(name, [row for row in rows if left_out(row.shape)], other)

    _print_errors("joules a token, all configurations", rows, T4, energy_errors)

    print("\nerror of peak memory                         precision  rows  median   90 %  largest")
    for name, formula in {"the highest of three peaks": predicted_memory, "all of them": accounted_memory}.items():
        for precision in _PRECISIONS:
            few = [row for row in rows if row.precision == precision]
            errors = [abs(formula(row.shape, precision) / 2**30 / row.memory_gib - 1) for row in few]
            _print_line(name, precision, errors)

    print("\ntorch.compile, where it was in effect: precision  rows  median  lowest  highest gain")
    for precision in _PRECISIONS:
        gains = [row.compile_gain for row in rows if row.precision == precision and row.compile_gain]
        print(f"{precision:>49} {len(gains):5} {statistics.median(gains):7.2f} {min(gains):7.2f} {max(gains):8.2f}")

    print("\npreset  precision  tokens/s  J/token  step ms   body   head  elementwise  waiting  optimizer  fixed")
    for name, preset in PRESETS.items():
        for precision in _PRECISIONS:
            its = speed(preset.model_copy(update={"precision": precision}))
            parts = (its.body, its.head, its.elementwise, its.waiting, its.optimizer, its.fixed)
            shares = "{:6.0%} {:6.0%} {:12.0%} {:8.0%} {:10.0%} {:6.0%}".format(*(part / its.step for part in parts))
            print(
                f"{name:7} {precision:9} {its.tokens_per_second:9,.0f} {its.joules_per_token:8.4f} "
                f"{1e3 * its.step:8.1f} {shares}"
            )


_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")

_EXTRAPOLATIONS: dict[str, Callable[[Shape], bool]] = {
    "width 512, fitted on 128 and 256": lambda shape: shape.width == 512,
    "12 layers, fitted on 4 and 8": lambda shape: shape.layers == 12,
    "4,096 tokens or more, fitted on fewer": lambda shape: shape.tokens >= 4096,
}


def _card(values: Sequence[float], watts: float) -> CardModel:
    slow, fast, slow_half, fast_half, bytes_per_second, launch_seconds, step_seconds = values
    return CardModel(
        name="fitted",
        matmul_flops={"fp32": slow, "fp16": fast},
        half_width={"fp32": slow_half, "fp16": fast_half},
        bytes_per_second=bytes_per_second,
        launch_seconds=launch_seconds,
        step_seconds=step_seconds,
        watts=watts,
    )


Errors = Callable[[Iterable[Measured], CardModel], list[float]]


def _print_errors(name: str, rows: Sequence[Measured], card: CardModel, errors_of: Errors = relative_errors) -> None:
    for precision in _PRECISIONS:
        _print_line(name, precision, errors_of([row for row in rows if row.precision == precision], card))


def _print_line(name: str, precision: str, errors: Sequence[float]) -> None:
    middle, ninth = np.quantile(errors, [0.5, 0.9])
    print(f"{name:44} {precision:9} {len(errors):5} {middle:7.1%} {ninth:6.1%} {max(errors):8.1%}")


if __name__ == "__main__":
    main()
