"""Muon against torch's own, against its definition, and against itself one matrix at a time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe import muon
from moe.muon import Muon, orthogonalize

SHAPES = [(12, 20), (20, 12), (16, 16)]


def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch iterates in bf16 whatever the weights are; with that one cast left out it computes in float64, as we do.
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    ours, theirs = _weights(SHAPES), _weights(SHAPES)
    optimizer = Muon([{"params": ours}], lr=0.02, weight_decay=0.1, momentum=0.9, steps=5)
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=5, adjust_lr_fn="match_rms_adamw"
    )
    for number in range(4):
        _set_gradients(ours, number)
        _set_gradients(theirs, number)
        optimizer.step()
        reference.step()  # type: ignore[no-untyped-call]

    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_bf16_follows_torch_in_bf16() -> None:
    ours, theirs = _weights(SHAPES, torch.float32), _weights(SHAPES, torch.float32)
    optimizer = Muon([{"params": ours}], lr=1.0, momentum=0.9, dtype=torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=1.0, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    before = [weight.detach().clone() for weight in ours]
    _set_gradients(ours, 0)
    _set_gradients(theirs, 0)
    optimizer.step()
    reference.step()  # type: ignore[no-untyped-call]
    for mine, other, start in zip(ours, theirs, before, strict=True):
        assert (mine - other).norm() < 0.05 * (mine - start).norm()  # bf16 has 8 bits


def test_one_step_in_closed_form() -> None:
    # A gradient with orthonormal rows, O of them, has O equal singular values: each becomes 1 / sqrt(O) when the norm
    # is divided out, and then goes through the quintic, step by step.
    (weight,) = _weights([(8, 12)])
    start = weight.detach().clone()
    rows = torch.linalg.qr(torch.randn(12, 8, dtype=torch.float64)).Q.T
    weight.grad = 3.0 * rows
    Muon([{"params": [weight]}], lr=0.1, weight_decay=0.5, steps=3).step()

    value = 8**-0.5
    for _ in range(3):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5

    expected = start * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 12**0.5 * value * rows
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-14)


def test_updates_are_nearly_orthogonal() -> None:
    matrices = torch.randn(5, 24, 40, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    assert (values[:, -1] / values[:, 0]).min() > 1e-2
    seen = left.mT @ orthogonalize(matrices, steps=5) @ right.mT
    diagonal = seen.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.68
    assert diagonal.max() < 1.21
    torch.testing.assert_close(seen, torch.diag_embed(diagonal), rtol=0.0, atol=1e-12)  # same singular vectors


def test_rms_is_that_of_adamw() -> None:
    weights = _weights([(64, 256), (256, 64), (4, 64, 64)])
    before = [weight.detach().clone() for weight in weights]
    _set_gradients(weights, 0)
    Muon([{"params": weights}], lr=1.0).step()
    for weight, start in zip(weights, before, strict=True):
        assert float((weight.detach() - start).square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("most", [1, 200, 2**23], ids=["one by one", "in part", "all at once"])
def test_a_stack_is_its_matrices_one_by_one(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "MUON_BATCH", most)
    stacked = _weights([(5, 6, 8), (3, 8, 6), (6, 8)])
    single = [
        nn.Parameter(matrix.clone()) for weight in stacked for matrix in weight.detach().reshape(-1, *weight.shape[-2:])
    ]
    optimizers = [Muon([{"params": weights}], lr=0.02, weight_decay=0.1) for weights in (stacked, single)]
    for number in range(3):
        _set_gradients(stacked, number)
        gradients = [matrix for weight in stacked for matrix in _gradient(weight).reshape(-1, *weight.shape[-2:])]
        for weight, gradient in zip(single, gradients, strict=True):
            weight.grad = gradient.clone()

        for optimizer in optimizers:
            optimizer.step()

    together = [matrix for weight in stacked for matrix in weight.detach().reshape(-1, *weight.shape[-2:])]
    for a, b in zip(together, single, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-14)


def test_matrices_that_share_a_parameter_are_told_apart() -> None:
    (joint,) = _weights([(3, 16, 10)])
    gate, up = (nn.Parameter(part.clone()) for part in torch.split(joint.detach(), [12, 4], dim=1))
    _set_gradients([joint], 0)
    gate.grad, up.grad = (part.clone() for part in torch.split(_gradient(joint), [12, 4], dim=1))
    Muon([{"params": [joint], "rows": (12, 4)}], lr=0.1).step()
    Muon([{"params": [gate, up]}], lr=0.1).step()
    torch.testing.assert_close(joint.detach(), torch.cat((gate.detach(), up.detach()), dim=1), rtol=1e-12, atol=1e-14)


def test_experts_without_tokens_only_decay() -> None:
    (experts,) = _weights([(4, 6, 8)])
    start = experts.detach().clone()
    optimizer = Muon([{"params": [experts]}], lr=0.1, weight_decay=0.5, momentum=0.9)
    gradient = torch.randn(4, 6, 8, dtype=torch.float64)
    gradient[2] = 0.0
    experts.grad = gradient
    optimizer.step()
    torch.testing.assert_close(experts.detach()[2], start[2] * 0.95, rtol=1e-14, atol=0.0)
    assert (experts.detach()[1] - start[1] * 0.95).norm() > 0.01

    # One that had tokens before goes on in the direction of its momentum.
    moved = experts.detach()[1].clone()
    gradient[1] = 0.0
    optimizer.step()
    direction = experts.detach()[1] - moved * 0.95
    expected = orthogonalize(optimizer.state[experts]["momentum"][1:2], steps=5)[0]
    torch.testing.assert_close(direction, -0.1 * 0.2 * 8**0.5 * expected, rtol=1e-9, atol=1e-12)


def test_parameters_without_a_gradient_stay() -> None:
    used, unused = _weights([(4, 4), (4, 4)])
    _set_gradients([used], 0)
    optimizer = Muon([{"params": [used, unused]}], lr=0.1, weight_decay=0.5)
    start = unused.detach().clone()
    optimizer.step()
    assert torch.equal(unused.detach(), start)
    assert unused not in optimizer.state


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    def build(weights: Sequence[Tensor]) -> Muon:
        groups: list[dict[str, Any]] = [{"params": weights[:1], "rows": (7, 5)}, {"params": weights[1:]}]
        return Muon(groups, lr=0.02, weight_decay=0.1)

    whole = _weights(SHAPES, torch.float32)
    optimizer = build(whole)
    for number in range(6):
        if number == 3:
            file = io.BytesIO()
            torch.save({"optimizer": optimizer.state_dict(), "weights": [w.detach() for w in whole]}, file)

        _set_gradients(whole, number)
        optimizer.step()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(weight) for weight in saved["weights"]]
    optimizer = build(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    for number in range(3, 6):
        _set_gradients(resumed, number)
        optimizer.step()

    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def _weights(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]


def _set_gradients(weights: Sequence[Tensor], number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, dtype=weight.dtype, generator=generator)


def _gradient(weight: Any) -> Tensor:
    assert isinstance(weight.grad, Tensor)
    return weight.grad
