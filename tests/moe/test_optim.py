"""The learning rate against its closed form, and what decays."""

from __future__ import annotations

import math

import pytest
import torch

from moe.config import apply
from moe.model import MoE
from moe.optim import build_optimizer, learning_rate, progress_of
from moe.presets import PRESETS

CONFIG = apply(PRESETS["nano"], {"lr": 0.01, "min_lr_ratio": 0.1, "warmup_fraction": 0.2})


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, 0.0),
        (0.05, 0.0025),
        (0.2, 0.01),
        (0.4, 0.001 + 0.009 * (1 + math.cos(math.pi / 4)) / 2),
        (0.6, 0.0055),
        (1.0, 0.001),
        (1.3, 0.001),  # the last step of a budget in seconds may end after it
    ],
)
def test_learning_rate_is_warm_up_then_cosine(progress: float, expected: float) -> None:
    assert learning_rate(CONFIG, progress) == pytest.approx(expected)


def test_learning_rate_starts_at_its_peak_without_warm_up() -> None:
    assert learning_rate(apply(CONFIG, {"warmup_fraction": 0.0}), 0.0) == 0.01


def test_progress_counts_steps_for_tokens_and_follows_the_clock_for_seconds() -> None:
    assert CONFIG.steps == 40
    assert [progress_of(CONFIG, step, 1e9) for step in (0, 19, 39)] == [0.5 / 40, 19.5 / 40, 39.5 / 40]
    timed = apply(CONFIG, {"budget_tokens": None, "budget_seconds": 8.0})
    assert [progress_of(timed, 1000, seconds) for seconds in (0.0, 2.0, 8.0)] == [0.0, 0.25, 1.0]


def test_matrices_decay_but_not_norms_or_embeddings() -> None:
    model = MoE(CONFIG)
    decayed, free = build_optimizer(model, CONFIG).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == CONFIG.weight_decay
    assert {names[id(parameter)].rsplit(".", 1)[-1] for parameter in decayed["params"]} == {
        "w_qkv",
        "w_out",
        "w_in",
        "router",
    }
    assert free["weight_decay"] == 0.0
    assert {names[id(parameter)].rsplit(".", 1)[-1] for parameter in free["params"]} == {"embedding", "scale"}


def test_fused_updates_equal_adamw_written_out() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    optimizer = build_optimizer(model, CONFIG)
    weights = model.weight.detach().clone()
    mean = square = torch.zeros_like(weights)
    for step in range(1, 4):
        gradient = torch.full_like(weights, 0.1 * step)
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros_like(model.bias)
        optimizer.step()

        mean = CONFIG.beta1 * mean + (1 - CONFIG.beta1) * gradient
        square = CONFIG.beta2 * square + (1 - CONFIG.beta2) * gradient**2
        direction = (mean / (1 - CONFIG.beta1**step)) / ((square / (1 - CONFIG.beta2**step)).sqrt() + 1e-8)
        weights = weights * (1 - CONFIG.lr * CONFIG.weight_decay) - CONFIG.lr * direction

    torch.testing.assert_close(model.weight.detach(), weights)
