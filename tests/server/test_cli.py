"""The command line: what it prints for people and for programs, and its exit codes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from db.experiments import add_verdict, move_experiment
from db.lab import Lab
from db.tasks import add_cycle, move_cycle
from server.cli import blueberry
from server.commands import as_commands
from server.show import duration
from tests.server.conftest import ROOT, put_experiment, put_run

IDEA = ["--title", "One expert a token", "--hypothesis", "Lower top_k raises val_bpb.", "--domain", "moe_architecture"]


def do(lab: Lab, *arguments: str) -> Result:
    result = CliRunner().invoke(blueberry, ["--lab", str(lab.folder), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def answer(lab: Lab, *arguments: str) -> Any:
    """The JSON of a command that must succeed."""
    result = do(lab, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_flow_from_idea_to_queue(lab: Lab) -> None:
    made = answer(lab, "suggest", *IDEA, "--set", "top_k=1")
    [experiment] = made["experiments"]
    assert experiment["treatment"] == {"top_k": 1}
    assert [review["status"] for review in answer(lab, "review")["reviews"]] == ["approved"]
    assert answer(lab, "enqueue")["queued"] == 5
    assert [line["status"] for line in answer(lab, "list")["experiments"]] == ["queued"]
    assert answer(lab, "show", "1")["experiment"]["hypothesis"].startswith("Lower top_k")
    assert "cancelled, with 5 runs" in do(lab, "cancel", "1").stdout
    assert answer(lab, "list", "--status", "approved") == {"experiments": [], "truncated": False}


def test_people_get_words_and_commands(lab: Lab) -> None:
    said = do(lab, "suggest", *IDEA, "--set", "top_k=1").stdout
    assert "One expert a token" in said
    assert "next: `blueberry review 1`" in said
    assert "next: `blueberry enqueue 1`" in do(lab, "review", "1").stdout
    assert "5 runs wait" in do(lab, "enqueue", "1").stdout
    assert "no runner is alive: `blueberry run` starts it" in do(lab, "status").stdout
    assert "registered by a test" in do(lab, "runner", "status").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["review", "99"], 1, "there is no experiment 99"),
        (["review"], 1, "nothing to do"),
        (["improve"], 1, "nothing to improve"),
        (["improve", "99"], 1, "there is no experiment 99"),
        (["enqueue"], 1, "no experiment is approved"),
        (["enqueue", "99"], 1, "there is no experiment 99"),
        (["run", "--single", "99"], 1, "there is no experiment 99"),
        (["show", "99"], 1, "there is no experiment 99"),
        (["cancel", "99"], 1, "there is no experiment 99"),
        (["status", "--run", "99"], 1, "there is no run 99"),
        (["status", "--task", "99"], 1, "there is no task 99"),
        (["status", "--experiment", "1", "--run", "1"], 1, "at a time"),
        (["suggest", "--domain", "astrology"], 1, "astrology"),
        (["auto-research", "--count", "99"], 1, "max_experiments_per_suggestion"),
        (["export", "--output", "lab.xlsx"], 1, "cannot export to lab.xlsx"),
        (["export", "--output", "/nowhere/lab.jsonl"], 1, "cannot write"),
        (["suggest", "--count", "0"], 2, "count: Input should be greater than or equal to 1"),
        (["suggest", "--domain", "x" * 1_000_000], 2, "domain: String should have at most 60 characters"),
        (["suggest", "--title", "One expert"], 2, "hypothesis is missing"),
        (["suggest", *IDEA], 2, "treatment"),
        (["enqueue", "1", "--seeds", "0"], 2, "seeds: Input should be greater"),
        (["status", "--wait", "60"], 2, "wait_seconds: Input should be less"),
    ],
)
def test_refusals_have_exit_codes_and_words(lab: Lab, arguments: list[str], code: int, words: str) -> None:
    result = do(lab, *arguments, "--json")
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr
    assert json.loads(result.stdout)["error"] in result.stderr
    assert len(result.stderr) < 3000


@pytest.mark.parametrize(
    "arguments",
    [
        ["suggest", "--set", "top_k"],
        ["suggest", "--proposer", "oracle"],
        ["review", "one"],
        ["list", "--status", "splendid"],
        ["run", "--single", "1", "--daemon"],
        ["show"],
        ["conquer"],
    ],
)
def test_wrong_usage_is_exit_code_2(lab: Lab, arguments: list[str]) -> None:
    assert do(lab, *arguments).exit_code == 2


def test_an_unknown_knob_fails_with_the_nearest(lab: Lab) -> None:
    result = do(lab, "suggest", *IDEA, "--set", "top_q=1")
    assert result.exit_code == 1
    assert "top_k" in result.stdout
    by_code = do(lab, "suggest", *IDEA, "--set", "top_k=1", "--metric", "benchmark_code")
    assert (by_code.exit_code, "'benchmark_code' is no metric to judge by; known: val_bpb" in by_code.stdout) == (
        1,
        True,
    )


def test_a_config_can_be_costed_before_anything_runs(lab: Lab) -> None:
    cost = answer(lab, "preflight", "--preset", "t4", "--set", "num_experts=16")
    assert cost["parameters"] > 100e6
    assert 10_000 < cost["t4_tokens_per_second"] < 100_000
    assert 2 * 2**30 < cost["t4_memory_bytes"] < 15 * 2**30
    assert cost["problems"] == []
    assert "where the time goes" in do(lab, "preflight").stdout
    assert answer(lab, "preflight", "--set", "num_experts=64")["problems"] != []
    long = do(lab, "preflight", "--preset", "t4", "--set", "seq_len=8192").stdout
    assert re.search(r"T4: peak memory +[2-9]\d\.\d+ GiB of 15, micro-batches of 24: too much; 1?\d would fit", long)
    assert re.search(r"T4: a run +\d+ min of training", long)
    wrong = do(lab, "preflight", "--set", "num_expert=16")
    assert wrong.exit_code == 1
    assert "did you mean 'num_experts'" in wrong.stderr


def test_malformed_toml_names_the_file(lab: Lab) -> None:
    (lab.folder / "blueberry.toml").write_text("preset = \n")
    result = do(lab, "status")
    assert result.exit_code == 1
    assert "blueberry.toml is not valid TOML" in result.stderr


def test_an_agent_that_takes_long_is_exit_code_3(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-test")
    monkeypatch.setattr("server.cli.PATIENCE_SECONDS", 0.1)
    result = do(lab, "suggest", "--count", "1")

    assert result.exit_code == 3
    assert "still working: blueberry status --task 1" in result.stdout


def test_export_writes_everything_and_no_secret(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-very-secret")
    put_experiment(lab, title="Do not tell sk-or-very-secret")
    counts = answer(lab, "export", "--output", str(tmp_path / "lab.jsonl"))["rows"]
    assert counts["experiments"] == 1
    assert "very-secret" not in (tmp_path / "lab.jsonl").read_text()


def test_the_table_at_the_end_of_a_campaign_is_in_plain_words(lab: Lab) -> None:
    cycle = add_cycle(
        lab.store, {"domain": None, "focus_area": None, "count": 1, "max_cycles": 1, "start_runner": False}
    )
    experiment = put_experiment(lab, cycle_id=cycle.id)
    move_experiment(lab.store, experiment.id, "concluded", allowed=["suggested"])
    add_verdict(lab.store, verdict_of(experiment.id))
    move_cycle(lab.store, cycle.id, status="done", step="end")
    said = do(lab, "status", "--cycle", str(cycle.id)).stdout
    assert "campaign 1: done" in said
    assert "improved" in said
    shown = do(lab, "show", str(experiment.id)).stdout
    assert "verdict: improved -0.0213 [-0.0301, -0.0125], 2 pairs" in shown
    assert "It helps." in shown


def test_a_detached_campaign_is_left_to_the_mind_process(lab: Lab) -> None:
    assert answer(lab, "auto-research", "--count", "1", "--detach") == {"cycle_id": 1}


def test_interrupting_leaves_the_research_going(lab: Lab) -> None:
    experiment = put_experiment(lab)
    put_run(lab, experiment.id)
    child = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "status", "--watch", "--lab", str(lab.folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    for line in child.stdout:
        if "no runner is alive; start it with" in line:
            break

    move_experiment(lab.store, experiment.id, "approved", allowed=["suggested"])
    assert "approved" in child.stdout.readline()
    child.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, errors = child.communicate(timeout=10)
    assert (child.returncode, time.monotonic() - begin < 3.0) == (130, True)
    assert "goes on" in errors
    assert "Traceback" not in errors


def test_tools_sentences_become_commands() -> None:
    assert (
        as_commands("review(experiment_id=3), or review() for all")
        == "`blueberry review 3`, or `blueberry review` for all"
    )
    assert as_commands("enqueue(experiment_ids=[1, 2])") == "`blueberry enqueue 1 2`"
    assert as_commands("status(task_id=4, wait_seconds=20)") == "`blueberry status --task 4`"
    assert as_commands("status(wait_seconds=20)") == "`blueberry status --watch`"
    assert as_commands("run() or run(action='resume')") == "`blueberry run` or `blueberry runner resume`"


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(value) for value in (None, 12.4, 200, 7500)] == ["–", "12 s", "3 min 20 s", "2 h 5 min"]


def verdict_of(experiment_id: int) -> dict[str, Any]:
    return {
        "experiment_id": experiment_id,
        "verdict": "improved",
        "final": True,
        "sentence": "It helps.",
        "reason": None,
        "method": "paired t",
        "metric": "val_bpb",
        "pairs": 2,
        "seeds": [1, 2],
        "baseline_mean": 2.1,
        "treatment_mean": 2.0787,
        "effect": -0.0213,
        "low": -0.0301,
        "high": -0.0125,
        "confidence": 0.95,
        "noise": 0.004,
        "cost_seconds": 80.0,
    }


def test_a_days_budget_and_energy_are_said_in_words(lab: Lab) -> None:
    path = lab.folder / "blueberry.toml"
    path.write_text(f"{path.read_text() if path.exists() else ''}\n[runner]\ngpu_hours_per_day = 0\n")
    reason = "the day's 0 GPU-hours are used; goes on at 00:00 UTC, or raise gpu_hours_per_day under [runner]"
    said = do(lab, "status").stdout
    assert f"\n{reason}\n" in said
    assert "today: 0 GPU-hours, energy not measured, $0.00" in said
    assert f"\n{reason}\n" in do(lab, "runner", "stop").stdout
    seen = answer(lab, "status")["overview"]
    assert (seen["budget"], seen["gpu_hours_today"], seen["kwh_today"], seen["kwh"]) == (reason, 0.0, None, None)
