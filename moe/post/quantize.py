"""Weights in 8 or 4 bits, rounded to nearest, each group of weights with a scale of its own (symmetric, no zero point).

Only weights are quantized. A matrix is stored packed and turned back where it meets its input, expert by expert: so
the bytes are saved in memory for real, and the time it takes to turn them back is paid in every product. No kernels
of our own: on a T4, as on a CPU, torch has none that multiply packed weights of these layouts.

    int8: one scale per output channel (LLM.int8(), arXiv:2208.07339, for weights alone)
    int4: one scale per `group` weights of a channel, two weights a byte (as in GPTQ's baseline, arXiv:2210.17323)

O output channels, I inputs, G groups of a channel, S weights of a group; stacks of experts come before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moe.experts import Experts
from moe.layers import Attention, Dense

LARGEST = {8: 127, 4: 7}
"""The largest code of so many bits."""

SCALE = torch.float16  # 2 bytes of scale for 64 weights of half a byte; codes are rounded for the scale as stored


class Packed(Tensor):
    """A quantized matrix, or a stack of them, that is its own weights wherever it is used: codes times scales.

    `codes` are [..., O, G, S] int8, or [..., O, G, S / 2] uint8 with two 4-bit codes a byte; `scales` [..., O, G, 1].
    """

    codes: Tensor
    scales: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Packed:
        """`width` is I, which the last group may exceed; `dtype` the type of the weights when they are used."""
        packed: Packed = torch.Tensor._make_wrapper_subclass(
            cls, (*codes.shape[:-2], width), dtype=dtype, device=codes.device
        )
        packed.codes, packed.scales = codes, scales
        return packed

    @property
    def stored_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def weights(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, [..., O, I]."""
        codes = self.codes if self.codes.dtype == torch.int8 else _unpack(self.codes)
        return (codes.to(dtype) * self.scales.to(dtype)).flatten(-2)[..., : self.shape[-1]]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Experts are taken from the stack, and types changed, in packed form; every other operation sees weights."""
        first, kwargs = args[0], kwargs or {}
        if func is torch.ops.aten.detach.default:
            return Packed(first.codes, first.scales, first.shape[-1], first.dtype)

        if func is torch.ops.aten.unbind.int and first.ndim == 3:
            parts = zip(first.codes.unbind(), first.scales.unbind(), strict=True)
            return [Packed(codes, scales, first.shape[-1], first.dtype) for codes, scales in parts]

        if func is torch.ops.aten._to_copy.default:
            return first.weights(kwargs.get("dtype") or first.dtype)

        def unpacked(value: Any) -> Any:
            return value.weights(value.dtype) if isinstance(value, Packed) else value

        return func(*tree_map(unpacked, args), **tree_map(unpacked, kwargs))


class Matrix(NamedTuple):
    """A parameter that quantization may replace, and where it is."""

    module: nn.Module
    name: str
    weight: nn.Parameter


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """The weights of attention, experts and dense layers; not embeddings, the head, routers or norms."""
    for module in model.modules():
        if isinstance(module, Attention | Experts | Dense):
            for name, weight in list(module.named_parameters(recurse=False)):
                yield Matrix(module, name, weight)


def quantize(weight: Tensor, bits: Literal[8, 4], group: int | None, dtype: torch.dtype) -> Packed:
    """Packs [..., O, I].

    Args:
        group: weights of a channel that share a scale, an even number; None: all of them.
        dtype: the type in which the result is used.
    """
    width = weight.shape[-1]
    size = width + width % 2 if group is None else min(group, width + width % 2)
    padded = F.pad(weight.detach().float(), (0, -width % size))
    weight = padded.view(*padded.shape[:-1], -1, size)
    scales = (weight.abs().amax(dim=-1, keepdim=True) / LARGEST[bits]).to(SCALE)
    divisor = scales.float().masked_fill(scales == 0.0, 1.0)
    codes = (weight / divisor).round_().clamp_(-LARGEST[bits], LARGEST[bits]).to(torch.int8)
    return Packed(codes if bits == 8 else _pack(codes), scales, width, dtype)


def quantize_model(model: nn.Module, bits: Literal[8, 4], group: int | None, dtype: torch.dtype) -> None:
    """Puts packed weights in the place of all matrices()."""
    for matrix in matrices(model):
        packed = quantize(matrix.weight, bits, group, dtype)
        setattr(matrix.module, matrix.name, nn.Parameter(packed, requires_grad=False))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that hold the model."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.stored_bytes if isinstance(tensor, Packed) else tensor.nbytes for tensor in tensors)


def _pack(codes: Tensor) -> Tensor:
    shifted = (codes + 8).to(torch.uint8)
    return shifted[..., ::2] | shifted[..., 1::2] << 4


def _unpack(codes: Tensor) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
