"""Where each assignment of a token to an expert is computed: a row of its own, expert after expert.

Two layouts. *Loop*: an expert has as many rows as it has tokens, known from one host sync, and is computed by itself.
*Padded*: all experts have equally many rows, so that they are computed together, some rows for nobody. With a
capacity, the padded layout needs no sync.

N tokens, K experts a token, A = N * K assignments, E experts, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Path = Literal["auto", "loop", "padded"]

OTHER_PADDING = ((1 << 28, 1.25),)  # unmeasured: a loop of 18 launches of 8 us is as long as these products on a T4

MOST_PADDING: Mapping[tuple[str, torch.dtype], tuple[tuple[int, float], ...]] = MappingProxyType(
    {
        ("cpu", torch.float32): ((300_000, 1.8), (1_000_000, 1.25), (5_000_000, 1.1), (10_000_000, 1.05)),
        ("cpu", torch.bfloat16): ((1_000_000, 2.0), (5_000_000, 1.3), (10_000_000, 1.2), (40_000_000, 1.04)),
    }
)
"""By device and type: up to how many multiplications in one product of one expert, how many rows an assignment pay.

Medians of `python -m benchmarks.moe_layer --table --threads 1` on an AMD EPYC with AVX-512 (2026-11-23); never over 2,
for the sake of memory.
"""

MOST_PADDING_THREADS: Mapping[torch.dtype, tuple[tuple[int, float], ...]] = MappingProxyType(
    {
        torch.float32: ((300_000, 1.7), (1_000_000, 1.4), (10_000_000, 1.1)),
        torch.bfloat16: ((1_000_000, 1.7), (10_000_000, 1.25), (40_000_000, 1.1)),
    }
)
"""The same on a CPU with several threads (`--table --threads 2`), which share out the loop (moe/threads.py)."""

ROW_MULTIPLE: Mapping[tuple[str, torch.dtype], int] = MappingProxyType({("cpu", torch.bfloat16): 8})
"""In the loop an expert's rows are a multiple of this. oneDNN compiles a product again for each new number of rows."""


class Slots(NamedTuple):
    """Rows and who sits in them.

    `token_R`: the token that each row computes; in those that nobody reads, one that was not dropped. `slot_A`: token
    by token, the rows whose results it sums; R stands for nothing (a dropped assignment). `bag_N`: where each token's
    part of slot_A begins. `rows_E`: each expert's rows, on the host; empty if all experts have R / E.
    """

    token_R: Tensor
    slot_A: Tensor
    bag_N: Tensor
    rows_E: Tensor


def choose(
    loads: Sequence[int] | None,
    *,
    assignments: int,
    d_model: int,
    d_expert: int,
    dtype: torch.dtype,
    device: str,
    threads: int = 1,
) -> Literal["loop", "padded"]:
    """The faster layout for experts with these loads; `loads` is None where reading them would cost a sync."""
    if loads is None:
        return "padded"

    padding = len(loads) * max(loads) / assignments
    work = assignments * d_model * d_expert // len(loads)
    steps = MOST_PADDING.get((device, dtype), OTHER_PADDING)
    if device == "cpu" and threads > 1:
        steps = MOST_PADDING_THREADS.get(dtype, OTHER_PADDING)

    return "padded" if any(work <= most_work and padding <= most for most_work, most in steps) else "loop"


def arrange(
    experts_NK: Tensor,
    load_E: Tensor,
    *,
    path: Path,
    slots: int | None,
    d_model: int,
    d_expert: int,
    dtype: torch.dtype,
) -> Slots:
    """Rows for assignments of which `load_E` go to each expert; an assignment to expert E has been dropped.

    Args:
        slots: a bound on every load, known without a sync, where some may have been dropped; None: nothing was.
    """
    (n_tokens, top_k), n_experts, device = experts_NK.shape, len(load_E), experts_NK.device
    loads = load_E.tolist() if slots is None or device.type == "cpu" else None
    if path == "auto":
        path = choose(
            loads,
            assignments=n_tokens * top_k,
            d_model=d_model,
            d_expert=d_expert,
            dtype=dtype,
            device=device.type,
            threads=torch.get_num_threads(),
        )

    if loads is None:
        if path != "padded":
            raise ValueError("the loop reads the loads; with a capacity the layout on this device is padded")

        assert slots is not None
        n_rows = n_experts * slots
        shift_E = torch.arange(0, n_rows + 1, slots, device=device) - F.pad(load_E, (1, 0)).cumsum(0)
    else:
        multiple = ROW_MULTIPLE.get((device.type, dtype), 1)
        rows = [max(loads) if path == "padded" else -(-load // multiple) * multiple for load in loads]
        n_rows = sum(rows)
        firsts = zip(accumulate(rows, initial=0), accumulate(loads, initial=0), strict=True)
        shift_E = torch.tensor([row - place for row, place in firsts], device=device)

    # The last shift is for what was dropped, as expert E, and has no row but R.
    expert_A, order_A = experts_NK.flatten().sort(stable=True)
    token_A = order_A // top_k
    row_A = torch.arange(len(order_A), device=device) + shift_E[expert_A]
    if slots is not None:
        row_A.clamp_(max=n_rows)

    return Slots(
        token_R=token_A[:1].expand(n_rows + 1).clone().scatter_(0, row_A, token_A)[:n_rows],
        slot_A=torch.empty_like(order_A).scatter_(0, order_A, row_A),
        bag_N=torch.arange(0, len(order_A), top_k, device=device),
        rows_E=torch.tensor([] if path == "padded" else rows, dtype=torch.long),
    )


def arrange_chosen(tokens_EC: Tensor, n_tokens: int) -> Slots:
    """Rows for experts that took C tokens each; a token may have any number of them."""
    token_R = tokens_EC.flatten()
    load_N = token_R.new_zeros(n_tokens).scatter_add_(0, token_R, torch.ones_like(token_R))
    return Slots(
        token_R=token_R,
        slot_A=token_R.argsort(stable=True),
        bag_N=load_N.cumsum(0) - load_N,
        rows_E=torch.empty(0, dtype=torch.long),
    )
