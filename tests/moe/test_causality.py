"""No model peeks but the one that says so, and the audit sees those that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.causality import LEAK, Audit, audit, future_leak, neighbour_leak
from moe.config import apply
from moe.model import MoE
from moe.observe import build
from moe.presets import PRESETS

NANO = apply(PRESETS["nano"], {"seq_len": 32, "routing_group": 2, "micro_batch_size": 4})
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_experts": 1, "top_k": 1},
    {"expert_kind": "mlp", "normalize_gates": False, "top_k": 1},
    {"router_score": "sigmoid", "balance_bias_rate": 0.01},
    {"noisy_top_k": True, "capacity_factor": 1.0},
    {"capacity_factor": 0.5, "top_k": 1},
    {"capacity_factor": 1.0, "router_score": "sigmoid"},
    {"routing": "hash"},
    {"routing": "hash", "num_shared_experts": 1, "zero_init_out": True},
    {"first_k_dense": 1, "gqa_group_size": 2, "qk_norm": True, "logit_softcap": 10.0, "tie_embeddings": False},
    {"activation_checkpointing": True, "expert_kind": "relu2"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_no_logit_depends_on_later_tokens_or_other_sequences(changes: dict[str, Any]) -> None:
    config = apply(NANO, changes)
    found = audit(build(config, seed=0), config)
    assert found.causal, found.detail
    assert config.causal


@pytest.mark.parametrize("changes", [{}, {"zero_init_out": True}, {"router_init_scale": 0.0}], ids=str)
def test_expert_choice_is_caught_and_says_so_itself(changes: dict[str, Any]) -> None:
    config = apply(NANO, {"routing": "expert_choice"} | changes)
    found = audit(build(config, seed=0), config)
    assert found.future_in_evaluation > LEAK
    assert found.future_in_training > LEAK
    assert found.neighbours_in_evaluation <= LEAK  # in evaluation a group is one sequence
    assert not found.causal
    assert not config.causal


def test_later_logits_do_move() -> None:
    model = build(NANO, seed=0)
    tokens = torch.randint(256, (2, 32))
    changed = torch.cat((tokens[:, :16], (tokens[:, 16:] + 1) % 256), dim=1)
    with torch.no_grad():
        moved = (model.logits(changed) - model.logits(tokens)).abs().amax(dim=(0, 2))

    assert (moved[16:] > 1e-6).all()


@pytest.mark.parametrize(
    "leak",
    [
        lambda logits: 1e-6 * logits.mean(dim=1, keepdim=True),
        lambda logits: 1e-8 * logits.roll(-1, dims=1),
        lambda logits: logits * torch.where(logits[:, -1:, :1] > 0, torch.nan, 0.0),
    ],
)
def test_a_model_that_peeks_is_caught(leak: Callable[[Tensor], Tensor]) -> None:
    model = build(NANO, seed=0)
    with torch.no_grad():
        assert future_leak(lambda tokens: _leaking(model, tokens, leak), NANO) > LEAK


def test_a_model_that_looks_at_its_neighbours_is_caught() -> None:
    model = build(NANO, seed=0)
    with torch.no_grad():
        assert neighbour_leak(lambda tokens: _leaking(model, tokens, lambda x: 1e-6 * x.mean(dim=0)), NANO) > LEAK


def _leaking(model: MoE, tokens: Tensor, leak: Callable[[Tensor], Tensor]) -> Tensor:
    logits = model.logits(tokens)
    return logits + leak(logits)


@pytest.mark.parametrize("moved", [(1e-6, 0.0, 0.0), (0.0, 1e-6, 0.0), (0.0, 0.0, 1e-6), (0.0, torch.inf, 0.0)])
def test_each_of_the_three_questions_can_be_failed_alone(moved: tuple[float, float, float]) -> None:
    assert not Audit(*moved).causal
    assert Audit(1e-12, 1e-12, 1e-12).causal
