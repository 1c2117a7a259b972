"""What a step of Muon costs: one by one and batched, in fp32 and bf16, beside fused AdamW on the same matrices.

    .venv/bin/python -m benchmarks.muon [--device cuda] [--threads 2] [--rounds 5] [--models t4 micro]

Real matrices of three models, random gradients: t4 (60 M parameters that Muon takes), the same with 64 narrow experts,
and micro. Variants are interleaved; the table gives medians, minima and, on a CPU, the processor time, which a busy
machine disturbs less. "newton-schulz" is the speed of the iteration alone as if all of the step were it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from moe import muon
from moe.accounting import MUON_BATCH
from moe.config import Config, apply
from moe.model import MoE
from moe.muon import Muon
from moe.optim import build_optimizers
from moe.presets import PRESETS

SHAPES: Mapping[str, Config] = {
    "t4": apply(PRESETS["t4"], {"optimizer": "muon"}),
    "t4-64": apply(PRESETS["t4"], {"optimizer": "muon", "num_experts": 64, "top_k": 8, "d_expert": 192}),
    "micro": apply(PRESETS["micro"], {"optimizer": "muon"}),
}


class Times(NamedTuple):
    """Of one step, in seconds."""

    wall: float
    processor: float


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What a step of Muon costs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} threads"
    print(f"{name}, torch {torch.__version__}, {options.rounds} interleaved rounds\n")
    print("| model | parameters | variant | median ms | lowest ms | processor ms | newton-schulz GFLOP/s |")
    print("|---|---|---|---|---|---|---|")
    for shape in options.models:
        compare(shape, SHAPES[shape], device, options.rounds)


def compare(shape: str, config: Config, device: torch.device, rounds: int) -> None:
    """Prints the rows of one model."""
    steps = variants(config, device)
    seen: dict[str, list[Times]] = {variant: [] for variant in steps}
    matrices = _matrices(config, device)
    count = sum(matrix.numel() for matrix in matrices)
    for number in range(rounds + 1):
        for variant, step in steps.items():
            times = measure(step, device)
            if number > 0:  # the first makes the states, and the kernels
                seen[variant].append(times)

    work = flops(config, device)
    for variant, times_of in seen.items():
        wall = statistics.median(times.wall for times in times_of)
        lowest = min(times.wall for times in times_of)
        processor = statistics.median(times.processor for times in times_of)
        speed = "" if variant.startswith("AdamW") else f"{work / wall / 1e9:.0f}"
        print(
            f"| {shape} | {count / 1e6:.1f} M | {variant} | {wall * 1e3:.1f} | {lowest * 1e3:.1f} | "
            f"{processor * 1e3:.1f} | {speed} |",
            flush=True,
        )


def variants(config: Config, device: torch.device) -> dict[str, Callable[[], object]]:
    """A step of each optimizer, on the same matrices and gradients."""
    adamw = torch.optim.AdamW(_matrices(config, device), lr=1e-3, fused=True)
    full, low = _muon(config, None, device), _muon(config, torch.bfloat16, device)
    return {
        "AdamW, fused": adamw.step,
        "Muon fp32, one by one": lambda: _step(full, batch=1),
        "Muon fp32, batched": lambda: _step(full, batch=MUON_BATCH),
        "Muon bf16, one by one": lambda: _step(low, batch=1),
        "Muon bf16, batched": lambda: _step(low, batch=MUON_BATCH),
    }


def measure(step: Callable[[], object], device: torch.device) -> Times:
    """One call, until the device has done it."""
    _wait(device)
    processor, wall = time.process_time(), time.perf_counter()
    step()
    _wait(device)
    return Times(time.perf_counter() - wall, time.process_time() - processor)


def flops(config: Config, device: torch.device) -> int:
    """Of the Newton-Schulz iterations: per step two products of O x O x I and one of O x O x O, O the shorter side."""
    total = 0
    for group in _muon(config, None, device).param_groups:
        for weight in group["params"]:
            for rows in group["rows"] or (weight.shape[-2],):
                short, long = sorted((rows, weight.shape[-1]))
                total += weight.shape[:-2].numel() * (4 * short * short * long + 2 * short**3)

    return total * config.muon_steps


def _muon(config: Config, compute: torch.dtype | None, device: torch.device) -> Muon:
    model = MoE(config, compute)
    model.init_weights(seed=0)
    model.to(device)
    optimizer = build_optimizers(model, config)[0]
    assert isinstance(optimizer, Muon)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.randn_like(weight)

    return optimizer


def _matrices(config: Config, device: torch.device) -> list[Tensor]:
    return [weight for group in _muon(config, None, device).param_groups for weight in group["params"]]


def _step(optimizer: Muon, batch: int) -> None:
    with mock.patch.object(muon, "MUON_BATCH", batch):
        optimizer.step()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
