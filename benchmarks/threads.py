"""How fast preset micro trains on the CPU with 1, 2, ... threads, alone and beside another busy process.

    .venv/bin/python -m benchmarks.threads

Variants are interleaved over three rounds; the table gives the median tokens/s, the lowest and the highest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from moe.config import apply
from moe.presets import PRESETS

ROUNDS = 3
TOKENS = 61_440


def tokens_per_second(folder: Path, threads: int, number: int) -> float:
    """One short training run in a process of its own."""
    run = folder / f"{threads}-{number}"
    run.mkdir()
    request = {
        "kind": "train",
        "config": apply(PRESETS["micro"], {"budget_tokens": TOKENS}).model_dump(),
        "baseline": None,
        "seed": 1,
        "device": "cpu",
        "threads": threads,
        "data_dir": str(folder / "data"),
        "split": "val",
    }
    (run / "config.json").write_text(json.dumps(request))
    subprocess.run([sys.executable, "-m", "moe.train", str(run)], check=True)
    summary = json.loads((run / "train.json").read_text())
    return float(summary["tokens"] / summary["seconds"])


def main() -> None:
    """Prints the table."""
    counts = sorted({1, 2, len(os.sched_getaffinity(0))})
    speeds: dict[tuple[int, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        number = 0
        for _ in range(ROUNDS):
            for busy in (False, True):
                other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
                try:
                    for threads in counts:
                        number += 1
                        speed = tokens_per_second(Path(name), threads, number)
                        speeds.setdefault((threads, busy), []).append(speed)
                finally:
                    if other is not None:
                        other.kill()
                        other.wait()

    print("threads  beside a busy process  tokens/s  lowest  highest")
    for (threads, busy), values in sorted(speeds.items()):
        middle = statistics.median(values)
        print(f"{threads:7}  {'yes' if busy else 'no':>21}  {middle:8.0f}  {min(values):6.0f}  {max(values):7.0f}")


if __name__ == "__main__":
    main()
