"""Experts' products and their gradients, over rows that are laid out expert after expert (moe/slots.py).

One autograd function by hand, for three reasons. Only the hidden layer before the activation is kept, and the weights
as they were cast, a gather and an activation being cheaper to repeat than to store. A few experts at a time, everything
else stays in the processor's cache. And each expert's gradient is written straight into its place in the stack, where
autograd would fill the whole stack with zeros for each expert.

The same lines compute some experts of the loop, with a product each, and all of them padded, in batched products. Sums
over a token's experts are bags of an embedding (torch.embedding_bag): gather, weight and sum in one pass, accumulated
in fp32, in a fixed order.

N tokens, A assignments, E experts, R rows, D d_model, F d_expert, G = 2 * F for gated experts, otherwise F; e
experts and r rows of a part of them, I inputs and O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.activation import activate, activate_with_inner, differentiate
from moe.slots import Slots
from moe.space.experts import ExpertKind
from moe.threads import for_each

PART_ELEMENTS = 2**19
"""Of the hidden layer, worked on at once in the loop: enough to make an operation's fixed cost small (at `micro` the
experts take .79 of the time of one after another), few enough to stay near the processor. From 2**18 to 2**20 all
take equally long, and experts that are larger by themselves do so anyway."""

SHARED_PART_WORK = 25_000_000
"""Multiplications in a part's first product from which on several threads share out the parts: a quarter of a
millisecond, against which their taking turns in Python is little."""

MOST_UNEVEN = 1.2
"""The last thread's rows, as a multiple of an even share, up to which that is faster than to let torch split every
product over all threads (measured with two, 8 experts: equal at 1.15 in fp32, at 1.15 to 1.3 in bf16)."""


def mix(x_ND: Tensor, gate_A: Tensor, w_in: Tensor, w_out: Tensor, slots: Slots, kind: ExpertKind) -> Tensor:
    """Sum of each token's experts, weighted by `gate_A`, in the order of slot_A: 0 where that has no row."""
    y_ND: Tensor = _Mix.apply(  # type: ignore[no-untyped-call]
        x_ND, gate_A, w_in, w_out, slots, kind, torch.is_grad_enabled()
    )
    return y_ND


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gate_A: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        slots: Slots,
        kind: ExpertKind,
        grad_enabled: bool,
    ) -> Tensor:
        keep = grad_enabled and any(ctx.needs_input_grad)
        y_ND, hidden_RG, low_in, low_out = compute(x_ND, gate_A, w_in, w_out, slots, kind, keep)
        if keep:
            ctx.save_for_backward(x_ND, gate_A, low_in, low_out, hidden_RG, *slots)
            ctx.kind, ctx.dtype = kind, w_in.dtype

        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_A, low_in, low_out, hidden_RG, *laid_out = ctx.saved_tensors
        slots = Slots(*laid_out)
        grads = gradients(grad_ND, x_ND, gate_A, low_in, low_out, hidden_RG, slots, ctx.kind, ctx.dtype)
        return *grads, None, None, None


