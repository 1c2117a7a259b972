"""Training and scoring through the run directory, as the runner does it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.accounting import account, peak_memory_bytes
from moe.config import apply
from moe.evaluate import evaluate
from moe.presets import PRESETS
from moe.rundir import describe_failure, run_in
from moe.train import train
from tests.moe.conftest import MakeRun
from tests.moe.runs import edit, read_json, read_points

NANO = PRESETS["nano"]
SHORT = apply(NANO, {"budget_tokens": 512 * 4, "progress_evals": 0})


def test_nano_learns_and_is_scored(make_run: MakeRun) -> None:
    run = make_run(NANO)
    assert run_in(train, [str(run)]) == 0
    assert run_in(evaluate, [str(run)]) == 0

    points = read_points(run)
    assert len(points) >= 10
    assert points[0]["step"] == 1
    assert points[-1] | {"seconds": 0, "values": {}} == {"step": 40, "tokens": 20480, "seconds": 0, "values": {}}
    assert [point["step"] for point in points] == sorted({point["step"] for point in points})
    curve = [point["values"]["val_bpb"] for point in points if "val_bpb" in point["values"]]
    assert len(curve) == NANO.progress_evals
    assert points[0]["values"]["train_loss"] / math.log(2) > 7.5  # 256 bytes, all alike: 8 bits

    score = read_json(run / "score.json")
    costs = account(NANO)
    assert 2.0 < score["val_bpb"] < 5.0
    assert score["val_bpb"] == pytest.approx(score["val_loss"] / math.log(2))  # a byte a token
    assert score["val_bpb"] == pytest.approx(curve[-1], rel=1e-6)  # nano scores as little text as its curve does
    expected = {
        "tokens": 4096,
        "bytes": 4096,
        "split": "val",
        "evaluator": 2,
        "parameters": costs.parameters,
        "active_parameters": costs.active_parameters,
        "flops": costs.flops,
        "steps": 40,
        "train_tokens": 20480,
    }
    assert {name: score[name] for name in expected} == expected
    assert 1.0 <= score["load_imbalance"] <= NANO.num_experts
    assert score["peak_memory_bytes"] > 50 * 2**20
    assert not (run / "error.json").exists()


def test_same_seed_gives_the_same_bits_in_two_processes(make_run: MakeRun) -> None:
    runs = [make_run(SHORT, name=name, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    children = [subprocess.Popen([sys.executable, "-m", "moe.train", str(run)]) for run in runs]
    assert [child.wait(timeout=300) for child in children] == [0, 0, 0]
    a, b, c = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in runs)
    assert all(torch.equal(weights, b[name]) for name, weights in a.items())
    assert not torch.equal(a["embedding"], c["embedding"])
    assert [_without_time(point) for point in read_points(runs[0])] == [
        _without_time(point) for point in read_points(runs[1])
    ]


def test_peak_memory_is_about_the_estimate(make_run: MakeRun) -> None:
    large = {"batch_size": 128, "micro_batch_size": 128, "seq_len": 128, "budget_tokens": 128 * 128, "d_model": 64}
    config = apply(SHORT, large)
    run = make_run(config, checkpoint_seconds=0.0)
    command = [sys.executable, "-X", "importtime", "-m", "moe.train", str(run)]
    child = subprocess.run(command, check=True, timeout=90, capture_output=True, text=True)
    assert "torch._dynamo" not in child.stderr  # 72 MB, and 1.8 s: moe/adamw.py
    measured = read_json(run / "train.json")["peak_memory_bytes"]
    assert peak_memory_bytes(config, "fp32") == pytest.approx(measured, rel=0.15)


def test_a_smaller_micro_batch_trains_the_same_model(make_run: MakeRun) -> None:
    runs = [make_run(apply(SHORT, {"micro_batch_size": size}), name=str(size)) for size in (8, 2)]
    assert [run_in(train, [str(run)]) for run in runs] == [0, 0]
    a, b = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in runs)
    for name, weights in a.items():
        torch.testing.assert_close(weights, b[name], rtol=1e-3, atol=1e-4)  # fp32 sums in another order

    assert read_points(runs[0])[-1]["values"]["load_imbalance"] == read_points(runs[1])[-1]["values"]["load_imbalance"]


def test_a_budget_in_seconds_ends_on_time(make_run: MakeRun) -> None:
    run = make_run(apply(NANO, {"budget_tokens": None, "budget_seconds": 1.0}))
    assert run_in(train, [str(run)]) == 0
    summary = read_json(run / "train.json")
    assert read_points(run)[-2]["seconds"] < 1.0 <= summary["seconds"]
    assert summary["flops"] == summary["tokens"] * account(NANO).flops_per_token
    rates = [point["values"]["lr"] for point in read_points(run)]
    assert 0 <= rates[0] < 0.1 * NANO.lr
    assert rates[-1] < max(rates) <= NANO.lr


def test_score_is_of_the_split_asked_for(make_run: MakeRun) -> None:
    run = make_run(SHORT)
    assert run_in(train, [str(run)]) == 0
    scores = {}
    for split in ("val", "test"):
        edit(run, split=split)
        assert run_in(evaluate, [str(run)]) == 0
        scores[split] = read_json(run / "score.json")
        assert scores[split]["split"] == split

    assert scores["val"]["val_bpb"] != scores["test"]["val_bpb"]


def test_bpe_is_scored_in_bits_per_byte_of_text(make_run: MakeRun) -> None:
    run = make_run(apply(SHORT, {"tokenizer": "bpe", "vocab_size": 512}))
    assert run_in(train, [str(run)]) == 0
    assert run_in(evaluate, [str(run)]) == 0
    score = read_json(run / "score.json")
    assert score["bytes"] > 1.8 * score["tokens"]
    assert score["val_bpb"] == pytest.approx(score["val_loss"] * score["tokens"] / math.log(2) / score["bytes"])


def test_seq_len_is_scored_on_the_same_text(make_run: MakeRun) -> None:
    run = make_run(apply(SHORT, {"seq_len": 60, "n_heads": 1}))
    assert run_in(train, [str(run)]) == 0
    assert run_in(evaluate, [str(run)]) == 0
    assert read_json(run / "score.json")["tokens"] == 4096


def test_divergence_is_an_error_and_no_checkpoint(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    # A decay of lr * weight_decay = 10 a step multiplies the weights by -9 each time.
    run = make_run(apply(NANO, {"lr": 1.0, "weight_decay": 10.0, "warmup_fraction": 0.0, "min_lr_ratio": 1.0}))
    assert run_in(train, [str(run)]) == 1
    error = read_json(run / "error.json")
    assert error["error"] == "non_finite"
    assert 1 < error["step"] <= 40
    assert "not finite" in error["message"]
    assert "NonFiniteError" in capsys.readouterr().err
    assert not (run / "checkpoint.pt").exists()
    assert all(point["step"] < error["step"] for point in read_points(run))


def test_failed_allocation_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60)

    assert describe_failure(cpu.value)["error"] == "out_of_memory"
    assert describe_failure(torch.OutOfMemoryError("CUDA out of memory"))["error"] == "out_of_memory"
    assert describe_failure(RuntimeError("shapes differ"))["error"] == "RuntimeError"


def test_a_run_directory_serves_one_run(make_run: MakeRun) -> None:
    run = make_run(SHORT)
    assert run_in(train, [str(run)]) == 0
    before = (run / "metrics.jsonl").read_bytes()
    assert run_in(train, [str(run)]) == 1
    assert read_json(run / "error.json")["error"] == "FileExistsError"
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": SHORT.model_dump() | {"top_k": 9}}, "top_k=9 is more than num_experts=4"),
        ({"config": SHORT.model_dump() | {"warp": 1}}, "config.warp: Extra inputs are not permitted"),
        ({"config": SHORT.model_dump() | {"precision": "fp16"}}, "precision=fp16 needs CUDA"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"device": "tpu"}, "device: Input should be 'cpu' or 'cuda'"),
    ],
    ids=["contradiction", "unknown", "fp16 on cpu", "seed", "device"],
)
def test_a_wrong_request_is_refused_with_its_field(make_run: MakeRun, changes: dict[str, Any], message: str) -> None:
    run = make_run(SHORT)
    edit(run, **changes)
    assert run_in(train, [str(run)]) == 1
    error = read_json(run / "error.json")
    assert error["error"] == "ConfigError"
    assert message in error["message"]


def test_a_missing_or_torn_request_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(SHORT)
    (run / "config.json").write_text('{"kind": "tr')
    assert run_in(train, [str(run)]) == 1
    assert "Invalid JSON" in read_json(run / "error.json")["message"]
    (run / "config.json").unlink()
    assert run_in(train, [str(run)]) == 1
    assert "No such file" in read_json(run / "error.json")["message"]
    assert run_in(train, [str(tmp_path / "nowhere")]) == 2
    assert run_in(train, []) == 2


def test_a_checkpoint_that_is_missing_or_of_another_run_is_not_scored(make_run: MakeRun) -> None:
    run = make_run(SHORT)
    assert run_in(evaluate, [str(run)]) == 1
    assert read_json(run / "error.json")["error"] == "FileNotFoundError"

    assert run_in(train, [str(run)]) == 0
    assert run_in(evaluate, [str(run)]) == 0
    edit(run, seed=1)
    assert run_in(evaluate, [str(run)]) == 1
    assert "another config or seed" in read_json(run / "error.json")["message"]
    assert not (run / "score.json").exists()

    edit(run, seed=0)
    (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:1000])
    assert run_in(evaluate, [str(run)]) == 1
    assert not (run / "score.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_trains_on_cuda(make_run: MakeRun) -> None:
    run = make_run(apply(NANO, {"progress_evals": 1}), device="cuda")
    assert run_in(train, [str(run)]) == 0
    assert run_in(evaluate, [str(run)]) == 0
    assert read_json(run / "train.json")["precision"] == "fp16"
    assert read_json(run / "score.json")["val_bpb"] < 5.0


def _without_time(point: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in point["values"].items() if name != "tokens_per_second"}
    return point | {"seconds": 0, "values": values}
