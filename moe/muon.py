"""Muon: momentum whose every matrix is orthogonalized before it is applied (kellerjordan.github.io/posts/muon).

What torch.optim.Muon computes, here also for stacks of experts, many matrices in one batched product, and in the
precision that the caller names. Updates have the size of AdamW's, so its learning rate and weight decay carry over
(Moonlight, arXiv:2502.16982, equation 4).

B matrices of one shape, O rows, I columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.accounting import MUON_BATCH
from moe.adamw import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic: steep at zero, and after five steps singular values lie between 0.68 and 1.21."""

EPS = 1e-7  # least norm that a matrix is divided by, as in Jordan's code: a zero gradient stays zero
RMS = 0.2  # of AdamW's updates, as measured by Moonlight; an orthogonal O x I matrix has 1 / sqrt(max(O, I))


class Muon(Optimizer):
    """Parameters [..., O, I] are stacks of matrices; each is a matrix of its own.

    A group may have `rows`: the heights of several matrices that its parameters hold one below the other, such as the
    projections to queries, keys and values. They are joined for speed alone, so each is orthogonalized by itself.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            steps: of the Newton-Schulz iteration.
            dtype: in which it computes; None is that of the weights. bf16 is enough, fp16 is not.
        """
        self.dtype = dtype
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps, "rows": None}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply the gradients. Parameters without one stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            self._update(group)

        return loss

    def _update(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[_Stack]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is None:
                continue

            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)

            state["momentum"].lerp_(weight.grad, 1.0 - group["momentum"])
            weight.mul_(1.0 - group["lr"] * group["weight_decay"])
            for stack in _stacks(weight, weight.grad, state["momentum"], group["rows"]):
                by_shape[stack.weight.shape[1:]].append(stack)

        for (height, width), stacks in by_shape.items():
            for batch in _batches(stacks, max(1, MUON_BATCH // (height * width))):
                self._turn(batch, group)

    def _turn(self, batch: list[_Stack], group: dict[str, Any]) -> None:
        # Nesterov momentum. That it is a mean, and not a sum, is a factor, which the norm divides out.
        ahead_BOI = torch.cat([stack.gradient.lerp(stack.momentum, group["momentum"]) for stack in batch])
        update_BOI = orthogonalize(ahead_BOI, steps=group["steps"], dtype=self.dtype)
        size = group["lr"] * RMS * math.sqrt(max(update_BOI.shape[1:]))
        parts = torch.split(update_BOI, [len(stack.weight) for stack in batch])
        for stack, part in zip(batch, parts, strict=True):
            stack.weight.add_(part, alpha=-size)


def orthogonalize(matrices_BOI: Tensor, *, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Each matrix with its singular values brought near 1, and its singular vectors kept, by Newton-Schulz.

    Rows may not outnumber columns (transposed, nothing changes but the cost). Zero stays zero.
    """
    a, b, c = COEFFICIENTS
    norm_B11 = torch.linalg.matrix_norm(matrices_BOI, keepdim=True)
    x_BOI: Tensor = (matrices_BOI / norm_B11.clamp_min(EPS)).to(dtype or matrices_BOI.dtype)
    for _ in range(steps):
        gram_BOO = x_BOI @ x_BOI.mT
        factor_BOO = torch.baddbmm(gram_BOO, gram_BOO, gram_BOO, beta=b, alpha=c)
        x_BOI = torch.baddbmm(x_BOI, factor_BOO, x_BOI, beta=a)

    return x_BOI.to(matrices_BOI.dtype)


class _Stack(NamedTuple):
    """Matrices [B, O, I] of one parameter, O at most I, as views of it, its gradient and its momentum."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor


def _stacks(weight: Tensor, gradient: Tensor, momentum: Tensor, rows: tuple[int, ...] | None) -> Iterator[_Stack]:
    shape = (-1, *weight.shape[-2:])
    tensors = weight.view(shape), gradient.reshape(shape), momentum.reshape(shape)
    heights = rows or (weight.shape[-2],)
    for parts in zip(*(torch.split(tensor, list(heights), dim=1) for tensor in tensors), strict=True):
        tall = parts[0].shape[1] > parts[0].shape[2]
        yield _Stack(*(part.mT if tall else part for part in parts))


def _batches(stacks: list[_Stack], most: int) -> Iterator[list[_Stack]]:
    # The stacks one after another, cut every `most` matrices.
    ends = [0]
    for stack in stacks:
        ends.append(ends[-1] + len(stack.weight))

    for first in range(0, ends[-1], most):
        batch = []
        for stack, (start, end) in zip(stacks, pairwise(ends), strict=True):
            low, high = max(first, start) - start, min(first + most, end) - start
            if low < high:
                batch.append(_Stack(*(tensor[low:high] for tensor in stack)))

        yield batch
