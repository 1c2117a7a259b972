"""Element-wise parts of a step with gradients by hand, in fewer passes over memory than autograd makes.

For CPUs, where each pass of a 2,048-token step costs as much as 10 million multiplications. Sums are in fp32 or wider
whatever the type of the input. benchmarks/README.md has what each of them brings.

B sequences, T positions, H heads, W head width, D the normalized width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * scale over the last dimension, in the type of x (arXiv:1910.07467)."""
    if x.is_cuda:  # one kernel each way since torch 2.9; on CPUs its gradient is still taken apart into 20 operations
        return F.rms_norm(x, scale_D.shape, scale_D.to(x.dtype), eps=eps)

    y: Tensor = _RMSNorm.apply(x, scale_D, eps)  # type: ignore[no-untyped-call]
    return y


def rotate(x_BTHW: Tensor, cos_THW: Tensor, sin_THW: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + W / 2]) by its position's angle, rounding once (RoPE, arXiv:2104.09864).

    The tables are those of moe.layers.rotary(), in fp32 or wider and repeated for every head: were they broadcast over
    H, the inner loop of each pass below would be only W numbers long, and the passes three times as slow.
    """
    y_BTHW: Tensor = _Rotate.apply(x_BTHW, cos_THW, sin_THW)  # type: ignore[no-untyped-call]
    return y_BTHW


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale_D, inverse)
        return (wide * inverse).mul_(scale_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With r the inverse root and s the scale: dx = r s g - x r**3 mean(s g x), ds = sum(r g x).
        x, scale_D, inverse = ctx.saved_tensors
        wide, grad_wide = x.to(inverse.dtype), grad.to(inverse.dtype)
        scale_wide = scale_D.to(inverse.dtype)
        product = (grad_wide * wide).reshape(-1, len(scale_D))
        mean = torch.mv(product, scale_wide).view_as(inverse) / len(scale_D)
        grad_scale = torch.mv(product.T, inverse.flatten())
        grad_x = (grad_wide * scale_wide).mul_(inverse).addcmul_(wide, inverse.pow(3).mul_(mean), value=-1.0)
        return grad_x.to(x.dtype), grad_scale.to(scale_D.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHW: Tensor, cos_THW: Tensor, sin_THW: Tensor) -> Tensor:
        ctx.save_for_backward(cos_THW, sin_THW)
        return _turn(x_BTHW, cos_THW, sin_THW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHW: Tensor) -> tuple[Tensor | None, ...]:
        cos_THW, sin_THW = ctx.saved_tensors
        return _turn(grad_BTHW, cos_THW, -sin_THW), None, None


def _turn(x_BTHW: Tensor, cos_THW: Tensor, sin_THW: Tensor) -> Tensor:
    # In fp32, as half a head is too narrow for bf16 vector instructions; contiguous, as roll() is slow on strided rows.
    wide_BTHW = x_BTHW.to(cos_THW.dtype).contiguous()
    others_BTHW = wide_BTHW.roll(x_BTHW.shape[-1] // 2, dims=-1)
    return (wide_BTHW * cos_THW).addcmul_(others_BTHW, sin_THW).to(x_BTHW.dtype)
