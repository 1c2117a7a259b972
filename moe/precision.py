"""In which precision a device multiplies matrices. Torch-free: the runner names its hardware class with it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of one number in a matrix product."""

_BF16_FLAGS = {"x86_64": {"avx512_bf16", "amx_bf16"}, "aarch64": {"bf16"}}


def precision_on(device: Literal["cpu", "cuda"], asked: Literal["auto", "fp32", "bf16", "fp16"]) -> Precision:
    """What a config's `precision` means on a device: auto is fp16 on CUDA (a T4 has no bf16), else cpu_precision()."""
    if asked != "auto":
        return asked

    return "fp16" if device == "cuda" else cpu_precision()


def cpu_precision() -> Precision:
    """bf16 on a CPU that has instructions for it (as Linux lists them), fp32 on others. Never fp16.

    Without the instructions bf16 is emulated, and slower than fp32; fp16 reaches 1.2 GFLOP/s (reference measurement).
    """
    wanted = _BF16_FLAGS.get(platform.machine(), set())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "fp32"

    flags = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return "bf16" if wanted.intersection(flags) else "fp32"
