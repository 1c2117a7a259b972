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
from moe.aliases import ALIASES
from moe.config import KNOBS, Config, ConfigError, apply
from moe.evaluate import score_tokens
from moe.knobs import Value
from moe.observe import Setting, observe_speed
from moe.precision import cpu_precision
from moe.presets import PRESETS
from moe.rundir import resolve_precision
from moe.schedule import Position, pieces_at
from tests.moe.runs import make_trainer

CPU = torch.device("cpu")
BASE = apply(PRESETS["nano"], {"budget_tokens": 512 * 6, "progress_evals": 1})
BPE = apply(BASE, {"tokenizer": "bpe", "vocab_size": 512})
TIMED = apply(BASE, {"budget_tokens": None, "budget_seconds": 0.05})

PERTURBED: Mapping[str, tuple[Config, dict[str, Value]]] = {
    "d_model": (BASE, {"d_model": 48}),
    "n_layers": (BASE, {"n_layers": 3}),
    "n_heads": (BASE, {"n_heads": 4}),
    "seq_len": (BASE, {"seq_len": 32}),
    "gqa_group_size": (BASE, {"gqa_group_size": 2}),
    "rope_base": (BASE, {"rope_base": 100.0}),
    "qk_norm": (BASE, {"qk_norm": True}),
    "tie_embeddings": (BASE, {"tie_embeddings": False}),
    "logit_softcap": (BASE, {"logit_softcap": 5.0}),
    "init_std": (BASE, {"init_std": 0.05}),
    "zero_init_out": (BASE, {"zero_init_out": True}),
    "num_experts": (BASE, {"num_experts": 8}),
    "top_k": (BASE, {"top_k": 1}),
    "d_expert": (BASE, {"d_expert": 64}),
    "expert_kind": (BASE, {"expert_kind": "mlp"}),
    "num_shared_experts": (BASE, {"num_shared_experts": 1}),
    "first_k_dense": (BASE, {"first_k_dense": 1}),
    "moe_every": (BASE, {"moe_every": 2}),
    "dense_scale": (apply(BASE, {"first_k_dense": 1}), {"dense_scale": 0.75}),
    "routing": (BASE, {"routing": "hash"}),
    "router_score": (apply(BASE, {"normalize_gates": False}), {"router_score": "sigmoid"}),
    "normalize_gates": (BASE, {"normalize_gates": False}),
    "load_balance_weight": (BASE, {"load_balance_weight": 0.1}),
    "router_z_weight": (BASE, {"router_z_weight": 0.0}),
    "routing_group": (BASE, {"routing_group": 4}),
    "noisy_top_k": (BASE, {"noisy_top_k": True}),
    "balance_bias_rate": (BASE, {"balance_bias_rate": 0.01}),
    "capacity_factor": (BASE, {"capacity_factor": 1.0}),
    "router_init_scale": (BASE, {"router_init_scale": 0.1}),
    "router_lr_scale": (BASE, {"router_lr_scale": 0.1}),
    "corpus_documents": (BASE, {"corpus_documents": 2000}),
    "tokenizer": (BASE, {"tokenizer": "bpe", "vocab_size": 512}),
    "vocab_size": (BPE, {"vocab_size": 300}),
    "optimizer": (BASE, {"optimizer": "muon"}),
    "lr": (BASE, {"lr": 2e-3}),
    "schedule": (BASE, {"schedule": "linear"}),
    "decay_fraction": (apply(BASE, {"schedule": "wsd"}), {"decay_fraction": 0.5}),
    "min_lr_ratio": (BASE, {"min_lr_ratio": 0.5}),
    "warmup_fraction": (BASE, {"warmup_fraction": 0.3}),
    "weight_decay": (BASE, {"weight_decay": 0.0}),
    "beta1": (BASE, {"beta1": 0.8}),
    "beta2": (BASE, {"beta2": 0.99}),
    "muon_momentum": (apply(BASE, {"optimizer": "muon"}), {"muon_momentum": 0.8}),
    "muon_steps": (apply(BASE, {"optimizer": "muon"}), {"muon_steps": 3}),
    "grad_clip": (BASE, {"grad_clip": 0.1}),
    "batch_size": (BASE, {"batch_size": 4}),
    "batch_doublings": (BASE, {"batch_doublings": 1}),
    "length_doublings": (BASE, {"length_doublings": 1}),
    "ema_decay": (BASE, {"ema_decay": 0.9}),
    "budget_tokens": (BASE, {"budget_tokens": 512 * 5}),
    "budget_seconds": (TIMED, {"budget_seconds": 1.0}),
    "replicate": (BASE, {"replicate": 1}),
    "eval_tokens": (BASE, {"eval_tokens": 1000}),
    "progress_evals": (BASE, {"progress_evals": 3}),
    "micro_batch_size": (BASE, {"micro_batch_size": 2}),
    "activation_checkpointing": (BASE, {"activation_checkpointing": True}),
}
OWN_TEXT = {"corpus"}  # needs a text of one's own: in test_corpora.py
ON_OTHER_HARDWARE = {"precision", "router_precision", "deterministic"}  # below


