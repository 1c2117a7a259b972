"""What a comparison with somebody else's network needs: equal weights, equal precision, and a measure of agreement."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from moe.config import Config, apply
from moe.presets import PRESETS

TOLERANCE = 1e-12  # of a tensor's largest entry, in float64; what is seen is below 1e-14

TINY = apply(
    PRESETS["nano"],
    {
        "seq_len": 32,
        "batch_size": 4,
        "micro_batch_size": 4,
        "routing_group": 2,
        "n_heads": 4,
        "gqa_group_size": 2,
        "tie_embeddings": False,
        "load_balance_weight": 0.0,
        "router_z_weight": 0.0,
    },
)
"""What the compared configs have in common."""

SIGMOID = {"router_score": "sigmoid", "balance_bias_rate": 0.001, "num_shared_experts": 2}
"""The knobs of DeepSeek-V3's layer, which others took over: arXiv:2412.19437, section 2.1.2."""

Names = Mapping[str, tuple[str, ...]]
"""Which of their tensors, one below the other, make one of ours."""


@contextmanager
def widened() -> Iterator[None]:
    """Within it, code that asks torch for float32 gets float64.

    Their models do parts of the work in float32 whatever the weights are: RMSNorm, the rotary table, the softmax of
    eager attention, every router's scores, the balance loss, and the logits under the cross entropy.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def weights_of(reference: nn.Module) -> dict[str, Tensor]:
    """Its parameters, and the bias by which DeepSeek-V3's router selects, which is a buffer."""
    biases = {name: bias for name, bias in reference.named_buffers() if name.endswith("correction_bias")}
    return dict(reference.named_parameters()) | biases


def randomize(reference: nn.Module) -> None:
    """Draw weights that keep activations near 1, and norms and biases that do not happen to be neutral."""
    generator = torch.Generator().manual_seed(0)
    for name, weights in weights_of(reference).items():
        noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        if weights.ndim == 1:
            neutral = 0.0 if name.endswith("bias") else 1.0
            weights.data.copy_(neutral + 0.2 * noise)
        else:
            weights.data.copy_(noise / weights.shape[-1] ** 0.5)


def translate(theirs: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Their weights, or gradients, under our names; a tensor without a name is an error.

    Where each expert is a module of its own (`expert_0`, ...), its matrices become slices of our stack.
    """
    theirs = {name: weights[None] if ".expert_" in name else weights for name, weights in theirs.items()}
    ours = {name: torch.cat([theirs[part] for part in parts]) for name, parts in names.items() if parts[0] in theirs}
    assert theirs.keys() == {part for name in ours for part in names[name]}
    return ours


def text(config: Config) -> tuple[Tensor, Tensor]:
    """Random tokens [B, T] and the next ones."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(config.vocab_size, (config.batch_size, config.seq_len + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, relative to the largest entry."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    scale = theirs.detach().abs().max()
    assert scale > 0.0
    return float((ours - theirs).detach().abs().max() / scale)


def agree(what: str, ours: Tensor | None, theirs: Tensor | None, tolerance: float = TOLERANCE) -> None:
    """Asserts it, and logs by how much."""
    assert ours is not None, f"ours has no {what}"
    assert theirs is not None, f"theirs has no {what}"
    found = difference(ours, theirs)
    logging.getLogger(__name__).info("%.1e %s", found, what)
    assert found < tolerance, f"{what} differs by {found:.1e}"


def agree_in_gradients(ours: nn.Module, loss: Tensor, reference: nn.Module, expected: Tensor, names: Names) -> None:
    """Asserts it of every parameter on either side."""
    torch.autograd.backward(loss)
    torch.autograd.backward(expected)
    theirs = {name: weights.grad for name, weights in reference.named_parameters() if weights.grad is not None}
    gradients = translate(theirs, names)
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, weights in ours.named_parameters():
        agree(f"gradient of {name}", weights.grad, gradients[name])
