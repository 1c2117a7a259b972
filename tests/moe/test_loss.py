"""The loss in chunks: equal to the plain formula, in every type; no gradients where nobody asks; little memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.loss import cap, sum_nats


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_loss_and_gradients_are_those_of_the_plain_formula(rows: int, softcap: float) -> None:
    x, words, targets = _problem(torch.float64)
    ours = sum_nats(x, words, targets, softcap, chunk=300 * rows)
    plain = _plain(x, words, targets, softcap)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    for gradient, reference in zip(_gradients(ours / 7, x, words), _gradients(plain / 7, x, words), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


def test_tied_embeddings_get_both_gradients() -> None:
    _, words, targets = _problem(torch.float64)
    ours = torch.autograd.grad(sum_nats(words[:50].tanh(), words, targets), words)
    plain = torch.autograd.grad(_plain(words[:50].tanh(), words, targets, 0.0), words)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_costs_no_more_than_the_products_round(dtype: torch.dtype) -> None:
    x, words, targets = _problem(dtype)
    ours = sum_nats(x, words, targets, chunk=300 * 7)
    plain = _plain(x.double(), words.to(dtype).double(), targets, 0.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), plain, rtol=2 * torch.finfo(dtype).eps, atol=0)
    for gradient, reference in zip(_gradients(ours, x, words), _gradients(plain, x, words), strict=True):
        assert (gradient - reference).norm() < 4 * torch.finfo(dtype).eps * reference.norm()


def test_in_fp16_the_probabilities_of_rare_words_count() -> None:
    # 200,000 equally likely words: 5e-6 has 6 bits left in fp16, and is wrong by up to 0.6 %.
    n_words = 200_000
    words = torch.zeros(n_words, 4)
    words[:, 0] = torch.arange(n_words) % 2
    x = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
    gradient = torch.autograd.grad(sum_nats(x, words, torch.tensor([0, 1])), x)[0]
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0.5, -0.5]).half(), rtol=1e-3, atol=0)


def test_a_certain_prediction_has_a_small_exact_gradient() -> None:
    x = torch.tensor([[30.0]], requires_grad=True)
    words = torch.tensor([[1.0], [0.0]])
    gradient = torch.autograd.grad(sum_nats(x, words, torch.tensor([0])), x)[0]
    assert gradient.item() == pytest.approx(-torch.tensor(-30.0).double().exp().item(), rel=1e-5)


def test_without_gradients_only_the_loss_is_computed() -> None:
    x, words, targets = _problem(torch.float64)
    with torch.no_grad():
        nats = sum_nats(x, words, targets, chunk=2100)

    assert not nats.requires_grad
    torch.testing.assert_close(nats, _plain(x, words, targets, 0.0).detach())
    assert not sum_nats(x.detach(), words.detach(), targets).requires_grad


def test_only_the_two_gradients_are_kept() -> None:
    x, words, targets = _problem(torch.bfloat16)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sum_nats(x, words, targets)

    assert sum(kept) == 2 * x.numel() + 4 * words.numel()


def test_a_second_backward_pass_is_refused() -> None:
    x, words, targets = _problem(torch.float64)
    nats = sum_nats(x, words, targets)
    torch.autograd.backward(nats, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(nats)


def _problem(dtype: torch.dtype, n: int = 50, v: int = 300, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    words = torch.randn(v, d, dtype=torch.float64, generator=generator)
    words = words if dtype == torch.float64 else words.float()  # weights are stored in fp32
    return x, words.requires_grad_(), torch.randint(v, (n,), generator=generator)


def _plain(x: Tensor, words: Tensor, targets: Tensor, softcap: float) -> Tensor:
    return F.cross_entropy(cap(x @ words.T, softcap), targets, reduction="sum")


def _gradients(loss: Tensor, x: Tensor, words: Tensor) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, [x, words])]
