"""Attention on a CPU in bf16, and in fp32 with casts there and back, as moe/layers.py computes it for short sequences.

    .venv/bin/python -m benchmarks.attention

Processor time of one thread. The two take turns; medians over the rounds, in ms, and bf16 / fp32 of the sums.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from moe.allocator import keep_freed_memory

SHAPES = (  # sequences, heads, positions, head width
    (8, 2, 64, 16),
    (4, 2, 64, 32),
    (4, 4, 128, 16),
    (8, 4, 128, 32),
    (4, 4, 256, 16),
    (4, 8, 256, 48),
    (4, 8, 384, 48),
    (4, 8, 512, 48),
    (4, 6, 512, 64),
    (1, 8, 2048, 48),
)


def milliseconds(shape: tuple[int, int, int, int], attend_in: torch.dtype) -> tuple[float, float]:
    """Of the forward and of the backward pass, for queries, keys and values in bf16, laid out as in a model."""
    sequences, heads, positions, width = shape
    inputs = [
        torch.randn(sequences, positions, heads, width, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    start = time.process_time()
    q, k, v = (x.to(attend_in) for x in inputs)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).to(torch.bfloat16)
    forward = time.process_time() - start
    grad = torch.randn_like(y)
    start = time.process_time()
    torch.autograd.grad(y, inputs, grad)
    return forward * 1e3, (time.process_time() - start) * 1e3


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()

    print(
        "| sequences x heads x positions x width | bf16: forward | backward | fp32: forward | backward | bf16 / fp32 |"
    )
    print(f"|{'---|' * 6}")
    for shape in SHAPES:
        times: dict[torch.dtype, list[tuple[float, float]]] = {torch.bfloat16: [], torch.float32: []}
        for number in range(arguments.rounds + 2):
            for dtype, taken in times.items():
                both = milliseconds(shape, dtype)
                if number >= 2:
                    taken.append(both)

        medians = [statistics.median(values) for taken in times.values() for values in zip(*taken, strict=True)]
        ratio = (medians[0] + medians[1]) / (medians[2] + medians[3])
        name = " x ".join(str(size) for size in shape)
        print(f"| {name} | {' | '.join(f'{median:.2f}' for median in medians)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
