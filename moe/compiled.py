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
from moe.slots import Path, Slots, arrange
from moe.space.experts import ExpertKind


@torch.library.custom_op("blueberry::arrange", mutates_args=())
def arrange_op(
    experts_NK: Tensor, load_E: Tensor, path: str, slots: int | None, d_model: int, d_expert: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """moe.slots.arrange() for the type of `like`."""
    layout = arrange(
        experts_NK,
        load_E,
        path=cast("Path", path),
        slots=slots,
        d_model=d_model,
        d_expert=d_expert,
        dtype=like.dtype,
    )
    return layout.token_R, layout.slot_A, layout.bag_N, layout.rows_E


@arrange_op.register_fake
def _(
    experts_NK: Tensor, load_E: Tensor, path: str, slots: int | None, d_model: int, d_expert: int, like: Tensor
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
) -> tuple[Tensor, Tensor]:
    """moe.dispatch.compute()."""
    slots = Slots(token_R, slot_A, bag_N, rows_E)
    return compute(x_ND, gate_A, w_in, w_out, slots, cast("ExpertKind", kind), keep)


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
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), x_ND.new_empty(token_R.shape[0] if keep else 0, w_in.shape[1])


@torch.library.custom_op("blueberry::mix_gradients", mutates_args=())
def gradients_op(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_A: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    hidden_RG: Tensor,
    token_R: Tensor,
    slot_A: Tensor,
    bag_N: Tensor,
    rows_E: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """moe.dispatch.gradients()."""
    slots = Slots(token_R, slot_A, bag_N, rows_E)
    return gradients(grad_ND, x_ND, gate_A, w_in, w_out, hidden_RG, slots, cast("ExpertKind", kind))


@gradients_op.register_fake
def _(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_A: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    hidden_RG: Tensor,
    token_R: Tensor,
    slot_A: Tensor,
    bag_N: Tensor,
    rows_E: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x_ND), torch.empty_like(gate_A), torch.empty_like(w_in), torch.empty_like(w_out)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_ND, gate_A, w_in, w_out, *slots, kind, _ = inputs
    ctx.save_for_backward(x_ND, gate_A, w_in, w_out, output[1], *slots)
    ctx.kind = kind
    ctx.set_materialize_grads(False)  # nobody differentiates the hidden layer


def _backward(ctx: Any, grad_ND: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *gradients_op(grad_ND, *ctx.saved_tensors, ctx.kind), *[None] * 6


mix_op.register_autograd(_backward, setup_context=_setup)
