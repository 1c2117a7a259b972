"""Cross entropy over a vocabulary of any size without ever holding all logits.

With 49,152 words the logits of the t4 preset's micro-batch, their softmax and their gradient take 7 GB at once. Here
the gradient of a chunk of tokens is computed right after its loss, from the same logits, so that only the gradients of
inputs and head are kept, and no product is computed twice (the idea of Liger Kernel, arXiv:2410.10989, in plain matrix
products).

N tokens, n tokens of one chunk, r the most that a chunk has, V vocabulary, v a part of it, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.accounting import LOGITS_CHUNK

HALF_SCALE = 2.0**10
"""The logits' gradient is multiplied by this in fp16, where a value below 6e-5 loses digits and one below 6e-8 is 0."""

WORDS = 4096  # rows of the head's gradient added at a time: few enough for the fp32 sums to stay in the CPU's cache


def sum_nats(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, softcap: float = 0.0, chunk: int = LOGITS_CHUNK
) -> Tensor:
    """Total cross entropy in nats, holding at most `chunk` logits at once.

    Its gradients are computed here as well, unless nothing requires them. The backward pass only scales them, in
    place, so a second backward pass through the same result is an error.
    """
    nats: Tensor = _Nats.apply(  # type: ignore[no-untyped-call]
        x_ND, head_VD, targets_N, softcap, chunk, torch.is_grad_enabled()
    )
    return nats


def cap(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits themselves for 0 (Gemma 2, arXiv:2408.00118)."""
    return logits if softcap == 0.0 else softcap * torch.tanh(logits / softcap)


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, softcap: float, chunk: int, grad_enabled: bool
    ) -> Tensor:
        n_rows = min(len(x_ND), max(1, chunk // len(head_VD)))
        low_VD = head_VD.to(x_ND.dtype)
        # Two buffers for all chunks: the system takes longer to hand out fresh pages than the arithmetic does.
        low_rV = x_ND.new_empty(n_rows, len(head_VD))
        wide_rV = low_rV.to(torch.promote_types(x_ND.dtype, torch.float32))
        keep = grad_enabled and any(ctx.needs_input_grad)
        grad_x_ND = torch.empty_like(x_ND) if keep else None
        grad_head_VD = torch.zeros_like(head_VD) if keep else None
        ctx.scale = HALF_SCALE if x_ND.dtype == torch.float16 else 1.0

        nats = wide_rV.new_zeros(())
        for start in range(0, len(x_ND), n_rows):
            x_nD, targets_n = x_ND[start : start + n_rows], targets_N[start : start + n_rows]
            low_nV, wide_nV = low_rV[: len(x_nD)], wide_rV[: len(x_nD)]
            torch.mm(x_nD, low_VD.T, out=low_nV)
            wide_nV.copy_(low_nV)
            nats += _nats_and_gradient(wide_nV, targets_n, softcap)
            if grad_x_ND is not None and grad_head_VD is not None:
                low_nV.copy_(wide_nV.mul_(ctx.scale) if ctx.scale != 1.0 else wide_nV)
                torch.mm(low_nV, low_VD, out=grad_x_ND[start : start + n_rows])
                _add_products(grad_head_VD, low_nV, x_nD / ctx.scale if ctx.scale != 1.0 else x_nD)

        if keep:
            ctx.save_for_backward(grad_x_ND, grad_head_VD)

        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_head_VD = ctx.saved_tensors
        return grad_x_ND.mul_(grad / ctx.scale), grad_head_VD.mul_(grad), None, None, None, None


def _nats_and_gradient(logits_nV: Tensor, targets_n: Tensor, softcap: float) -> Tensor:
    """The cross entropy of raw logits, which are overwritten with their gradient."""
    square_nV = None
    if softcap != 0.0:
        logits_nV.div_(softcap).tanh_()
        square_nV = logits_nV.square()
        logits_nV.mul_(softcap)

    target_n1 = targets_n[:, None]
    shifted_n1 = logits_nV.amax(dim=1, keepdim=True) - logits_nV.gather(1, target_n1)
    probs_nV = torch.softmax(logits_nV, dim=1, out=logits_nV)  # rows are read whole before they are written
    nats_n1 = shifted_n1 - probs_nV.amax(dim=1, keepdim=True).log()  # the largest p is 1 / sum(exp(logit - largest))
    probs_nV.scatter_(1, target_n1, torch.expm1(-nats_n1))  # p - 1 without the cancellation
    if square_nV is not None:
        probs_nV.addcmul_(probs_nV, square_nV, value=-1.0)

    return nats_n1.sum()


def _add_products(grad_VD: Tensor, grad_nV: Tensor, x_nD: Tensor) -> None:
    # The sum over chunks is kept in the head's own type, fp32.
    if grad_VD.dtype == x_nD.dtype:
        torch.addmm(grad_VD, grad_nV.T, x_nD, out=grad_VD)
        return

    for grad_vD, part_nv in zip(torch.split(grad_VD, WORDS), torch.split(grad_nV, WORDS, dim=1), strict=True):
        grad_vD += part_nv.T @ x_nD
