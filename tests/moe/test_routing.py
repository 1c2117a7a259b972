"""Routers against what their papers define, token by token."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from moe.config import apply
from moe.layers import Mixture
from moe.model import MoE
from moe.noise import router_noise
from moe.presets import PRESETS
from moe.routing import TokenChoice, choose_experts, choose_tokens, hash_experts, losses_of

NANO = PRESETS["nano"]


def test_softmax_takes_the_most_probable_experts() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.0], [3.0, -1.0, 0.0]], dtype=torch.float64)
    routing = _choose(logits, top_k=2)
    probabilities = logits.softmax(dim=-1)
    assert routing.experts_NK.tolist() == [[1, 2], [0, 2]]
    torch.testing.assert_close(routing.gates_NK.sum(dim=-1), torch.ones(2, dtype=torch.float64))
    raw = _choose(logits, top_k=2, normalize_gates=False)
    torch.testing.assert_close(raw.gates_NK, probabilities.gather(1, raw.experts_NK))
    assert routing.load_E.tolist() == [1, 1, 2]
    torch.testing.assert_close(losses_of([routing]).z_L[0], torch.logsumexp(logits, dim=-1).square().mean())
    torch.testing.assert_close(
        losses_of([routing]).entropy_L[0], -(probabilities * probabilities.log()).sum(dim=-1).mean()
    )


def test_sigmoid_scores_each_expert_alone() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.0], [3.0, -1.0, 0.0]], dtype=torch.float64)
    raw = _choose(logits, top_k=2, normalize_gates=False, score="sigmoid")
    torch.testing.assert_close(raw.gates_NK, logits.sigmoid().gather(1, raw.experts_NK))
    normalized = _choose(logits, top_k=2, score="sigmoid").gates_NK
    torch.testing.assert_close(normalized, raw.gates_NK / raw.gates_NK.sum(dim=-1, keepdim=True))


def test_balance_loss_is_one_when_even_and_as_switch_defines_it() -> None:
    even = torch.eye(4, dtype=torch.float64) * 5
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(_balance(_choose(even, top_k=1)), one)
    torch.testing.assert_close(_balance(_choose(even, top_k=1), "sigmoid"), one)

    collapsed = torch.tensor([[5.0, 0.0, 0.0, 0.0]] * 4, dtype=torch.float64)
    expected = 4 * 1.0 * collapsed[0].softmax(dim=-1)[0]  # all tokens (f = 1) on expert 0
    torch.testing.assert_close(_balance(_choose(collapsed, top_k=1)), expected)


def test_balance_loss_is_the_mean_over_routing_groups() -> None:
    logits = _logits(12, 4)
    whole = _balance(_choose(logits, top_k=2, tokens_per_group=6))
    parts = [_balance(_choose(part, top_k=2)) for part in torch.split(logits, 6)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    assert abs(whole - _balance(_choose(logits, top_k=2))) > 1e-3


def test_bias_moves_the_choice_and_leaves_the_gates_alone() -> None:
    logits = torch.zeros(3, 4, dtype=torch.float64)
    logits[:, 0] = 1.0
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    routing = _choose(logits, top_k=1, normalize_gates=False, bias_E=bias)
    assert routing.experts_NK.flatten().tolist() == [3, 3, 3]
    torch.testing.assert_close(routing.gates_NK[:, 0], logits.softmax(dim=-1)[:, 3])


def test_bias_follows_the_load() -> None:
    mixture = Mixture(apply(NANO, {"balance_bias_rate": 0.25}), layer=0)
    mixture.update_balance(torch.tensor([5, 3, 0, 4]))
    assert mixture.balance_bias.tolist() == [-0.25, 0.0, 0.25, -0.25]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_capacity_serves_earlier_positions_first(factor: float) -> None:
    # 2 groups of 2 sequences of 8 tokens, 4 experts, 2 choices: by hand, position by position.
    logits = _logits(32, 4)
    routing = _choose(logits, top_k=2, tokens_per_group=16, seq_len=8, capacity_factor=factor)
    free = _choose(logits, top_k=2, tokens_per_group=16, seq_len=8)
    capacity = int(factor * 16 * 2 / 4)
    expected = free.experts_NK.clone()
    kept = torch.zeros(4, dtype=torch.long)
    for group in range(2):
        given = torch.zeros(4, dtype=torch.long)
        for position in range(8):
            for sequence in range(2):
                token = group * 16 + sequence * 8 + position
                for choice in range(2):
                    expert = int(free.experts_NK[token, choice])
                    if given[expert] < capacity:
                        given[expert] += 1
                    else:
                        expected[token, choice] = 4

        kept += given

    assert routing.experts_NK.tolist() == free.experts_NK.tolist()
    assert routing.row_NK is not None
    assert (routing.row_NK // (2 * capacity)).tolist() == expected.tolist()
    rows = routing.row_NK[expected < 4]
    assert len(set(rows.tolist())) == len(rows)
    assert routing.kept_E.tolist() == kept.tolist()
    assert routing.load_E.tolist() == free.load_E.tolist()
    assert routing.capacity == capacity
    assert _balance(routing) == _balance(free)


def test_capacity_is_rounded_up_and_no_more_than_a_group() -> None:
    def capacity(factor: float) -> int | None:
        return _choose(_logits(10, 4), top_k=1, tokens_per_group=10, seq_len=10, capacity_factor=factor).capacity

    assert [capacity(factor) for factor in (0.01, 1.0, 1.25, 64.0)] == [1, 3, 4, 10]


def test_what_a_capacity_drops_is_counted() -> None:
    model = MoE(apply(NANO, {"capacity_factor": 0.5}))
    model.init_weights(0)
    tokens = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(0))
    output = model(tokens[:, :-1], tokens[:, 1:])
    _, routings = model.hidden(tokens[:, :-1])
    kept = sum(int(routing.load_GE.clamp_max(16).sum()) for routing in routings if isinstance(routing, TokenChoice))
    assert float(output.dropped) == pytest.approx(1 - kept / (2 * 2 * 64 * 2))  # layers, sequences, tokens, choices
    assert float(output.dropped) >= 0.5  # half of the mean load is all that an expert keeps
    assert float(model.eval()(tokens[:, :-1], tokens[:, 1:]).dropped) == 0.0


def test_expert_choice_takes_a_token_at_least() -> None:
    assert choose_tokens(_logits(4, 16), top_k=1, tokens_per_group=4).tokens_EC.shape == (16, 1)


def test_expert_choice_gives_every_expert_its_best_tokens() -> None:
    logits = _logits(16, 4)
    routing = choose_tokens(logits, top_k=2, tokens_per_group=8)
    probabilities = logits.softmax(dim=-1)
    assert routing.load_E.tolist() == [8, 8, 8, 8]
    for expert in range(4):
        best = [*probabilities[:8, expert].topk(4).indices, *(probabilities[8:, expert].topk(4).indices + 8)]
        assert routing.tokens_EC[expert].tolist() == [int(token) for token in best]
        torch.testing.assert_close(routing.gates_EC[expert], probabilities[routing.tokens_EC[expert], expert])


def test_hash_routing_depends_on_the_token_alone() -> None:
    config = apply(NANO, {"routing": "hash", "num_experts": 8, "top_k": 3})
    first, again, other = Mixture(config, layer=0), Mixture(config, layer=0), Mixture(config, layer=1)
    assert torch.equal(first.hash_VK, again.hash_VK)
    assert not torch.equal(first.hash_VK, other.hash_VK)
    assert all(len(set(row)) == 3 for row in first.hash_VK.tolist())
    routing = hash_experts(first.hash_VK[torch.tensor([5, 5, 9])], 8, torch.float64)
    assert routing.experts_NK[0].tolist() == routing.experts_NK[1].tolist() == first.hash_VK[5].tolist()
    assert routing.gates_NK.tolist() == [[1 / 3] * 3] * 3
    assert not [name for name, _ in first.named_parameters() if "router" in name]


def test_noise_is_a_function_of_seed_and_sequence() -> None:
    config = apply(NANO, {"noisy_top_k": True, "first_k_dense": 1})
    whole = router_noise(config, seed=3, first=10, count=4)
    assert whole is not None
    assert whole.shape == (1, 4 * 64, 4)
    parts = [router_noise(config, seed=3, first=first, count=2) for first in (10, 12)]
    assert torch.equal(torch.cat([part for part in parts if part is not None], dim=1), whole)
    other = router_noise(config, seed=4, first=10, count=4)
    assert other is not None
    assert not torch.equal(whole, other)
    assert router_noise(NANO, seed=3, first=10, count=4) is None


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_noisy_logits_are_those_of_the_paper(score: str) -> None:
    # arXiv:1701.06538, equations 3 to 5: x Wg + standard normal * softplus(x Wnoise), of which the top k stay.
    config = apply(NANO, {"noisy_top_k": True, "router_score": score})
    mixture = Mixture(config, layer=0).double()
    for weights in mixture.parameters():
        torch.nn.init.normal_(weights, std=0.5)

    x, tokens, noise = torch.randn(1, 64, 32).double(), torch.zeros(1, 64, dtype=torch.long), _logits(64, 4)
    logits = x[0] @ mixture.router.T + noise * torch.log1p(torch.exp(x[0] @ mixture.router_noise.T))
    affinities = logits.softmax(dim=1) if score == "softmax" else logits.sigmoid()
    best = affinities.topk(2, dim=1)
    routing = mixture.route(x[0], tokens, torch.float64, noise)
    assert isinstance(routing, TokenChoice)
    assert torch.equal(routing.experts_NK, best.indices)
    torch.testing.assert_close(routing.gates_NK, best.values / best.values.sum(dim=1, keepdim=True))

    quiet = mixture.eval().route(x[0], tokens, torch.float64, None)
    assert isinstance(quiet, TokenChoice)
    assert torch.equal(quiet.experts_NK, (x[0] @ mixture.router.T).topk(2, dim=1).indices)
    assert not torch.equal(quiet.experts_NK, routing.experts_NK)


def test_noise_is_needed_only_while_training() -> None:
    config = apply(NANO, {"noisy_top_k": True})
    mixture = Mixture(config, layer=0)
    for weights in mixture.parameters():
        torch.nn.init.normal_(weights, std=0.1)

    x, tokens = torch.randn(1, 64, 32), torch.zeros(1, 64, dtype=torch.long)
    with pytest.raises(ValueError, match="needs the noise"):
        mixture.route(x[0], tokens, torch.float32, None)

    mixture.eval()
    assert isinstance(mixture.route(x[0], tokens, torch.float32, None), TokenChoice)


def _balance(routing: TokenChoice, score: Literal["softmax", "sigmoid"] = "softmax") -> Tensor:
    return losses_of([routing], score).balance_L[0]


def _logits(n_tokens: int, n_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n_tokens, n_experts, dtype=torch.float64, generator=generator)


def _choose(logits: Tensor, *, top_k: int, **changes: Any) -> TokenChoice:
    defaults = {"normalize_gates": True, "tokens_per_group": len(logits), "seq_len": 1}
    return choose_experts(logits, top_k=top_k, **(defaults | changes))
