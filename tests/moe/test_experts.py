"""The sorted dispatch and the router against slow references that do the obvious thing, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import apply
from moe.experts import Experts
from moe.presets import PRESETS
from moe.routing import Routing, route

CASES: list[dict[str, Any]] = [
    {"num_experts": 4, "top_k": 2},
    {"num_experts": 8, "top_k": 1, "expert_kind": "mlp"},
    {"num_experts": 8, "top_k": 8},
    {"num_experts": 64, "top_k": 2, "d_expert": 8},  # more experts than tokens: most get nothing
    {"num_experts": 1, "top_k": 1},
]


def slow_experts(experts: Experts, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    """Each token through each of its experts, one at a time."""
    rows = []
    for token, token_gates, token_experts in zip(x, gates, chosen.tolist(), strict=True):
        row = torch.zeros_like(token)
        for gate, expert in zip(token_gates, token_experts, strict=True):
            hidden = experts.w_in[expert] @ token
            if experts.gated:
                half = len(hidden) // 2
                hidden = F.silu(hidden[:half]) * hidden[half:]
            else:
                hidden = F.silu(hidden)

            row = row + gate * (experts.w_out[expert] @ hidden)

        rows.append(row)

    return torch.stack(rows)


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_dispatch_equals_the_slow_reference_forward_and_backward(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = apply(PRESETS["nano"], {"d_model": 16, "d_expert": 8} | changes)
    experts = Experts(config).double()
    for weights in experts.parameters():
        torch.nn.init.normal_(weights)

    x = torch.randn(24, 16, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(24, config.num_experts, dtype=torch.float64, requires_grad=True)

    def run(dispatch: str) -> list[Tensor]:
        routing = _route(logits, config.top_k)
        if dispatch == "slow":
            y = slow_experts(experts, x, routing.gates_NK, routing.experts_NK)
        else:
            y = experts(x, routing.gates_NK, routing.experts_NK, routing.load_E)

        return [y, *torch.autograd.grad(y.square().sum(), [x, logits, *experts.parameters()])]

    for fast, slow in zip(run("sorted"), run("slow"), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_router_takes_the_most_probable_experts() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.0], [3.0, -1.0, 0.0]], dtype=torch.float64)
    routing = _route(logits, top_k=2)
    probabilities = logits.softmax(dim=-1)
    assert routing.experts_NK.tolist() == [[1, 2], [0, 2]]
    torch.testing.assert_close(routing.gates_NK.sum(dim=-1), torch.ones(2, dtype=torch.float64))
    raw = route(logits, top_k=2, normalize_gates=False, tokens_per_group=2)
    torch.testing.assert_close(raw.gates_NK, probabilities.gather(1, raw.experts_NK))
    assert routing.load_E.tolist() == [1, 1, 2]
    torch.testing.assert_close(routing.z_loss, torch.logsumexp(logits, dim=-1).square().mean())
    torch.testing.assert_close(routing.entropy, -(probabilities * probabilities.log()).sum(dim=-1).mean())


def test_balance_loss_is_one_when_even_and_as_switch_defines_it() -> None:
    even = torch.eye(4, dtype=torch.float64) * 5
    torch.testing.assert_close(_route(even, top_k=1).balance_loss, torch.tensor(1.0, dtype=torch.float64))

    collapsed = torch.tensor([[5.0, 0.0, 0.0, 0.0]] * 4, dtype=torch.float64)
    expected = 4 * 1.0 * collapsed[0].softmax(dim=-1)[0]  # all tokens (f = 1) on expert 0
    torch.testing.assert_close(_route(collapsed, top_k=1).balance_loss, expected)


def test_balance_loss_is_the_mean_over_routing_groups() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 4, dtype=torch.float64)
    whole = route(logits, top_k=2, normalize_gates=True, tokens_per_group=6).balance_loss
    parts = [_route(part, top_k=2).balance_loss for part in torch.split(logits, 6)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    assert abs(whole - _route(logits, top_k=2).balance_loss) > 1e-3


def _route(logits: Tensor, top_k: int) -> Routing:
    return route(logits, top_k=top_k, normalize_gates=True, tokens_per_group=len(logits))