def test_what_a_knob_is_called_elsewhere_is_answered_with_ours() -> None:
    assert set(ALIASES.values()) <= set(Config.model_fields)
    assert not set(ALIASES) & set(Config.model_fields)
    for name, ours in {**ALIASES, "num_hidden_layer": "n_layers", "Learning_Rate": "lr", "top_q": "top_k"}.items():
        with pytest.raises(ConfigError, match=f"unknown knob '{name}'; did you mean '{ours}'?"):
            apply(BASE, {name: 1})


def test_a_refusal_says_what_the_knob_takes_and_whose_value_a_wrong_one_is() -> None:
    said = {
        "gating": r"did you mean 'router_score'\? It takes softmax or sigmoid: how router logits become affinities",
        "n_kv_heads": r"did you mean 'gqa_group_size'\? It takes 1 to 64: query heads that share one head",
        "use_qk_norm": r"did you mean 'qk_norm'\? It takes true or false: RMSNorm",
        "temperature": "unknown knob 'temperature'; known: d_model, ",
    }
    for name, text in said.items():
        with pytest.raises(ConfigError, match=text):
            apply(BASE, {name: 1})

    with pytest.raises(ConfigError, match=r"'sigmoid' is a value of router_score$"):
        apply(BASE, {"routing": "sigmoid"})


def test_every_knob_is_covered() -> None:
    after_training = {name for name, knob in KNOBS.items() if knob.role == "post"}  # in test_post.py
    assert set(PERTURBED) | OWN_TEXT | ON_OTHER_HARDWARE | after_training == set(KNOBS)


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
        name: make_trainer(apply(*PERTURBED[name]), data_dir).optimizer_step(1e-3)["train_loss"]
        for name, knob in KNOBS.items()
        if knob.acts_on == "gradient" and name != "batch_size"
    }
    assert len(set(losses.values())) == 1, losses


def test_precision_follows_the_device() -> None:
    assert resolve_precision(BASE, CPU) == "fp32"  # the preset says so: it is too narrow for less
    auto = apply(BASE, {"precision": "auto"})
    assert resolve_precision(auto, CPU) == cpu_precision()
    assert resolve_precision(auto, torch.device("cuda")) == "fp16"
    assert resolve_precision(BASE, torch.device("cuda")) == "fp32"
    with pytest.raises(ConfigError, match="fp16 needs CUDA"):
        resolve_precision(apply(BASE, {"precision": "fp16"}), CPU)


def test_deterministic_kernels_are_a_choice_on_cuda_alone(data_dir: Path) -> None:
    sides = BASE, apply(BASE, {"deterministic": True})
    assert observe_speed(*sides, Setting(data_dir, torch.device("cuda"), 0)).acts
    assert not observe_speed(*sides, Setting(data_dir, CPU, 0)).acts


def test_router_precision_acts_where_matrices_are_not_in_fp32(data_dir: Path) -> None:
    low = {"router_precision": "low"}
    half = apply(BASE, {"precision": "bf16"})
    assert _first_loss(apply(half, low), data_dir) != _first_loss(half, data_dir)
    assert _first_loss(apply(BASE, low), data_dir) == _first_loss(BASE, data_dir)


def test_schedules_of_batches_and_lengths_reach_the_model(data_dir: Path) -> None:
    config = apply(BASE, {"batch_doublings": 1, "length_doublings": 1, "budget_tokens": 512 * 8})
    trainer = make_trainer(config, data_dir)
    shapes = []
    trainer.model.register_forward_pre_hook(lambda _model, inputs: shapes.append(tuple(inputs[0].shape)))
    points = list(trainer.run())
    trained = [shape for shape in shapes if shape in {(8, 32), (4, 64), (8, 64)}]
    assert trained == [(8, 32)] * 8 + [(8, 64)] * 4
    assert (points[-1]["step"], points[-1]["tokens"]) == (12, 512 * 8)


def _first_loss(config: Config, data_dir: Path) -> float:
    return make_trainer(config, data_dir).optimizer_step(1e-3)["train_loss"]


def _weights_after_three_updates(config: Config, data_dir: Path) -> list[float]:
    trainer = make_trainer(config, data_dir)
    for _ in range(3):
        trainer.optimizer_step(config.lr)
        trainer.sequences += config.batch_size

    return [float(tensor.double().square().sum()) for tensor in trainer.scored_model.state_dict().values()]


def _schedule(config: Config, data_dir: Path) -> Any:
    points = list(make_trainer(config, data_dir).run())
    if not config.steps:
        return points[-1]["seconds"] >= 1.0

    lengths = [pieces_at(config, Position(sequences=point["tokens"] // config.seq_len - 1)) for point in points]
    return [(point["tokens"], point["values"]["lr"], pieces) for point, pieces in zip(points, lengths, strict=True)]


def _evaluations(config: Config, data_dir: Path) -> tuple[int, int]:
    trainer = make_trainer(config, data_dir)
    curve = [point for point in trainer.run() if "val_bpb" in point["values"]]
    return len(curve), score_tokens(trainer.model, trainer.data, "val", config.eval_tokens, CPU).tokens


def _memory(config: Config, data_dir: Path) -> Any:
    trainer = make_trainer(config, data_dir)
    shapes = [tuple(tokens.shape) for tokens, _, _ in trainer.micro_batches(config.batch_size)]
    return shapes, peak_memory_bytes(config, "fp32")
