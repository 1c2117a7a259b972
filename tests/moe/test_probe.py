"""The probe, through its run directory: knobs that act, knobs that are dead, and what they are blamed for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moe.accounting import account, peak_memory_bytes
from moe.config import KNOBS, Config, apply
from moe.precision import cpu_precision
from moe.presets import PRESETS
from moe.probe import isolate, probe
from moe.rundir import run_in
from moe.standin import stand_in
from tests.moe.conftest import MakeRun
from tests.moe.runs import read_json

Probe = Callable[..., dict[str, Any]]
NANO, MICRO, T4 = PRESETS["nano"], PRESETS["micro"], PRESETS["t4"]


@pytest.fixture
def probed(make_run: MakeRun) -> Probe:
    def run(base: Config, treatment: dict[str, Any]) -> dict[str, Any]:
        directory = make_run(apply(base, treatment), baseline=base)
        assert run_in(probe, [str(directory)]) == 0
        score = read_json(directory / "score.json")
        assert isinstance(score, dict)
        return score

    return run


TREATMENTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"d_model": 128, "n_layers": 3, "n_heads": 4, "seq_len": 128, "rope_base": 100.0, "init_std": 0.03}),
    ({}, {"gqa_group_size": 2, "qk_norm": True, "tie_embeddings": False, "logit_softcap": 5.0, "zero_init_out": True}),
    ({}, {"num_experts": 4, "d_expert": 64, "expert_kind": "mlp", "top_k": 1, "normalize_gates": False}),
    ({"n_layers": 4}, {"num_shared_experts": 1, "first_k_dense": 1, "moe_every": 2, "dense_scale": 1.5}),
    ({}, {"load_balance_weight": 0.1, "router_z_weight": 0.0, "routing_group": 2, "batch_size": 32}),
    ({"normalize_gates": False}, {"router_score": "sigmoid", "noisy_top_k": True, "capacity_factor": 1.0}),
    ({}, {"router_init_scale": 0.1, "router_lr_scale": 0.1, "balance_bias_rate": 0.01, "ema_decay": 0.9}),
    ({}, {"routing": "hash"}),
    ({}, {"replicate": 1}),
    ({}, {"lr": 1e-3, "min_lr_ratio": 0.0, "warmup_fraction": 0.2, "weight_decay": 0.0, "grad_clip": 0.5}),
    ({"schedule": "wsd"}, {"decay_fraction": 0.5, "batch_doublings": 1, "length_doublings": 1}),
    ({}, {"schedule": "linear", "beta1": 0.8, "beta2": 0.99}),
    ({"precision": "bf16"}, {"router_precision": "low"}),
    ({}, {"optimizer": "muon"}),
    ({"optimizer": "muon"}, {"muon_momentum": 0.8, "muon_steps": 3}),
]


@pytest.mark.parametrize(("base", "treatment"), TREATMENTS, ids=lambda changes: ",".join(changes) or "micro")
def test_knobs_that_act_are_seen_to(probed: Probe, base: dict[str, Any], treatment: dict[str, Any]) -> None:
    acts = probed(apply(MICRO, base), treatment)["acts"]
    assert {name: seen["on"] for name, seen in acts.items()} == {name: KNOBS[name].acts_on for name in treatment}
    assert [name for name, seen in acts.items() if not seen["acts"]] == []


def test_all_science_knobs_are_probed_here() -> None:
    named = {name for _, treatment in TREATMENTS for name in treatment}
    assert named == {name for name, knob in KNOBS.items() if knob.role == "science"}


@pytest.mark.parametrize(
    ("base", "treatment", "dead"),
    [
        ({}, {"num_experts": 1, "top_k": 1, "normalize_gates": False}, {"normalize_gates"}),
        ({}, {"num_experts": 1, "top_k": 1, "load_balance_weight": 0.5}, {"load_balance_weight"}),
        ({"top_k": 4}, {"normalize_gates": False}, {"normalize_gates"}),  # all experts chosen: the sum is 1 already
        ({"top_k": 4}, {"load_balance_weight": 0.5}, {"load_balance_weight"}),  # every load is equal
        ({"load_balance_weight": 0.0}, {"routing_group": 2}, {"routing_group"}),
        ({"grad_clip": 1e4}, {"grad_clip": 1e5}, {"grad_clip"}),
        ({"lr": 1e-3, "min_lr_ratio": 1.0, "warmup_fraction": 0.0}, {"warmup_fraction": 1e-3}, {"warmup_fraction"}),
        ({"warmup_fraction": 0.0, "min_lr_ratio": 1.0}, {"lr": 1e-3, "beta1": 0.8}, set()),
        ({}, {"decay_fraction": 0.5}, {"decay_fraction"}),  # of schedule=wsd
        ({}, {"muon_momentum": 0.8, "muon_steps": 3}, {"muon_momentum", "muon_steps"}),  # of optimizer=muon
        ({}, {"router_precision": "low"}, {"router_precision"}),  # all of nano is fp32
        ({}, {"dense_scale": 2.0}, {"dense_scale"}),  # no layer is dense
        (
            {"routing": "hash"},
            {"load_balance_weight": 0.5, "capacity_factor": 1.0},
            {"load_balance_weight", "capacity_factor"},
        ),
        ({"routing": "hash"}, {"router_lr_scale": 2.0, "noisy_top_k": True}, {"router_lr_scale", "noisy_top_k"}),
        ({}, {"capacity_factor": 8.0}, {"capacity_factor"}),  # room for everybody
    ],
    ids=lambda part: "+".join(sorted(part)) or "nano",
)
def test_dead_knobs_are_named(probed: Probe, base: dict[str, Any], treatment: dict[str, Any], dead: set[str]) -> None:
    acts = probed(apply(NANO, base), treatment)["acts"]
    assert set(acts) == set(treatment)
    assert {name for name, seen in acts.items() if not seen["acts"]} == dead


def test_schedules_of_two_billion_steps_are_compared(probed: Probe) -> None:
    acts = probed(apply(NANO, {"budget_tokens": 10**12}), {"warmup_fraction": 0.2, "beta1": 0.8})["acts"]
    assert all(seen["acts"] for seen in acts.values())


@pytest.mark.parametrize(
    ("base", "treatment"),
    [
        ({"d_model": 16, "n_heads": 1}, {"lr": 1e-3}),
        ({}, {"n_heads": 1}),
        ({"tokenizer": "bpe", "vocab_size": 512}, {"num_shared_experts": 1}),
        ({"routing": "expert_choice"}, {"top_k": 1}),
    ],
    ids=["one narrow head", "one head", "a vocabulary of its own", "expert choice"],
)
def test_the_smallest_models_are_probed_as_well(probed: Probe, base: dict[str, Any], treatment: dict[str, Any]) -> None:
    score = probed(apply(NANO, base), treatment)
    assert all(seen["acts"] for seen in score["acts"].values())
    assert score["causal"] == score["declared_causal"]


def test_probe_reports_causality_and_costs(probed: Probe) -> None:
    base = apply(T4, {"tokenizer": "byte", "vocab_size": 256})  # saves training a BPE of 49,152
    score = probed(base, {"num_experts": 16, "d_model": 512})
    config = apply(base, {"num_experts": 16, "d_model": 512})
    costs = account(config)
    assert score["causal"] is True
    assert "moves earlier logits by at most" in score["causal_detail"]
    expected = {
        "peak_memory_bytes": peak_memory_bytes(config, cpu_precision()),
        "parameters": costs.parameters,
        "active_parameters": costs.active_parameters,
        "flops_per_token": costs.flops_per_token,
    }
    assert {name: score[name] for name in expected} == expected
    assert score["fits"] == (score["peak_memory_bytes"] <= score["available_memory_bytes"])


def test_a_baseline_can_be_probed_alone(make_run: MakeRun) -> None:
    directory = make_run(NANO, kind="probe")
    assert run_in(probe, [str(directory)]) == 0
    score = read_json(directory / "score.json")
    assert score["acts"] == {}
    assert score["causal"] is True


def test_each_knob_is_set_back_alone_within_the_treatment() -> None:
    treated = apply(NANO, {"num_experts": 1, "top_k": 1, "lr": 1e-3})
    before, after = isolate("lr", treated, NANO)
    assert (before, after) == (apply(treated, {"lr": NANO.lr}), treated)
    before, after = isolate("top_k", treated, NANO)  # top_k=2 of one expert cannot be
    assert (before, after) == (NANO, apply(NANO, {"top_k": 1}))
    timed = apply(NANO, {"budget_tokens": None, "budget_seconds": 1.0})
    assert isolate("budget_tokens", timed, NANO) == (NANO, timed)


@pytest.mark.parametrize(
    "name", ["d_model", "n_heads", "seq_len", "n_layers", "d_expert", "batch_size", "routing_group", "vocab_size"]
)
def test_stand_ins_are_small_and_keep_the_order(name: str) -> None:
    larger = {
        "vocab_size": 65536,
        "d_model": 768,
        "n_heads": 16,
        "seq_len": 1024,
        "n_layers": 12,
        "d_expert": 3072,
        "batch_size": 192,
    }
    value = larger.get(name, 8)
    a, b = stand_in(T4, apply(T4, {name: value}))
    assert getattr(a, name) < getattr(b, name)
    assert {field for field, seen in a if seen != getattr(b, field)} - {"micro_batch_size"} <= {name, "batch_size"}
    assert max(account(a).parameters, account(b).parameters) < 10**6
    assert stand_in(T4, T4)[0] == stand_in(T4, T4)[1]
