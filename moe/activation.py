"""What a feed-forward network does between its two products, and the derivative of that.

Experts keep only their hidden layer for the backward pass, so the derivative is written by hand here; dense layers
leave it to autograd.

F hidden width; G width of the first product: 2 * F where it is gated (gate columns, then up columns), otherwise F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.space.experts import ExpertKind


def activate(hidden: Tensor, kind: ExpertKind) -> Tensor:
    """[..., G] to [..., F]: SiLU or GELU times the up columns, squared ReLU, or SiLU."""
    match kind:
        case "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            return F.silu(gate) * up
        case "geglu":
            gate, up = hidden.chunk(2, dim=-1)
            return F.gelu(gate) * up
        case "relu2":
            return F.relu(hidden).square()
        case "mlp":
            return F.silu(hidden)


def differentiate(grad: Tensor, hidden: Tensor, kind: ExpertKind) -> Tensor:
    """The gradient [..., G] of activate() at `hidden` for `grad` [..., F]. May overwrite `grad`; leaves no graph."""
    match kind:
        case "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            grad_up = F.silu(gate).mul_(grad)
            return torch.cat((torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up), dim=-1)
        case "geglu":
            gate, up = hidden.chunk(2, dim=-1)
            grad_up = F.gelu(gate).mul_(grad)
            return torch.cat((torch.ops.aten.gelu_backward(grad.mul_(up), gate), grad_up), dim=-1)
        case "relu2":
            return F.relu(hidden).mul_(grad.mul_(2.0))
        case "mlp":
            grad_hidden: Tensor = torch.ops.aten.silu_backward(grad, hidden)
            return grad_hidden
