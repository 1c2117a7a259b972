"""Experts' products and their gradients, over rows that are laid out expert after expert (moe/slots.py).

One autograd function by hand, for three reasons. Only the hidden layer before the activation is kept, a gather and an
activation being cheaper to repeat than to store. An expert at a time, everything else stays in the processor's cache.
And each expert's gradient is written straight into its place in the stack, where autograd would fill the whole stack
with zeros for each expert.

The same lines compute one expert of the loop ([n, D], plain products) and all of them padded ([E, S, D], batched
products). Sums over a token's experts are bags of an embedding (torch.embedding_bag): gather, weight and sum in one
pass, accumulated in fp32, in a fixed order.

N tokens, A assignments, E experts, R rows, D d_model, F d_expert, G = 2 * F for gated experts, otherwise F.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.activation import activate, differentiate
from moe.slots import Slots
from moe.space.experts import ExpertKind


def mix(x_ND: Tensor, gate_R: Tensor, w_in: Tensor, w_out: Tensor, slots: Slots, kind: ExpertKind) -> Tensor:
    """Sum of each token's experts, weighted by the gates of its rows. `gate_R` has R + 1 entries, the last one 0."""
    y_ND: Tensor = _Mix.apply(  # type: ignore[no-untyped-call]
        x_ND, gate_R, w_in, w_out, slots, kind, torch.is_grad_enabled()
    )
    return y_ND


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gate_R: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        slots: Slots,
        kind: ExpertKind,
        grad_enabled: bool,
    ) -> Tensor:
        keep = grad_enabled and any(ctx.needs_input_grad)
        y_ND, hidden_RG = compute(x_ND, gate_R, w_in, w_out, slots, kind, keep)
        if keep:
            ctx.save_for_backward(x_ND, gate_R, w_in, w_out, hidden_RG, *slots)
            ctx.kind = kind

        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_R, w_in, w_out, hidden_RG, *slots = ctx.saved_tensors
        return *gradients(grad_ND, x_ND, gate_R, w_in, w_out, hidden_RG, Slots(*slots), ctx.kind), None, None, None


def compute(
    x_ND: Tensor, gate_R: Tensor, w_in: Tensor, w_out: Tensor, slots: Slots, kind: ExpertKind, keep: bool
) -> tuple[Tensor, Tensor]:
    """The mixture [N, D] and, to `keep`, the hidden layer [R, G] before the activation (otherwise empty)."""
    dtype, n_rows = x_ND.dtype, len(slots.token_R)
    hidden_RG = x_ND.new_empty(n_rows if keep else 0, w_in.shape[1])
    y_RD = x_ND.new_empty(n_rows + 1, x_ND.shape[1])
    y_RD[n_rows].zero_()
    x_ND = _with_zero_row(x_ND)
    stacks = (slots.token_R, y_RD[:n_rows], *([hidden_RG] if keep else []))
    for (token, y, *hidden), (w_in_e, w_out_e) in _experts(slots, stacks, (w_in, w_out)):
        a = torch.matmul(_gather(x_ND, token), w_in_e.to(dtype).mT, out=hidden[0] if keep else None)
        torch.matmul(activate(a, kind), w_out_e.to(dtype).mT, out=y)

    weight_A = gate_R.to(dtype).index_select(0, slots.slot_A)
    return _sum_bags(y_RD, slots, weight_A), hidden_RG


def gradients(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_R: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    hidden_RG: Tensor,
    slots: Slots,
    kind: ExpertKind,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x_ND, gate_R, w_in and w_out, for the gradient `grad_ND` of the mixture."""
    dtype, n_rows = x_ND.dtype, len(slots.token_R)
    grad_x_RD = x_ND.new_empty(n_rows + 1, x_ND.shape[1])
    grad_x_RD[n_rows].zero_()
    grad_gate_R = torch.empty_like(gate_R)
    grad_gate_R[n_rows].zero_()
    grad_w_in, grad_w_out = torch.empty_like(w_in), torch.empty_like(w_out)
    x_ND, grad_ND = _with_zero_row(x_ND), _with_zero_row(grad_ND)
    stacks = (slots.token_R, hidden_RG, gate_R[:n_rows].to(dtype), grad_x_RD[:n_rows], grad_gate_R[:n_rows])
    weights = (w_in, w_out, grad_w_in, grad_w_out)
    for (token, hidden, gate, grad_x, grad_gate), (w_in_e, w_out_e, grad_w_in_e, grad_w_out_e) in _experts(
        slots, stacks, weights
    ):
        grad_y = _gather(grad_ND, token)
        act = activate(hidden, kind)
        grad_act = torch.matmul(grad_y, w_out_e.to(dtype))
        torch.sum(act * grad_act, dim=-1, dtype=grad_gate.dtype, out=grad_gate)
        grad_act.mul_(gate.unsqueeze(-1))
        _product_into(grad_w_out_e, grad_y.mul_(gate.unsqueeze(-1)).mT, act)
        grad_hidden = differentiate(grad_act, hidden, kind)
        _product_into(grad_w_in_e, grad_hidden.mT, _gather(x_ND, token))
        torch.matmul(grad_hidden, w_in_e.to(dtype), out=grad_x)

    return _sum_bags(grad_x_RD, slots, None), grad_gate_R, grad_w_in, grad_w_out


def _experts(
    slots: Slots, stacks: tuple[Tensor, ...], weights: tuple[Tensor, ...]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Views of row-wise `stacks` and expert-wise `weights`: of all experts at once, or one after another."""
    n_experts = len(weights[0])
    if len(slots.rows_E) == 0:
        yield tuple(torch.unflatten(stack, 0, (n_experts, len(stack) // n_experts)) for stack in stacks), weights
        return

    rows = slots.rows_E.tolist()
    of_experts = zip(*(torch.split(stack, rows) for stack in stacks), strict=True)
    for part, matrices in zip(of_experts, zip(*(weight.unbind() for weight in weights), strict=True), strict=True):
        if len(part[0]):
            yield part, matrices
        else:
            for gradient in matrices[2:]:
                gradient.zero_()


def _with_zero_row(x_ND: Tensor) -> Tensor:
    # For rows without a token. Some other token's values would do as well, being weighted by 0, if they were finite.
    return F.pad(x_ND, (0, 0, 0, 1))


def _gather(x_ND: Tensor, token: Tensor) -> Tensor:
    return x_ND.index_select(0, token.flatten()).view(*token.shape, x_ND.shape[1])


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.matmul(a, b, out=out)
    else:
        out.copy_(torch.matmul(a, b))


def _sum_bags(y_RD: Tensor, slots: Slots, weight_A: Tensor | None) -> Tensor:
    return torch.embedding_bag(y_RD, slots.slot_A, slots.bag_N, mode=0, per_sample_weights=weight_A)[0]