def compute(
    x_ND: Tensor, gate_A: Tensor, w_in: Tensor, w_out: Tensor, slots: Slots, kind: ExpertKind, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mixture [N, D]; to `keep`, the hidden layer [R, G] before the activation (otherwise empty); both stacks.

    The stacks are copies in the type of x_ND, or `w_in` and `w_out` themselves where they are of that type.
    """
    dtype, n_rows = x_ND.dtype, len(slots.token_R)
    hidden_RG = x_ND.new_empty(n_rows if keep else 0, w_in.shape[1])
    y_RD = _room_for_rows(x_ND, n_rows)
    casts = w_in.dtype != dtype
    low_in, low_out = [torch.empty_like(stack, dtype=dtype) if casts else stack for stack in (w_in, w_out)]

    def work(part: _Part) -> None:
        experts, rows, sizes = part
        in_eGD, out_eDF = low_in[experts], low_out[experts]
        if casts:
            torch._foreach_copy_([in_eGD, out_eDF], [w_in[experts], w_out[experts]])

        x_rD = x_ND.index_select(0, slots.token_R[rows])
        hidden_rG = hidden_RG[rows] if keep else x_ND.new_empty(len(x_rD), w_in.shape[1])
        _multiply(x_rD, in_eGD.mT, hidden_rG, sizes)
        _multiply(activate(hidden_rG, kind), out_eDF.mT, y_RD[rows], sizes)

    _for_each_part(work, slots, w_in)
    return _sum_bags(y_RD, slots, gate_A.to(dtype)), hidden_RG, low_in, low_out


def gradients(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_A: Tensor,
    low_in: Tensor,
    low_out: Tensor,
    hidden_RG: Tensor,
    slots: Slots,
    kind: ExpertKind,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x_ND, gate_A, and the stacks in their own type, for the gradient `grad_ND` of the mixture."""
    dtype, n_rows = x_ND.dtype, len(slots.token_R)
    grad_x_RD = _room_for_rows(x_ND, n_rows)
    gate_R1 = x_ND.new_zeros(n_rows + 1).scatter_(0, slots.slot_A, gate_A.to(dtype))[:, None]
    grad_gate_R = gate_A.new_empty(n_rows + 1)
    grad_gate_R[n_rows].zero_()
    grad_w_in, grad_w_out = [torch.empty_like(stack, dtype=weight_dtype) for stack in (low_in, low_out)]
    casts = weight_dtype != dtype

    def work(part: _Part) -> None:
        experts, rows, sizes = part
        token_r, gate_r1, hidden_rG = slots.token_R[rows], gate_R1[rows], hidden_RG[rows]
        in_eGD, out_eDF = low_in[experts], low_out[experts]
        grads = [grad_w_in[experts], grad_w_out[experts]]
        grad_in_eGD, grad_out_eDF = [torch.empty_like(grad, dtype=dtype) for grad in grads] if casts else grads
        grad_y_rD = grad_ND.index_select(0, token_r)
        activated = activate_with_inner(hidden_rG, kind)
        grad_act_rF = torch.empty_like(activated.value)
        _multiply(grad_y_rD, out_eDF, grad_act_rF, sizes)
        torch.sum(activated.value * grad_act_rF, dim=-1, dtype=gate_A.dtype, out=grad_gate_R[rows])
        grad_act_rF.mul_(gate_r1)
        _multiply_experts(grad_y_rD.mul_(gate_r1), activated.value, grad_out_eDF, sizes)
        grad_hidden_rG = differentiate(grad_act_rF, hidden_rG, activated.inner, kind)
        _multiply_experts(grad_hidden_rG, x_ND.index_select(0, token_r), grad_in_eGD, sizes)
        _multiply(grad_hidden_rG, in_eGD, grad_x_RD[rows], sizes)
        if casts:
            torch._foreach_copy_(grads, [grad_in_eGD, grad_out_eDF])

    _for_each_part(work, slots, low_in)
    return _sum_bags(grad_x_RD, slots, None), grad_gate_R.index_select(0, slots.slot_A), grad_w_in, grad_w_out


class _Part(NamedTuple):
    """Consecutive experts that are worked on together, and their rows: `sizes` of each, None for equally many."""

    experts: slice
    rows: slice
    sizes: list[int] | None


def _for_each_part(work: Callable[[_Part], None], slots: Slots, w_in: Tensor) -> None:
    """One after another, or on a CPU shared out among its threads, the longest first, if that fills them evenly."""
    parts = sorted(_parts(slots, w_in), key=lambda part: part.rows.start - part.rows.stop)
    threads = torch.get_num_threads()
    busy = [0] * threads
    for part in parts:
        busy[busy.index(min(busy))] += part.rows.stop - part.rows.start

    if w_in.is_cpu and 1 < threads <= len(parts) and threads * max(busy) <= MOST_UNEVEN * len(slots.token_R):
        for_each(work, parts)
        return

    for part in parts:
        work(part)


def _parts(slots: Slots, w_in: Tensor) -> Iterator[_Part]:
    """All experts at once where they are padded, otherwise some, one at least: equal shares for several threads."""
    n_rows = len(slots.token_R)
    if len(slots.rows_E) == 0:
        yield _Part(slice(None), slice(0, n_rows), None)
        return

    most = PART_ELEMENTS // w_in.shape[1]
    threads = torch.get_num_threads()
    if threads > 1 and (shares := n_rows * w_in[0].numel() // (threads * SHARED_PART_WORK)):
        most = min(most, -(-n_rows // (threads * shares)))

    sizes: list[int] = []
    start = first = 0
    for expert, size in enumerate(slots.rows_E.tolist()):
        if sizes and sum(sizes) + size > most:
            yield _Part(slice(first, expert), slice(start, start + sum(sizes)), sizes)
            first, start, sizes = expert, start + sum(sizes), []

        sizes.append(size)

    yield _Part(slice(first, None), slice(start, n_rows), sizes)


def _multiply(a_rI: Tensor, b_eIO: Tensor, out_rO: Tensor, sizes: list[int] | None) -> None:
    """Each expert's rows with its matrix."""
    if sizes is None:
        torch.bmm(_by_expert(a_rI, len(b_eIO)), b_eIO, out=_by_expert(out_rO, len(b_eIO)))
    elif len(sizes) == 1:  # as below, without the views: 3 % of the layer of 64 experts on two threads
        torch.mm(a_rI, b_eIO[0], out=out_rO)
    else:
        for a, b, out in zip(torch.split(a_rI, sizes), b_eIO.unbind(), torch.split(out_rO, sizes), strict=True):
            torch.mm(a, b, out=out)


def _multiply_experts(a_rO: Tensor, b_rI: Tensor, out_eOI: Tensor, sizes: list[int] | None) -> None:
    """Sums over each expert's rows of the outer products: a gradient of its matrix."""
    if sizes is None:
        torch.bmm(_by_expert(a_rO, len(out_eOI)).mT, _by_expert(b_rI, len(out_eOI)), out=out_eOI)
    elif len(sizes) == 1:
        torch.mm(a_rO.mT, b_rI, out=out_eOI[0])
    else:
        for a, b, out in zip(torch.split(a_rO, sizes), torch.split(b_rI, sizes), out_eOI.unbind(), strict=True):
            torch.mm(a.mT, b, out=out)


def _by_expert(rows_rI: Tensor, n_experts: int) -> Tensor:
    return rows_rI.view(n_experts, len(rows_rI) // n_experts, rows_rI.shape[1])


def _room_for_rows(x_ND: Tensor, n_rows: int) -> Tensor:
    # Room for a result of each row, and a zero that stands for a dropped assignment's.
    y_RD = x_ND.new_empty(n_rows + 1, x_ND.shape[1])
    y_RD[n_rows].zero_()
    return y_RD


def _sum_bags(y_RD: Tensor, slots: Slots, weight_A: Tensor | None) -> Tensor:
    return torch.embedding_bag(y_RD, slots.slot_A, slots.bag_N, mode=0, per_sample_weights=weight_A)[0]
