"""The roofline: equal to closed forms on ideal cards, and to what was measured on a T4 within a few percent."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

from benchmarks.kernels import count
from benchmarks.t4_speed import DATA, FITTED, energy_errors, fit, held_out, predicted_memory, read, relative_errors
from moe.accounting import account, muon_flops, muon_matrices
from moe.config import Config, apply
from moe.precision import Precision
from moe.presets import PRESETS
from moe.roofline import T4, speed, work_of

ROWS = read(DATA)
IDEAL = dataclasses.replace(
    T4,
    matmul_flops={"fp32": 1e12, "fp16": 8e12},
    half_width={"fp32": 0.0, "fp16": 0.0},
    bytes_per_second=math.inf,
    launch_seconds=0.0,
    step_seconds=0.0,
)
CONFIGS = dict(PRESETS) | {
    "fine-grained": apply(PRESETS["t4"], {"num_experts": 64, "top_k": 8, "d_expert": 384}),
    "fp32": apply(PRESETS["t4"], {"precision": "fp32"}),
    "dense at first": apply(PRESETS["t4"], {"first_k_dense": 2, "num_shared_experts": 1, "tie_embeddings": False}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_card_without_limits_but_its_products_needs_what_they_need(config: Config) -> None:
    rate = 1e12 if config.precision == "fp32" else 8e12
    ideal = speed(config, IDEAL)
    assert ideal.tokens_per_second == pytest.approx(rate / account(config).flops_per_token)
    assert ideal.waiting == ideal.elementwise == ideal.optimizer == ideal.fixed == 0.0


def test_muon_takes_the_time_of_its_products_in_fp32() -> None:
    config = apply(PRESETS["t4"], {"optimizer": "muon"})
    flops = sum(muon_flops(matrices, config.muon_steps) for matrices in muon_matrices(config))
    assert flops == pytest.approx(530e9, rel=0.02)  # benchmarks/README.md
    assert speed(config, IDEAL).optimizer == pytest.approx(flops / 1e12)
    assert speed(config).step > 1.1 * speed(PRESETS["t4"]).step


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_parts_of_a_step_are_the_whole(config: Config) -> None:
    its = speed(config)
    parts = (its.body, its.head, its.elementwise, its.waiting, its.optimizer, its.fixed)
    assert its.step == pytest.approx(sum(parts))
    assert its.step * its.tokens_per_second == pytest.approx(config.batch_size * config.seq_len)
    assert its.joules_per_token * its.tokens_per_second == pytest.approx(T4.watts)


def test_small_models_wait_for_the_host_and_the_t4_preset_never_does() -> None:
    assert speed(PRESETS["micro"]).waiting > speed(PRESETS["micro"]).step / 2
    assert speed(PRESETS["t4"]).waiting == 0.0
    assert speed(apply(PRESETS["t4"], {"micro_batch_size": 1})).waiting > 0.0


def test_what_costs_more_is_slower() -> None:
    t4 = speed(PRESETS["t4"]).tokens_per_second
    for changes in (
        {"n_layers": 12},
        {"top_k": 4},
        {"num_experts": 64, "micro_batch_size": 1},
        {"precision": "fp32"},
        {"activation_checkpointing": True},
    ):
        assert speed(apply(PRESETS["t4"], changes)).tokens_per_second < t4


def test_a_precision_that_the_card_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="Tesla T4 in bf16"):
        speed(apply(PRESETS["t4"], {"precision": "bf16"}))


def test_the_constants_are_those_that_the_measurements_give() -> None:
    fitted = fit([row for row in ROWS if not held_out(row)])
    for name in (*FITTED, "watts"):
        assert getattr(fitted, name) == pytest.approx(getattr(T4, name), rel=0.02), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_configurations_left_out_of_the_fit_are_predicted(precision: Precision) -> None:
    errors = relative_errors([row for row in ROWS if held_out(row) and row.precision == precision], T4)
    assert len(errors) > 60
    assert statistics.median(errors) < 0.04
    assert statistics.quantiles(errors, n=10)[-1] < 0.08


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_energy_follows(precision: Precision) -> None:
    assert statistics.median(energy_errors([row for row in ROWS if row.precision == precision], T4)) < 0.05


def test_the_measured_model_is_known_to_the_parameter() -> None:
    # In fp32, four more layers cost 16 bytes for each of their parameters and nothing else.
    memory = {row.shape: row.memory_gib * 2**30 for row in ROWS if row.precision == "fp32"}
    deeper = [shape for shape in memory if shape.layers == 12 and shape._replace(layers=8) in memory]
    assert len(deeper) > 30
    for shape in deeper:
        per_layer = (memory[shape] - memory[shape._replace(layers=8)]) / 16 / 4
        assert per_layer == pytest.approx(shape.layer_parameters, abs=10)  # of 6, 11 or 22 million


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_its_peak_memory_is_the_highest_of_three(precision: Precision) -> None:
    rows = [row for row in ROWS if row.precision == precision]
    errors = [abs(predicted_memory(row.shape, precision) / 2**30 / row.memory_gib - 1) for row in rows]
    assert statistics.median(errors) < 0.02
    assert max(errors) < 0.06


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_our_model_launches_and_moves_what_it_is_said_to(precision: Precision) -> None:
    # Run benchmarks/kernels.py where this fails, and put its counts into moe/roofline.py and benchmarks/README.md.
    sizes = {"n_layers": 2, "d_expert": 768, "num_experts": 4, "vocab_size": 512, "seq_len": 256}
    config = apply(PRESETS["t4"], {**sizes, "batch_size": 2, "micro_batch_size": 2, "routing_group": 1})
    counted = count(config, torch.float32 if precision == "fp32" else torch.bfloat16)
    said = work_of(config, precision)
    assert said.launches == pytest.approx(counted.launches, rel=0.15)
    assert said.bytes_moved == pytest.approx(counted.bytes_moved, rel=0.15)
