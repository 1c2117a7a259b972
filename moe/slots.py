"""Where each assignment of a token to an expert is computed: a row of its own, expert after expert.

Two layouts. *Loop*: an expert has as many rows as it has tokens, known from one host sync, and is computed by itself.
*Padded*: all experts have equally many rows, so that they are computed together; rows without a token compute a row of
zeros. With a capacity, the padded layout needs no sync.

N tokens, K experts a token, A = N * K assignments, E experts, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        torch.float32: ((1_000_000, 1.8), (1_000_000_000, 1.2)),
        torch.bfloat16: ((10_000_000, 1.8), (200_000_000, 1.2), (1_000_000_000, 1.05)),
    }
)
"""The same on a CPU with several threads, which wait for each other at the end of every product: fewer, larger ones pay
more often. Read off `python -m benchmarks.moe_layer --kind mlp`, two threads, a machine of its own (2026-11-23)."""

ROW_MULTIPLE: Mapping[tuple[str, torch.dtype], int] = MappingProxyType({("cpu", torch.bfloat16): 16})
"""In the loop an expert's rows are a multiple of this. oneDNN compiles a product again for each new number of rows."""


class Slots(NamedTuple):
    """Rows and who sits in them.

    `token_R`: the token that each row computes, N for none. `slot_A`: token by token, the rows whose results it sums; R
    stands for nothing (a dropped assignment). `bag_N`: where each token's part of slot_A begins. `rows_E`: each
    expert's rows, on the host; empty if all experts have R / E.
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

    if path == "padded":
        rows: list[int] = []
        size = max(loads) if loads is not None else slots or 0
        n_rows = n_experts * size
        first_row_E = torch.arange(0, n_rows, size, device=device) if size else torch.zeros_like(load_E)
    elif loads is None:
        raise ValueError("the loop reads the loads; with a capacity the layout on this device is padded")
    else:
        multiple = ROW_MULTIPLE.get((device.type, dtype), 1)
        rows = [-(-load // multiple) * multiple for load in loads]
        n_rows = sum(rows)
        rows_E = (load_E + multiple - 1) // multiple * multiple
        first_row_E = rows_E.cumsum(0) - rows_E

    expert_A, order_A = experts_NK.flatten().sort(stable=True)
    shift_E = first_row_E - (load_E.cumsum(0) - load_E)
    if slots is not None:  # what was dropped, as expert E, goes to row R
        shift_E = F.pad(shift_E, (0, 1), value=n_rows)

    row_A = torch.arange(len(order_A), device=device) + shift_E[expert_A]
    if slots is not None:
        row_A.clamp_(max=n_rows)

    return Slots(
        token_R=order_A.new_full((n_rows + 1,), n_tokens).scatter_(0, row_A, order_A // top_k)[:n_rows],
        slot_A=torch.empty_like(order_A).scatter_(0, order_A, row_A),
        bag_N=torch.arange(0, len(order_A), top_k, device=device),
        rows_E=torch.tensor(rows, dtype=torch.long),
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
