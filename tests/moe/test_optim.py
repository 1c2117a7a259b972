"""Which parameters are optimized how, and AdamW against its definition."""

from __future__ import annotations

import torch

from moe.config import apply
from moe.model import MoE
from moe.optim import build_optimizers, set_learning_rate
from moe.presets import PRESETS

CONFIG = apply(PRESETS["nano"], {"lr": 0.01, "min_lr_ratio": 0.1, "warmup_fraction": 0.2})


def test_matrices_decay_but_not_norms_or_embeddings() -> None:
    model = MoE(CONFIG)
    matrices, routers, free = build_optimizers(model, CONFIG)[0].param_groups
    names = {id(parameter): name.rsplit(".", 1)[-1] for name, parameter in model.named_parameters()}
    seen = [{names[id(parameter)] for parameter in group["params"]} for group in (matrices, routers, free)]
    assert seen == [{"w_qkv", "w_out", "w_in"}, {"router"}, {"embedding", "scale"}]
    decay = CONFIG.weight_decay
    assert [group["weight_decay"] for group in (matrices, routers, free)] == [decay, decay, 0.0]


def test_routers_learn_at_their_own_rate() -> None:
    config = apply(CONFIG, {"router_lr_scale": 0.5})
    optimizers = build_optimizers(MoE(config), config)
    set_learning_rate(optimizers, 0.02)
    assert [group["lr"] for group in optimizers[0].param_groups] == [0.02, 0.01, 0.02]


def test_fused_updates_equal_adamw_written_out() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    optimizer = build_optimizers(model, CONFIG)[0]
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
