"""The experts as operators that torch.compile takes as they are, with a host sync or a loop inside.

A pair for the products and their gradients, and one for the layout, whose size depends on the loads. Outside of a
compiled region the autograd function of moe/dispatch.py is called directly, which costs less.

Letters as in moe/slots.py and moe/dispatch.py.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from moe.dispatch import compute, gradients
from moe.slots import Layout, Slots, arrange
from moe.space.experts import ExpertKind


@torch.library.custom_op("blueberry::arrange", mutates_args=())
def arrange_op(
    experts_NK: Tensor,
    load_GE: Tensor,
    capacity: int | None,
    row_NK: Tensor | None,
    path: str,
    d_model: int,
    d_expert: int,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """moe.slots.arrange() for the type of `like`."""
    layout = arrange(
        experts_NK,
        load_GE,
        capacity,
        row_NK,
        path=cast("Layout", path),
        d_model=d_model,
        d_expert=d_expert,
        dtype=like.dtype,
    )
    return layout.token_R, layout.slot_A.clone(), layout.bag_N, layout.rows_E  # an operator's results are its own


@arrange_op.register_fake
def _(
    experts_NK: Tensor,
    load_GE: Tensor,
    capacity: int | None,
    row_NK: Tensor | None,
    path: str,
    d_model: int,
    d_expert: int,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    return (
        experts_NK.new_empty(context.new_dynamic_size()),
        experts_NK.new_empty(experts_NK.numel()),
        experts_NK.new_empty(experts_NK.shape[0]),
        torch.empty(context.new_dynamic_size(), dtype=torch.long, device="cpu"),
    )


@torch.library.custom_op("blueberry::mix", mutates_args=())
def mix_op(
    x_ND: Tensor,
    gate_A: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    token_R: Tensor,
    slot_A: Tensor,
    bag_N: Tensor,
    rows_E: Tensor,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """moe.dispatch.compute(), with nothing for stacks that needed no cast: an operator returns none of its inputs."""
    slots = Slots(token_R, slot_A, bag_N, rows_E)
    y_ND, hidden_RG, *stacks = compute(x_ND, gate_A, w_in, w_out, slots, cast("ExpertKind", kind), keep)
    low_in, low_out = stacks if w_in.dtype != x_ND.dtype else (x_ND.new_empty(0), x_ND.new_empty(0))
    return y_ND, hidden_RG, low_in, low_out


@mix_op.register_fake
def _(
    x_ND: Tensor,
    gate_A: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    token_R: Tensor,
    slot_A: Tensor,
    bag_N: Tensor,
    rows_E: Tensor,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_RG = x_ND.new_empty(token_R.shape[0] if keep else 0, w_in.shape[1])
    casts = w_in.dtype != x_ND.dtype
    low_in, low_out = [x_ND.new_empty(stack.shape if casts else 0) for stack in (w_in, w_out)]
    return torch.empty_like(x_ND), hidden_RG, low_in, low_out


@torch.library.custom_op("blueberry::mix_gradients", mutates_args=())
def gradients_op(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_A: Tensor,
    low_in: Tensor,
    low_out: Tensor,
    hidden_RG: Tensor,
    token_R: Tensor,
    slot_A: Tensor,
    bag_N: Tensor,
    rows_E: Tensor,
    kind: str,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """moe.dispatch.gradients()."""
    slots = Slots(token_R, slot_A, bag_N, rows_E)
    return gradients(grad_ND, x_ND, gate_A, low_in, low_out, hidden_RG, slots, cast("ExpertKind", kind), weight_dtype)


@gradients_op.register_fake
def _(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_A: Tensor,
    low_in: Tensor,
    low_out: Tensor,
    hidden_RG: Tensor,
    token_R: Tensor,
    slot_A: Tensor,
    bag_N: Tensor,
    rows_E: Tensor,
    kind: str,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_in, grad_out = [torch.empty_like(stack, dtype=weight_dtype) for stack in (low_in, low_out)]
    return torch.empty_like(x_ND), torch.empty_like(gate_A), grad_in, grad_out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_ND, gate_A, w_in, w_out, *slots, kind, _ = inputs
    _, hidden_RG, low_in, low_out = output
    stacks = (low_in, low_out) if w_in.dtype != x_ND.dtype else (w_in, w_out)
    ctx.save_for_backward(x_ND, gate_A, *stacks, hidden_RG, *slots)
    ctx.kind, ctx.dtype = kind, w_in.dtype
    ctx.set_materialize_grads(False)  # nobody differentiates what is kept


def _backward(ctx: Any, grad_ND: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *gradients_op(grad_ND, *ctx.saved_tensors, ctx.kind, ctx.dtype), *[None] * 6


mix_op.register_autograd(_backward, setup_context=_setup)
