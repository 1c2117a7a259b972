"""Where each assignment of a token to an expert is computed: a row of its own, expert after expert.

Two layouts. *Loop*: an expert has as many rows as it has tokens, known from one host sync, and is computed by itself.
*Padded*: all experts have equally many rows, so that they are computed together, some rows for nobody. With a
capacity, the padded layout needs no sync: it has a row for every token that an expert could be given.

N tokens, K experts a token, A = N * K assignments, G routing groups, E experts, C tokens that an expert takes, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["auto", "loop", "padded"]

OTHER_PADDING = ((1 << 28, 1.25),)  # unmeasured: a loop of 18 launches of 8 us is as long as these products on a T4

MOST_PADDING: Mapping[tuple[str, torch.dtype], tuple[tuple[int, float], ...]] = MappingProxyType(
    {
        ("cpu", torch.float32): ((100_000, 1.5), (500_000, 1.25), (2_000_000, 1.13), (7_000_000, 1.04)),
        ("cpu", torch.bfloat16): ((500_000, 2.0), (2_000_000, 1.5), (7_000_000, 1.19), (20_000_000, 1.14)),
    }
)
"""By device and type: up to how many multiplications in one product of one expert, how many rows an assignment pay.

Medians of `python -m benchmarks.moe_layer --table --threads 1` on an AMD EPYC with AVX-512 (2026-11-23), each for as
much work as is nearest to it; never over 2, for the sake of memory.
"""

MOST_PADDING_THREADS: Mapping[torch.dtype, tuple[tuple[int, float], ...]] = MappingProxyType(
    {
        torch.float32: ((100_000, 1.9), (500_000, 1.7), (2_000_000, 1.4), (20_000_000, 1.12)),
        torch.bfloat16: ((500_000, 2.0), (2_000_000, 1.7), (20_000_000, 1.25), (50_000_000, 1.11)),
    }
)
"""The same on a CPU with several threads (`--table --threads 2`), which share out the loop (moe/threads.py)."""

ROW_MULTIPLE: Mapping[tuple[str, torch.dtype], int] = MappingProxyType({("cpu", torch.bfloat16): 8})
"""An expert's rows are a multiple of this. oneDNN compiles a product again for each new number of rows."""


class Slots(NamedTuple):
    """Rows and who sits in them.

    `token_R`: the token that each row computes; a row whose result nobody reads has some token that was not dropped.
    `slot_A`: the row of each assignment, token by token; R, which is no row, for a dropped one. `bag_N`: where each
    token's assignments begin in slot_A. `rows_E`: how many rows each expert has, on the host; empty if all have R / E.
    """

    token_R: Tensor
    slot_A: Tensor
    bag_N: Tensor
    rows_E: Tensor


def choose(
    rows: int,
    *,
    n_experts: int,
    assignments: int,
    d_model: int,
    d_expert: int,
    dtype: torch.dtype,
    device: str,
    threads: int = 1,
) -> Literal["loop", "padded"]:
    """The faster layout; padded, each expert has `rows` rows."""
    padding = n_experts * rows / assignments
    work = assignments * d_model * d_expert // n_experts
    steps = MOST_PADDING.get((device, dtype), OTHER_PADDING)
    if device == "cpu" and threads > 1:
        steps = MOST_PADDING_THREADS.get(dtype, OTHER_PADDING)

    return "padded" if any(work <= most_work and padding <= most for most_work, most in steps) else "loop"


def arrange(
    experts_NK: Tensor,
    load_GE: Tensor,
    capacity: int | None,
    row_NK: Tensor | None,
    *,
    path: Layout,
    d_model: int,
    d_expert: int,
    dtype: torch.dtype,
) -> Slots:
    """Rows for the assignments of a moe.routing.TokenChoice."""
    (n_tokens, top_k), (n_groups, n_experts), device = experts_NK.shape, load_GE.shape, experts_NK.device
    faster = partial(
        choose,
        n_experts=n_experts,
        assignments=n_tokens * top_k,
        d_model=d_model,
        d_expert=d_expert,
        dtype=dtype,
        device=device.type,
        threads=torch.get_num_threads(),
    )
    if capacity is not None and row_NK is not None:
        rows = n_groups * capacity
        if path == "padded" or (path == "auto" and (device.type != "cpu" or faster(rows) == "padded")):
            return _arrange_served(row_NK, n_experts * rows)

        experts_NK, load_GE = row_NK // rows, load_GE.clamp_max(capacity)

    loads = [sum(column) for column in zip(*load_GE.tolist(), strict=True)]
    return _arrange_sorted(experts_NK, loads, faster(max(loads)) if path == "auto" else path, dtype)


def _arrange_served(row_NK: Tensor, n_rows: int) -> Slots:
    """Padded with the rows that a capacity allows, without looking at a value."""
    (n_tokens, top_k), device = row_NK.shape, row_NK.device
    token_R = torch.zeros(n_rows + 1, dtype=torch.long, device=device)  # token 0 is served first, so never dropped
    token_R[row_NK] = torch.arange(n_tokens, device=device)[:, None]
    return Slots(
        token_R=token_R[:n_rows],
        slot_A=row_NK.flatten(),
        bag_N=torch.arange(0, n_tokens * top_k, top_k, device=device),
        rows_E=torch.empty(0, dtype=torch.long),
    )


def _arrange_sorted(
    experts_NK: Tensor, loads: Sequence[int], path: Literal["loop", "padded"], dtype: torch.dtype
) -> Slots:
    """With as many rows as these loads need; an assignment to expert E has been dropped."""
    (n_tokens, top_k), device = experts_NK.shape, experts_NK.device
    multiple = ROW_MULTIPLE.get((device.type, dtype), 1)
    rows = [-(-(max(loads) if path == "padded" else load) // multiple) * multiple for load in loads]
    n_rows = sum(rows)
    firsts = zip(accumulate(rows, initial=0), accumulate(loads, initial=0), strict=True)
    shift_E = torch.tensor([row - place for row, place in firsts], device=device)

    # The last shift is for what was dropped and has no row but R.
    expert_A, order_A = experts_NK.flatten().sort(stable=True)
    token_A = order_A // top_k
    row_A = torch.arange(len(order_A), device=device) + shift_E[expert_A]
    if sum(loads) < len(order_A):
        row_A.clamp_(max=n_rows)

    return Slots(
        token_R=token_A[:1].expand(n_rows + 1).clone().scatter_(0, row_A, token_A)[:n_rows],
        slot_A=torch.empty_like(order_A).scatter_(0, order_A, row_A),
        bag_N=torch.arange(0, n_tokens * top_k, top_k, device=device),
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
