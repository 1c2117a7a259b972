"""Our models against those of Hugging Face `transformers`: equal weights give equal logits, losses and gradients.

Each of theirs is built small and random from one of our configs, its weights are translated to our names
(tests/moe/reference/causal_lm.py), and both compute in float64. Where they agree, they differ by rounding:

    .venv/bin/python -m pytest tests/moe/test_reference*.py --log-cli-level=INFO
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from moe.config import Config, apply
from moe.layers import NORM_EPS
from moe.model import MoE
from tests.moe.reference.agreement import (
    TINY,
    agree,
    agree_in_gradients,
    difference,
    randomize,
    text,
    translate,
    weights_of,
    widened,
)
from tests.moe.reference.causal_lm import MODELS, names_in


@pytest.mark.parametrize("case", MODELS)
def test_logits_loss_and_gradients(case: str) -> None:
    ours, reference = _pair(case)
    tokens, targets = text(ours.config)
    output = ours(tokens, targets)
    with widened():
        theirs = reference(input_ids=tokens, labels=targets, shift_labels=targets)

    agree("logits", ours.logits(tokens), theirs.logits)
    agree("loss", output.loss, theirs.loss)
    agree_in_gradients(ours, output.loss, reference, theirs.loss, names_in(ours.config))


@pytest.mark.parametrize("group", [1, 4])
def test_router_losses_and_their_gradients(group: int) -> None:
    # Theirs counts a token once per choice, over all layers pooled: for one layer and group it is top_k times ours,
    # and ours is the mean of that over layers and groups.
    weights = {"load_balance_weight": 0.5, "router_z_weight": 0.25, "routing_group": group}
    ours, reference = _pair("qwen3-moe", weights)
    config = ours.config
    tokens, targets = text(config)
    output = ours(tokens, targets)
    with widened():
        theirs = reference(input_ids=tokens, labels=targets, shift_labels=targets, output_router_logits=True)
        groups = [part for layer in theirs.router_logits for part in layer.split(group * config.seq_len)]
        balances = [load_balancing_loss_func((part,), config.num_experts, config.top_k) for part in groups]
        balance = torch.stack(balances).mean() / config.top_k
        z = torch.stack([router_z_loss_func(layer[None]) for layer in theirs.router_logits]).mean()

    assert len(groups) == config.n_layers * config.batch_size / group
    agree("balance loss", output.balance_loss, balance)
    agree("z-loss", output.z_loss, z)
    expected = theirs.loss + 0.5 * balance + 0.25 * z
    agree_in_gradients(ours, output.loss, reference, expected, names_in(config))


def test_balance_loss_of_one_layer_and_group_is_theirs() -> None:
    ours, reference = _pair("mixtral", {"n_layers": 1, "routing_group": 4})
    tokens, targets = text(ours.config)
    with widened():
        theirs = reference(input_ids=tokens, output_router_logits=True)

    agree("balance loss", ours.config.top_k * ours(tokens, targets).balance_loss, theirs.aux_loss)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("mixtral", {"top_k": 1}),
        ("mixtral", {"normalize_gates": False}),
        ("mixtral", {"rope_base": 9_000.0}),
        ("mixtral", {"expert_kind": "geglu"}),
        ("mixtral", {"logit_softcap": 30.0}),
        ("dots1", {"router_score": "softmax"}),
        ("dots1", {"balance_bias_rate": 0.0}),
    ],
    ids=str,
)
def test_another_setting_of_a_knob_would_not_agree(case: str, changes: dict[str, Any]) -> None:
    ours, reference = _pair(case)
    other = MoE(apply(ours.config, changes)).double()
    other.load_state_dict(ours.state_dict(), strict="balance_bias_rate" not in changes)  # without it there is no bias
    tokens, _ = text(ours.config)
    with widened():
        expected = reference(input_ids=tokens).logits

    assert difference(other.logits(tokens), expected) > 1e-3


def test_another_constant_in_the_norms_would_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, reference = _pair("qwen3-moe")
    tokens, _ = text(ours.config)
    monkeypatch.setattr("moe.layers.NORM_EPS", 1.1 * NORM_EPS)
    with widened():
        expected = reference(input_ids=tokens).logits

    assert difference(ours.logits(tokens), expected) > 1e-9


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe", "dots1"])
def test_logits_in_float32_with_nothing_patched(case: str) -> None:
    build, changes = MODELS[case]
    config = apply(TINY, changes)
    reference = build(config)
    randomize(reference)
    ours = _translated(config, reference)
    tokens, _ = text(config)
    agree("logits in float32", ours.logits(tokens), reference(input_ids=tokens).logits, tolerance=1e-5)


def _pair(case: str, more: dict[str, Any] | None = None) -> tuple[MoE, nn.Module]:
    """The two models in float64, with equal weights, training."""
    build, changes = MODELS[case]
    config = apply(TINY, changes | (more or {}))
    with widened():
        reference = build(config).double().train()

    randomize(reference)
    return _translated(config, reference).double(), reference


def _translated(config: Config, reference: nn.Module) -> MoE:
    weights = translate(weights_of(reference), names_in(config))
    ours = MoE(config).to(weights["embedding"].dtype)
    ours.load_state_dict(weights)
    return ours
