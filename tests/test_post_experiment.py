"""From a question about trained weights to its verdict: the real daemon, real training, quantization, ablation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.hands import register, start_runner, stop_runners
from agents.planner import enqueue
from db.comparisons import pairs
from db.experiments import add_experiment, get_experiment, latest_verdict, move_experiment
from db.lab import Lab
from moe.config import apply
from moe.presets import PRESETS

BASELINE = apply(PRESETS["nano"], {"budget_tokens": 512 * 8, "eval_tokens": 1024, "progress_evals": 0})


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / "blueberry.toml").write_text('[runner]\ndevice = "cpu"\nthreads = 1\npoll_seconds = 0.05\n')
    made = Lab(folder)
    yield made
    stop_runners(made)
    made.close()


@pytest.mark.timeout(300)  # some twenty runs, each a process or two
def test_int8_is_found_smaller_and_no_worse_and_the_models_are_taken_apart(lab: Lab) -> None:
    experiment = add_experiment(
        lab.store,
        {
            "title": "Eight bits a weight",
            "hypothesis": "weight_bytes fall and val_bpb stays",
            "method": "quantize after training",
            "domain": "efficiency",
            "preset": "nano",
            "baseline": BASELINE.model_dump(),
            "treatment": {"quantize": "int8"},
            "metric": "weight_bytes",
            "direction": "lower",
            "guard_metric": "val_bpb",
            "guard_margin": 0.02,
            "proposer": "assistant",
        },
    )
    move_experiment(lab.store, experiment.id, "approved", allowed=["suggested"])
    register(lab)
    enqueue(lab, [experiment.id])
    start_runner(lab)
    deadline = time.monotonic() + 280
    while get_experiment(lab.store, experiment.id).status != "concluded":
        assert time.monotonic() < deadline, lab.log("runner").read_text()
        time.sleep(0.05)

    verdict = latest_verdict(lab.store, experiment.id)
    assert verdict is not None
    assert (verdict.verdict, verdict.stage) == ("improved", "confirm")
    seeds = 2 + verdict.pairs  # of screening and of confirmation
    assert "val_bpb" in verdict.sentence
    assert "within the margin of 0.02" in verdict.sentence
    for pair in pairs(lab.store, experiment.id):
        assert pair.baseline is not None
        assert pair.treatment is not None
        assert pair.treatment.score is not None
        assert pair.baseline.score is not None
        assert pair.treatment.score["weight_bytes"] < pair.baseline.score["weight_bytes"]

    kinds = lab.store.rows("SELECT kind, count(*) AS n FROM runs WHERE status = 'completed' GROUP BY kind")
    assert {row["kind"]: row["n"] for row in kinds} == {"probe": 1, "train": seeds, "post": 2 * seeds}
    requests = [json.loads(path.read_text()) for path in lab.runs_folder.glob("*/config.json")]
    assert sum(request["checkpoint"] is not None for request in requests) == 2 * seeds

    enqueue(lab, [experiment.id], ablate=True)
    while lab.store.value("SELECT count(*) FROM runs WHERE status IN ('queued', 'running')"):
        assert time.monotonic() < deadline, lab.log("runner").read_text()
        time.sleep(0.05)

    apart = lab.store.rows("SELECT status, json_array_length(score, '$.parts') AS n FROM runs WHERE kind = 'ablate'")
    assert [(row["status"], row["n"] > 8) for row in apart] == [("completed", True)] * seeds
