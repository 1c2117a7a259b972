"""The experts' fast paths against a slow reference that does the obvious thing, token by token, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.activation import activate
from moe.config import apply
from moe.experts import Experts
from moe.presets import PRESETS
from moe.routing import ExpertChoice, TokenChoice, choose_experts
from moe.slots import Layout

PATHS: tuple[Layout, ...] = ("loop", "padded")
SHAPES: dict[str, dict[str, int]] = {
    "usual": {"tokens": 24, "num_experts": 4, "top_k": 2},
    "more experts than assignments": {"tokens": 6, "num_experts": 64, "top_k": 2},
    "every expert": {"tokens": 10, "num_experts": 8, "top_k": 8},
    "one token": {"tokens": 1, "num_experts": 4, "top_k": 3},
    "one expert": {"tokens": 9, "num_experts": 1, "top_k": 1},
}


def make_experts(dtype: torch.dtype = torch.float64, **changes: Any) -> Experts:
    torch.manual_seed(0)
    experts = Experts(apply(PRESETS["nano"], {"d_model": 16, "d_expert": 12} | changes)).to(dtype)
    for weights in experts.parameters():
        torch.nn.init.normal_(weights, std=0.5)

    return experts


def make_choice(tokens: int, n_experts: int, top_k: int, *, skew: float = 0.0, capacity: float = 0.0) -> TokenChoice:
    """A choice of random experts, all tokens wanting expert 0 with much `skew`, with gates of its own.

    With a capacity two groups of two sequences, so four must divide the tokens.
    """
    scores = torch.randn(tokens, n_experts, dtype=torch.float64)
    scores[:, 0] += skew
    choice = choose_experts(
        scores,
        top_k=top_k,
        normalize_gates=True,
        tokens_per_group=tokens // 2 if capacity else tokens,
        seq_len=tokens // 4 if capacity else tokens,
        capacity_factor=capacity,
    )
    return choice._replace(gates_NK=torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True))


def dropped(choice: TokenChoice) -> Tensor:
    """Which assignments have no row."""
    if choice.row_NK is None or choice.capacity is None:
        return torch.zeros_like(choice.experts_NK, dtype=torch.bool)

    return choice.row_NK == choice.load_GE.numel() * choice.capacity


def slow_experts(experts: Experts, x: Tensor, choice: TokenChoice) -> Tensor:
    """Each token through each of its experts, one at a time."""
    rows = []
    for token, gates, chosen, lost in zip(x, *choice[:2], dropped(choice), strict=True):
        row = torch.zeros_like(token)
        for gate, expert in zip(gates[~lost], chosen[~lost], strict=True):
            row = row + gate * (experts.w_out[expert] @ activate(experts.w_in[expert] @ token, experts.kind))

        rows.append(row)

    return torch.stack(rows)


def results(experts: Experts, x: Tensor, gates: Tensor, run: Callable[[], Tensor]) -> list[Tensor]:
    """What `run` returns, and the gradients of something that depends on all of it."""
    y = run()
    weighting = torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weighting).sum(), [x, gates, *experts.parameters()])]


def assert_same(fast: list[Tensor], slow: list[Tensor]) -> None:
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["swiglu", "geglu", "relu2", "mlp"])
def test_every_kind_of_expert_has_the_references_values_and_gradients(kind: str, path: Layout) -> None:
    experts = make_experts(expert_kind=kind, num_experts=4)
    experts.path = path
    x = torch.randn(24, 16, dtype=torch.float64, requires_grad=True)
    choice = make_choice(24, 4, 2)
    fast = results(experts, x, choice.gates_NK, lambda: experts(x, choice))
    assert_same(fast, results(experts, x, choice.gates_NK, lambda: slow_experts(experts, x, choice)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("skew", [0.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_has_the_references_values_and_gradients(shape: dict[str, int], skew: float, path: Layout) -> None:
    tokens, n_experts, top_k = shape.values()
    experts = make_experts(num_experts=n_experts, top_k=top_k)
    experts.path = path
    x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    choice = make_choice(tokens, n_experts, top_k, skew=skew)
    fast = results(experts, x, choice.gates_NK, lambda: experts(x, choice))
    assert_same(fast, results(experts, x, choice.gates_NK, lambda: slow_experts(experts, x, choice)))


@pytest.mark.parametrize("path", ["auto", *PATHS])
@pytest.mark.parametrize("capacity", [0.3, 0.8])
def test_dropped_assignments_neither_act_nor_learn(capacity: float, path: Layout) -> None:
    experts = make_experts(num_experts=4)
    experts.path = path
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    choice = make_choice(12, 4, 2, skew=2.0, capacity=capacity)
    lost = dropped(choice)
    assert 0 < lost.sum() < lost.numel()
    fast = results(experts, x, choice.gates_NK, lambda: experts(x, choice))
    slow = results(experts, x, choice.gates_NK, lambda: slow_experts(experts, x, choice))
    assert_same(fast, slow)
    assert fast[2][lost].eq(0.0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_dropped_token_holds_reaches_nobody(dtype: torch.dtype, path: Layout) -> None:
    experts = make_experts(torch.float32, num_experts=4)
    experts.path = path
    choice = make_choice(12, 4, 1, skew=2.0, capacity=0.8)
    gates = choice.gates_NK.detach().float().requires_grad_()
    x = torch.randn(12, 16).to(dtype)
    x[dropped(choice).all(dim=1)] = torch.inf
    assert not x.isfinite().all()
    routing = choice._replace(gates_NK=gates)
    for result in results(experts, x.requires_grad_(), gates, lambda: experts(x, routing)):
        assert result.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_expert_choice_has_the_references_values_and_gradients(path: Layout) -> None:
    experts = make_experts(num_experts=4)
    experts.path = path
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.rand(4, 11).topk(5).indices  # nobody takes the last token
    choice = ExpertChoice(gates, tokens, load_E=torch.full((4,), 5), logits_NE=torch.empty(12, 4))

    def slow() -> Tensor:
        y = torch.zeros_like(x)
        for expert, (w_in, w_out) in enumerate(zip(experts.w_in, experts.w_out, strict=True)):
            taken_rows = activate(x[tokens[expert]] @ w_in.T, experts.kind) @ w_out.T
            y = y.index_add(0, tokens[expert], gates[expert, :, None] * taken_rows)

        return y

    fast = results(experts, x, gates, lambda: experts(x, choice))
    assert_same(fast, results(experts, x, gates, slow))
    assert fast[0][11].eq(0.0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_as_near_as_their_rounding(dtype: torch.dtype, path: Layout) -> None:
    experts = make_experts(torch.float32, num_experts=4)
    experts.path = path
    x = torch.randn(24, 16).to(dtype).requires_grad_()
    choice = make_choice(24, 4, 2)
    gates = choice.gates_NK.detach().float().requires_grad_()
    narrow = results(experts, x, gates, lambda: experts(x, choice._replace(gates_NK=gates)))
    assert [part.dtype for part in narrow] == [dtype, dtype, *[torch.float32] * 3]

    wide = make_experts(num_experts=4)
    wide.load_state_dict(experts.state_dict())
    x, wide_gates = (t.detach().double().requires_grad_() for t in (x, gates))
    exact = results(wide, x, wide_gates, lambda: slow_experts(wide, x, choice._replace(gates_NK=wide_gates)))
    for a, b in zip(narrow, exact, strict=True):
        assert (a.double() - b).norm() < 4 * torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("path", PATHS)
def test_recomputed_in_the_backward_pass_the_gradients_are_the_same_bits(path: Layout) -> None:
    experts = make_experts(num_experts=4)
    experts.path = path
    x = torch.randn(24, 16, dtype=torch.float64, requires_grad=True)
    choice = make_choice(24, 4, 2)

    def run() -> Tensor:
        y: Tensor = experts(x, choice)
        return y

    plain = results(experts, x, choice.gates_NK, run)
    again = results(experts, x, choice.gates_NK, run)
    recomputed = results(experts, x, choice.gates_NK, lambda: checkpoint(run, use_reentrant=False))
    for a, b, c in zip(plain, again, recomputed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_second_derivative_is_refused() -> None:
    experts = make_experts(num_experts=4)
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    choice = make_choice(4, 4, 2)
    y = experts(x, choice)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.backward(slope.sum())
