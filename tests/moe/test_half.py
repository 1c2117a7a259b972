"""The fp16 path of the trainer, emulated on the CPU: slow, so that the trainer refuses it there, but the same code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import apply
from moe.presets import PRESETS
from moe.train import Trainer
from tests.moe.runs import make_trainer

CONFIG = apply(PRESETS["nano"], {"micro_batch_size": 4, "budget_tokens": 512 * 8, "progress_evals": 0})


def _trainer(data_dir: Path, *, half: bool, scale: float = 2.0**16) -> Trainer:
    trainer = make_trainer(CONFIG, data_dir)
    if half:
        trainer.half, trainer.model.compute = True, torch.float16
        trainer.scaler = torch.GradScaler("cpu", init_scale=scale)

    return trainer


def test_fp16_follows_fp32(data_dir: Path) -> None:
    full, half = _trainer(data_dir, half=False), _trainer(data_dir, half=True)
    seen = []

    def record(module: Any, inputs: Any, outputs: Any) -> None:
        seen.append({outputs[0].dtype, outputs[1].gates_NK.dtype, outputs[1].logits_NE.dtype})

    for block in half.model.blocks:
        block.register_forward_hook(record)

    for ours, reference in zip(half.run(), full.run(), strict=True):
        for name in ("train_loss", "grad_norm", "balance_loss"):
            assert ours["values"][name] == pytest.approx(reference["values"][name], rel=0.03)

    assert all(types == {torch.float32} for types in seen)  # the residual stream, the router
    assert half.scaler.get_scale() == 2.0**16


def test_a_gradient_that_overflows_is_skipped_and_the_scale_lowered(data_dir: Path) -> None:
    trainer = _trainer(data_dir, half=True, scale=2.0**40)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.optimizer_step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.scaler.get_scale() == 2.0**39
