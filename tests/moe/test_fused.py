"""Gradients by hand are those of the plain formulas, in float64; in low precision they round once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.fused import rms_norm, rotate

EPS = 1e-6


def test_norm_is_the_plain_one() -> None:
    x, scale = _randn(3, 5, 8), _randn(8)
    _agree(rms_norm(x, scale, EPS), F.rms_norm(x, (8,), scale, EPS), x, scale)
    torch.autograd.gradcheck(lambda x, scale: rms_norm(x, scale, EPS), (x, scale))


def test_norm_takes_views_of_heads_and_zeros() -> None:
    x, scale = _randn(2, 4, 3, 8), _randn(8)
    view = x.transpose(1, 2)[..., 2:]
    _agree(rms_norm(view, scale[2:], EPS), F.rms_norm(view, (6,), scale[2:], EPS), x, scale)
    zeros = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    _agree(rms_norm(zeros, scale, EPS), F.rms_norm(zeros, (8,), scale, EPS), zeros, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_sums_in_fp32(dtype: torch.dtype) -> None:
    x, scale = _randn(4, 1000, dtype=dtype), _randn(1000, dtype=torch.float32)
    wide = x.detach().double().requires_grad_()
    y, reference = rms_norm(x, scale, EPS), F.rms_norm(wide, (1000,), scale.double(), EPS)
    assert y.dtype == dtype
    _near(y, reference, dtype)
    weights = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad_x, grad_scale = torch.autograd.grad((y * weights).float().sum(), [x, scale])
    reference_x, reference_scale = torch.autograd.grad((reference * weights.double()).sum(), [wide, scale])
    _near(grad_x, reference_x, dtype)
    _near(grad_scale, reference_scale, torch.float32)


@pytest.mark.parametrize("sliced", [False, True])
def test_rotation_is_the_plain_one(sliced: bool) -> None:
    angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1, 0.01])).double()[:, None]
    x = _randn(2, 6, 4 if sliced else 3, 6)
    view = x[:, :, :3]
    (a, b), cos, sin = view.chunk(2, dim=-1), angles.cos(), angles.sin()
    tables = _tables(angles, heads=3)
    _agree(rotate(view, *tables), torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1), x)
    torch.autograd.gradcheck(lambda x: rotate(x, *tables), (view,))


def test_rotation_of_bf16_rounds_once() -> None:
    cos, sin = _tables(torch.outer(torch.arange(64.0), torch.tensor([1.0, 0.1]))[:, None], heads=2)
    x = _randn(1, 64, 2, 4, dtype=torch.bfloat16)
    exact = rotate(x.double(), cos.double(), sin.double())
    assert torch.equal(rotate(x, cos, sin), exact.bfloat16())


def _tables(angles: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    cos, sin = angles.cos(), angles.sin()
    cosines, sines = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cosines.repeat(1, heads, 1), sines.repeat(1, heads, 1)


def _randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def _agree(ours: Tensor, plain: Tensor, *inputs: Tensor) -> None:
    """In value and in the gradients of a random weighting."""
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    weights = _randn(*ours.shape).detach()
    pairs = zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    )
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


def _near(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert (ours.double() - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()
