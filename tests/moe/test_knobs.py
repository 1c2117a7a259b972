"""No dead options: every field of Config is perturbed and seen to act where it says that it does.

The real trainer is looked at, not the probe's stand-ins (those are tested in test_probe.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.accounting import peak_memory_bytes
from moe.config import KNOBS, Config, ConfigError, apply
from moe.data import batch, prepare
from moe.evaluate import score_tokens
from moe.knobs import Value
from moe.presets import PRESETS
from moe.rundir import Request, resolve_precision
from moe.train import Trainer

CPU = torch.device("cpu")
BASE = apply(PRESETS["nano"], {"budget_tokens": 512 * 6, "progress_evals": 1})
BPE = apply(BASE, {"tokenizer": "bpe", "vocab_size": 512})
TIMED = apply(BASE, {"budget_tokens": None, "budget_seconds": 0.05})

PERTURBED: Mapping[str, tuple[Config, dict[str, Value]]] = {
    "d_model": (BASE, {"d_model": 48}),
    "n_layers": (BASE, {"n_layers": 3}),
    "n_heads": (BASE, {"n_heads": 4}),
    "seq_len": (BASE, {"seq_len": 32}),
    "rope_base": (BASE, {"rope_base": 100.0}),
    "init_std": (BASE, {"init_std": 0.05}),
    "num_experts": (BASE, {"num_experts": 8}),
    "top_k": (BASE, {"top_k": 1}),
    "d_expert": (BASE, {"d_expert": 64}),
    "expert_kind": (BASE, {"expert_kind": "mlp"}),
    "normalize_gates": (BASE, {"normalize_gates": False}),
    "load_balance_weight": (BASE, {"load_balance_weight": 0.1}),
    "router_z_weight": (BASE, {"router_z_weight": 0.0}),
    "routing_group": (BASE, {"routing_group": 4}),
    "tokenizer": (BASE, {"tokenizer": "bpe", "vocab_size": 512}),
    "vocab_size": (BPE, {"vocab_size": 300}),
    "lr": (BASE, {"lr": 2e-3}),
    "min_lr_ratio": (BASE, {"min_lr_ratio": 0.5}),
    "warmup_fraction": (BASE, {"warmup_fraction": 0.3}),
    "weight_decay": (BASE, {"weight_decay": 0.0}),
    "beta1": (BASE, {"beta1": 0.8}),
    "beta2": (BASE, {"beta2": 0.99}),
    "grad_clip": (BASE, {"grad_clip": 0.1}),
    "batch_size": (BASE, {"batch_size": 4}),
    "budget_tokens": (BASE, {"budget_tokens": 512 * 5}),
    "budget_seconds": (TIMED, {"budget_seconds": 1.0}),
    "eval_tokens": (BASE, {"eval_tokens": 1000}),
    "progress_evals": (BASE, {"progress_evals": 3}),
    "micro_batch_size": (BASE, {"micro_batch_size": 2}),
}
ONE_CHOICE = {"corpus"}  # nothing to perturb to
ON_OTHER_HARDWARE = {"precision"}  # below


def test_every_knob_is_covered() -> None:
    assert set(PERTURBED) | ONE_CHOICE | ON_OTHER_HARDWARE == set(KNOBS)
    assert all(len(KNOBS[name].choices) == 1 for name in ONE_CHOICE)


@pytest.mark.parametrize("name", PERTURBED)
def test_knob_acts_where_it_says(name: str, data_dir: Path) -> None:
    base, changes = PERTURBED[name]
    looks = {
        "loss": _first_loss,
        "gradient": _weights_after_three_updates,
        "schedule": _schedule,
        "evaluation": _evaluations,
        "memory": _memory,
    }
    look = looks[KNOBS[name].acts_on]
    seen = look(base, data_dir)
    assert look(base, data_dir) == seen, "what is looked at must repeat"
    assert look(apply(base, changes), data_dir) != seen


def test_gradient_knobs_leave_the_first_cross_entropy_alone(data_dir: Path) -> None:
    # What a knob acts on is also where it acts first: these change no forward pass, only what is learned from it.
    losses = {
        name: _trainer(apply(*PERTURBED[name]), data_dir).optimizer_step(1e-3)["train_loss"]
        for name, knob in KNOBS.items()
        if knob.acts_on == "gradient" and name != "batch_size"
    }
    assert len(set(losses.values())) == 1, losses


def test_precision_follows_the_device() -> None:
    assert resolve_precision(BASE, CPU) == "fp32"
    assert resolve_precision(BASE, torch.device("cuda")) == "fp16"
    assert resolve_precision(apply(BASE, {"precision": "fp32"}), torch.device("cuda")) == "fp32"
    with pytest.raises(ConfigError, match="fp16 needs CUDA"):
        resolve_precision(apply(BASE, {"precision": "fp16"}), CPU)


def _trainer(config: Config, data_dir: Path) -> Trainer:
    request = Request(kind="train", config=config, seed=0, device="cpu", data_dir=data_dir)
    return Trainer(request, prepare(config, data_dir), CPU)


def _first_loss(config: Config, data_dir: Path) -> float:
    return _trainer(config, data_dir).optimizer_step(1e-3)["train_loss"]


def _weights_after_three_updates(config: Config, data_dir: Path) -> list[float]:
    trainer = _trainer(config, data_dir)
    for step in range(3):
        trainer.step = step
        trainer.optimizer_step(config.lr)

    return [float(parameter.detach().double().square().sum()) for parameter in trainer.model.parameters()]


def _schedule(config: Config, data_dir: Path) -> Any:
    points = list(_trainer(config, data_dir).run())
    return [point["values"]["lr"] for point in points] if config.steps else points[-1]["seconds"] >= 1.0


def _evaluations(config: Config, data_dir: Path) -> tuple[int, int]:
    trainer = _trainer(config, data_dir)
    curve = [point for point in trainer.run() if "val_bpb" in point["values"]]
    return len(curve), score_tokens(trainer.model, trainer.data, "val", config.eval_tokens, CPU).tokens


def _memory(config: Config, data_dir: Path) -> Any:
    trainer = _trainer(config, data_dir)
    pair = batch(trainer.data.tokens["train"], config, seed=0, step=0)
    shapes = [tuple(tokens.shape) for tokens, _ in trainer.micro_batches(*pair)]
    return shapes, peak_memory_bytes(config, "fp32")
