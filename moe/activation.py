"""What a feed-forward network does between its two products, and the derivative of that.

Experts keep only their hidden layer for the backward pass, so the derivative is written by hand here; dense layers
leave it to autograd.

F hidden width; G width of the first product: 2 * F where it is gated (gate columns, then up columns), otherwise F.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.space.experts import ExpertKind


class Activated(NamedTuple):
    """`value` [..., F] is the result; `inner` is what differentiate() needs of the way there.

    That is SiLU or GELU of the gate, or the ReLU; for mlp the result itself.
    """

    value: Tensor
    inner: Tensor


def activate(hidden: Tensor, kind: ExpertKind) -> Tensor:
    """[..., G] to [..., F]: SiLU or GELU times the up columns, squared ReLU, or SiLU."""
    return activate_with_inner(hidden, kind).value


def activate_with_inner(hidden: Tensor, kind: ExpertKind) -> Activated:
    """activate(), keeping `inner` for differentiate()."""
    match kind:
        case "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            inner = F.silu(gate)
            return Activated(inner * up, inner)
        case "geglu":
            gate, up = hidden.chunk(2, dim=-1)
            inner = F.gelu(gate)
            return Activated(inner * up, inner)
        case "relu2":
            inner = F.relu(hidden)
            return Activated(inner.square(), inner)
        case "mlp":
            inner = F.silu(hidden)
            return Activated(inner, inner)


def differentiate(grad: Tensor, hidden: Tensor, inner: Tensor, kind: ExpertKind) -> Tensor:
    """The gradient [..., G] of activate() at `hidden` for `grad` [..., F]. May overwrite `grad`; leaves no graph."""
    grad_hidden = torch.empty_like(hidden)
    (gate, up), (grad_gate, grad_up) = hidden.chunk(2, dim=-1), grad_hidden.chunk(2, dim=-1)
    match kind:
        case "swiglu":
            torch.mul(inner, grad, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        case "geglu":
            torch.mul(inner, grad, out=grad_up)
            torch.ops.aten.gelu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        case "relu2":
            torch.mul(inner, grad.mul_(2.0), out=grad_hidden)
        case "mlp":
            torch.ops.aten.silu_backward.grad_input(grad, hidden, grad_input=grad_hidden)

    return grad_hidden
