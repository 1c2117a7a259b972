"""What a run directory says of its end: a result, a fault of the run, or a loss that is nobody's fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from db.queue import Outcome
from db.records import RunKind
from gpu_runner.outcome import CardFailed, Lost, OutOfMemory, Postponed, read_outcome

NO_SCORE = "score.json is missing, or is not one JSON object of finite numbers"
GOOD = {"acts": {"lr": {"acts": True}}, "causal": True, "fits": True}


def read(folder: Path, kind: RunKind = "train", **files: str) -> Outcome | Lost | OutOfMemory | Postponed:
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)

    return read_outcome(folder, kind)


def ended(step: str, exit_code: int, *, terminated: bool = False) -> str:
    return json.dumps({"step": step, "exit_code": exit_code, "terminated": terminated})


def test_result(tmp_path: Path) -> None:
    outcome = read(tmp_path, exit=ended("evaluate", 0), score='{"val_bpb": 2, "steps": 3}')
    assert outcome == Outcome(status="completed", score={"val_bpb": 2.0, "steps": 3}, exit_code=0)


@pytest.mark.parametrize("exit_code", [75, 120])
def test_a_disk_without_room_is_no_fault_of_the_run(tmp_path: Path, exit_code: int) -> None:
    outcome = read(tmp_path, exit=ended("evaluate", exit_code), error='{"error": "OSError", "message": "no space"}')
    assert outcome == Postponed(reason="moe.evaluate could not write: the disk was full or read-only")


def test_result_counts_even_if_the_end_was_asked_for_meanwhile(tmp_path: Path) -> None:
    outcome = read(tmp_path, exit=ended("evaluate", 0, terminated=True), score='{"val_bpb": 2.5}')
    assert isinstance(outcome, Outcome)
    assert outcome.status == "completed"


@pytest.mark.parametrize(
    ("score", "error"),
    [
        ("", NO_SCORE),
        ("[]", NO_SCORE),
        ('{"val_bpb": NaN}', NO_SCORE),
        ('{"val_bpb": 1e999}', NO_SCORE),
        ('{"val_bpb": 1', NO_SCORE),
        ("[" * 100_000, NO_SCORE),
        ("{}", "score.json has no val_bpb but None"),
        ('{"val_bpb": true}', "score.json has no val_bpb but True"),
        ('{"val_bpb": "2.5"}', "score.json has no val_bpb but '2.5'"),
    ],
    ids=lambda text: text[:20],
)
def test_unusable_score_is_a_fault(tmp_path: Path, score: str, error: str) -> None:
    outcome = read(tmp_path, exit=ended("evaluate", 0), score=score)
    assert outcome == Outcome(status="failed", error=error, log_tail="", exit_code=0)


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"acts": {}}, True),
        ({"acts": None}, False),
        ({"acts": {"lr": {"acts": True}, "top_k": {"acts": False}}}, False),
        ({"acts": {"lr": "yes"}}, False),
        ({"causal": False}, False),
        ({"causal": None}, False),
        ({"causal": False, "declared_causal": True}, False),
        ({"causal": False, "declared_causal": False}, True),
        ({"fits": False}, False),
    ],
)
def test_probe_passes_if_all_knobs_act_nothing_peeks_and_it_fits(
    tmp_path: Path, change: dict[str, object], passed: bool
) -> None:
    outcome = read(tmp_path, "probe", exit=ended("probe", 0), score=json.dumps(GOOD | change))
    assert outcome == Outcome(status="completed", score={**GOOD, **change, "passed": passed}, exit_code=0)


@pytest.mark.parametrize("code", ["non_finite", "exploding_gradient", "dead_router"])
def test_divergence_is_a_result(tmp_path: Path, code: str) -> None:
    error = json.dumps({"error": code, "message": "loss is not finite at step 3", "step": 3})
    assert read(tmp_path, exit=ended("train", 1), error=error) == Outcome(
        status="pruned", error="loss is not finite at step 3", exit_code=1
    )


@pytest.mark.parametrize(
    ("exit_code", "error", "said"),
    [
        (1, '{"error": "IndexError", "message": "3 of 2"}', "IndexError: 3 of 2"),
        (1, "not json", "moe.train ended without saying why (exit code 1)"),
        (-11, "{}", "moe.train ended without saying why (killed by SIGSEGV)"),
        (-99, "{}", "moe.train ended without saying why (killed by signal 99)"),
    ],
)
def test_fault_has_its_reason_and_log(tmp_path: Path, exit_code: int, error: str, said: str) -> None:
    (tmp_path / "log.txt").write_text("one\ntwo\n")
    assert read(tmp_path, exit=ended("train", exit_code), error=error) == Outcome(
        status="failed", error=said, log_tail="one\ntwo", exit_code=exit_code
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ended("train", -9), "moe.train was killed by SIGKILL"),
        (ended("evaluate", -15), "moe.evaluate was killed by SIGTERM"),
        (ended("train", 1, terminated=True), "moe.train was ended by SIGTERM"),
        ("torn", "its exit.json cannot be read"),
        ('{"step": "train"}', "its exit.json cannot be read"),
    ],
)
def test_loss_from_outside(tmp_path: Path, text: str, reason: str) -> None:
    assert read(tmp_path, exit=text) == Lost(reason=reason)


def test_nothing_left(tmp_path: Path) -> None:
    assert read(tmp_path) == Lost(reason="all of its processes were killed before they left a result")
    assert isinstance(read_outcome(tmp_path / "missing", "train"), Lost)


def test_one_of_several_processes_that_was_killed_is_a_loss_unless_memory_was_used_up(tmp_path: Path) -> None:
    killed = json.dumps({"error": "KilledProcessError", "message": "process 1 of the run was killed by signal 9"})
    lost = Lost(reason="moe.train: process 1 of the run was killed by signal 9")
    assert read(tmp_path, exit=ended("train", 1), error=killed) == lost
    starved = read(tmp_path, exit=OOM_KILLED.replace("-9", "1"), error=killed)
    assert isinstance(starved, OutOfMemory)
    assert starved.reason == "out of memory: the kernel killed one of its processes, as memory was used up"

    failed = json.dumps({"error": "LostProcessError", "message": "process 1 of the run: OSError: disk"})
    outcome = read(tmp_path, exit=ended("train", 1), error=failed)
    assert isinstance(outcome, Outcome)
    assert outcome.error == "LostProcessError: process 1 of the run: OSError: disk"


NO_MEMORY = '{"error": "out_of_memory", "message": "can\'t allocate memory: you tried to allocate 9 bytes"}'
OOM_KILLED = '{"step": "train", "exit_code": -9, "terminated": false, "oom_killed": true}'


@pytest.mark.parametrize(
    ("exit_text", "error", "reason"),
    [
        (ended("train", 1), NO_MEMORY, "out of memory: can't allocate memory: you tried to allocate 9 bytes"),
        (OOM_KILLED, "{}", "out of memory: the kernel killed it because the machine's memory was used up"),
    ],
)
def test_training_without_memory_is_no_failure(tmp_path: Path, exit_text: str, error: str, reason: str) -> None:
    outcome = read(tmp_path, exit=exit_text, error=error)
    assert isinstance(outcome, OutOfMemory)
    assert (outcome.reason, outcome.log_tail) == (reason, "")


def test_what_cannot_be_cut_up_smaller_fails_without_memory(tmp_path: Path) -> None:
    outcome = read(tmp_path, exit=ended("evaluate", 1), error=NO_MEMORY)
    assert isinstance(outcome, Outcome)
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("moe.evaluate: out of memory: can't allocate memory")


@pytest.mark.parametrize(
    "message",
    [
        "device is cuda, but torch sees no CUDA device here",
        "CUDA error: no CUDA-capable device is detected\nCUDA kernel errors might be",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_failure_for_want_of_a_card_is_the_cards(tmp_path: Path, message: str) -> None:
    error = json.dumps({"error": "AcceleratorError", "message": message})
    assert read(tmp_path, exit=ended("train", 1), error=error) == CardFailed(reason=message)
