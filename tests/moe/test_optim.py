"""Which parameters are optimized how, and AdamW against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.accounting import muon_flops, muon_matrices, muon_parameters
from moe.config import apply
from moe.model import MoE
from moe.muon import Muon
from moe.optim import build_optimizers, set_learning_rate
from moe.presets import PRESETS
from tests.moe.runs import make_trainer

CONFIG = apply(PRESETS["nano"], {"lr": 0.01, "min_lr_ratio": 0.1, "warmup_fraction": 0.2})
MUON = apply(CONFIG, {"optimizer": "muon", "gqa_group_size": 2, "first_k_dense": 1, "num_shared_experts": 1})


def test_matrices_decay_but_not_norms_or_embeddings() -> None:
    model = MoE(CONFIG)
    free, decayed = build_optimizers(model, CONFIG)[0].param_groups
    names = {id(parameter): name.rsplit(".", 1)[-1] for name, parameter in model.named_parameters()}
    seen = [{names[id(parameter)] for parameter in group["params"]} for group in (free, decayed)]
    assert seen == [{"embedding", "scale"}, {"w_qkv", "w_out", "w_in", "router"}]
    assert [group["weight_decay"] for group in (free, decayed)] == [0.0, CONFIG.weight_decay]


def test_routers_learn_at_their_own_rate() -> None:
    config = apply(CONFIG, {"router_lr_scale": 0.5})
    optimizers = build_optimizers(MoE(config), config)
    set_learning_rate(optimizers, 0.02)
    assert [(len(group["params"]), group["lr"]) for group in optimizers[0].param_groups] == [
        (6, 0.02),
        (8, 0.02),
        (2, 0.01),
    ]


def test_fused_updates_equal_adamw_written_out() -> None:
    model = MoE(CONFIG)
    model.init_weights(seed=0)
    model.double()
    optimizer = build_optimizers(model, CONFIG)[0]
    matrix = model.blocks[0].get_parameter("attention.w_out")
    weights = matrix.detach().clone()
    mean = square = torch.zeros_like(weights)
    for step in range(1, 4):
        gradient = torch.full_like(weights, 0.1 * step)
        matrix.grad = gradient.clone()
        optimizer.step()

        mean = CONFIG.beta1 * mean + (1 - CONFIG.beta1) * gradient
        square = CONFIG.beta2 * square + (1 - CONFIG.beta2) * gradient**2
        direction = (mean / (1 - CONFIG.beta1**step)) / ((square / (1 - CONFIG.beta2**step)).sqrt() + 1e-8)
        weights = weights * (1 - CONFIG.lr * CONFIG.weight_decay) - CONFIG.lr * direction

    torch.testing.assert_close(matrix.detach(), weights)


@pytest.mark.parametrize("kind", ["swiglu", "mlp"])
def test_muon_takes_the_matrices_and_knows_what_they_hold(kind: str) -> None:
    config = apply(MUON, {"expert_kind": kind})
    model = MoE(config)
    muon, adamw = build_optimizers(model, config)
    assert isinstance(muon, Muon)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows = {names[id(parameter)]: group["rows"] for group in muon.param_groups for parameter in group["params"]}
    gated = kind == "swiglu"
    attention = {"attention.w_qkv": (32, 16, 16), "attention.w_out": None}
    assert rows == {
        **{f"blocks.{layer}.{name}": heights for layer in (0, 1) for name, heights in attention.items()},
        "blocks.0.feed_forward.w_in": (96, 96) if gated else None,
        "blocks.0.feed_forward.w_out": None,
        "blocks.1.feed_forward.experts.w_in": (32, 32) if gated else None,
        "blocks.1.feed_forward.experts.w_out": None,
        "blocks.1.feed_forward.shared.w_in": (32, 32) if gated else None,
        "blocks.1.feed_forward.shared.w_out": None,
    }
    others = {names[id(parameter)].rsplit(".", 1)[-1] for group in adamw.param_groups for parameter in group["params"]}
    assert others == {"embedding", "scale", "router"}
    assert {group["weight_decay"] for group in muon.param_groups} == {config.weight_decay}


def test_muon_learns_with_one_moment_where_accounting_says_so(data_dir: Path) -> None:
    trainer = make_trainer(MUON, data_dir)
    losses = [trainer.optimizer_step(MUON.lr)["train_loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 1.0
    moments = [_numbers(optimizer) for optimizer in trainer.optimizers]
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert moments == [muon_parameters(MUON), 2 * (parameters - muon_parameters(MUON))]
    with FlopCounterMode(display=False) as counter:
        trainer.optimizers[0].step()

    assert counter.get_total_flops() == sum(muon_flops(each, MUON.muon_steps) for each in muon_matrices(MUON))


def test_muon_iterates_in_bf16_where_the_model_computes_in_it() -> None:
    def dtype(compute: torch.dtype | None) -> Any:
        muon, _ = build_optimizers(MoE(MUON, compute), MUON)
        assert isinstance(muon, Muon)
        return muon.dtype

    assert [dtype(compute) for compute in (None, torch.bfloat16, torch.float16)] == [None, torch.bfloat16, None]


def test_muon_skips_what_overflows_in_fp16(data_dir: Path) -> None:
    trainer = make_trainer(MUON, data_dir)
    trainer.half, trainer.model.compute = True, torch.float16
    trainer.scaler = torch.GradScaler("cpu", init_scale=2.0**40)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.optimizer_step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.scaler.get_scale() == 2.0**39

    trainer.scaler = torch.GradScaler("cpu", init_scale=2.0**10)
    trainer.optimizer_step(1e-2)
    full = make_trainer(MUON, data_dir)
    full.optimizer_step(1e-2)
    moved = [(a - b).norm() for a, b in zip(before, trainer.model.parameters(), strict=True)]
    apart = [(a - b).norm() for a, b in zip(full.model.parameters(), trainer.model.parameters(), strict=True)]
    assert all(a > 0.0 for a in moved)
    assert sum(apart) < 0.2 * sum(moved)


def _numbers(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.ndim > 0]
    return sum(tensor.numel() for tensor in tensors)
