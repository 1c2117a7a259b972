"""`blueberry reproduce`: real runs done again to the same bits, and what is not the same said to be so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agents.agreement import Agreement, compare
from agents.hands import register, start_runner
from agents.pairs import configs_of, run_values
from agents.reproduction import Rerun
from db.experiments import add_verdict, get_experiment
from db.lab import Lab
from db.processes import is_locked
from db.queue import Outcome, add_run, get_run
from db.records import Arm, Experiment
from db.runners import list_runners
from moe.config import apply
from moe.presets import PRESETS
from tests.server.conftest import ROOT, made_lab, put_experiment, put_run
from tests.server.test_cli import do, verdict_of
from tests.server.test_report import finish

ARMS: tuple[Arm, Arm] = ("baseline", "treatment")
FIRST = (2.1000, 2.0787)


def blueberry(lab: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", "--lab", str(lab), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def real_lab(folder: Path) -> Lab:
    """A lab with one pair of ten steps each, really trained, and a verdict on it."""
    folder.mkdir()
    (folder / "blueberry.toml").write_text('[runner]\ndevice = "cpu"\nthreads = 1\npoll_seconds = 0.1\n')
    lab = Lab(folder)
    runner = register(lab, wait_seconds=60)
    small = apply(PRESETS["nano"], {"budget_tokens": 5120, "eval_tokens": 2048})
    experiment = put_experiment(lab, baseline=small.model_dump())
    for arm, config in zip(ARMS, configs_of(experiment), strict=True):
        values = run_values("train", config, runner.hardware_class, 7)
        add_run(lab.store, experiment.id, arm, values | {"priority": 0, "needs_run_id": None})

    start_runner(lab, wait_seconds=120)
    add_verdict(lab.store, verdict_of(experiment.id) | {"stage": "screen", "screening": "not promising"})
    return lab


@pytest.mark.timeout(400)
def test_real_runs_come_out_the_same_to_the_last_bit(tmp_path: Path) -> None:
    lab = real_lab(tmp_path / "lab")
    try:
        watched = blueberry(lab.folder, "status", "--wait", "20", "--json")
        while json.loads(watched.stdout)["overview"]["queued"] or json.loads(watched.stdout)["overview"]["running"]:
            watched = blueberry(lab.folder, "status", "--wait", "20", "--json")
    finally:
        blueberry(lab.folder, "runner", "stop")

    interrupted(lab, tmp_path / "begun")
    killed(lab, tmp_path / "temporary")
    done = blueberry(lab.folder, "reproduce", "1", "--into", str(tmp_path / "again"), "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    said = json.loads(done.stdout)
    assert (said["reproduced"], said["exact"], said["apart"]) == (True, True, [])
    assert [(run["arm"], run["seed"], run["metric"]["after"]) for run in said["runs"]] == [
        ("baseline", 7, said["runs"][0]["metric"]["before"]),
        ("treatment", 7, said["runs"][1]["metric"]["before"]),
    ]
    assert "2 of 2 scores are the same to the last bit" in said["sentence"]

    other = Lab(tmp_path / "again")
    found = [(get_run(other.store, key).score or {})["val_bpb"] for key in (1, 2)]
    assert found == [run["metric"]["before"] for run in said["runs"]]
    assert other.store.value("SELECT count(*) FROM attempts WHERE status = 'completed'") == 2
    assert list_runners(other.store)[0].status == "stopped"
    other.close()
    again = blueberry(lab.folder, "reproduce", "1", "--into", str(tmp_path / "again"))
    assert (again.returncode, "is a lab already" in again.stderr) == (1, True)
    lab.close()


def interrupted(lab: Lab, into: Path) -> None:
    """Ctrl-C, or a terminal that is closed, while a reproduction trains ends all that it began, and says so."""
    command = [sys.executable, "-m", "server.cli", "--lab", str(lab.folder), "reproduce", "1", "--into", str(into)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as begun:
        assert begun.stdout is not None
        assert begun.stderr is not None
        next(line for line in begun.stdout if "started" in line)
        begun.send_signal(signal.SIGHUP)
        assert begun.wait(120) == 130
        assert f"stopped, and what it had begun with it; what was done until then is in {into}" in begun.stderr.read()

    other = Lab(into)
    assert list_runners(other.store)[0].status == "stopped"
    other.close()


def killed(lab: Lab, temporary: Path) -> None:
    """Whoever is killed leaves a daemon that stops by itself, and a folder that the next one takes away."""
    temporary.mkdir()
    command = [sys.executable, "-m", "server.cli", "--lab", str(lab.folder), "reproduce", "1"]
    there = os.environ | {"TMPDIR": str(temporary)}
    begin = partial(subprocess.Popen, command, cwd=ROOT, env=there, stdout=subprocess.PIPE, text=True)
    with begin() as begun:
        assert begun.stdout is not None
        next(line for line in begun.stdout if "started" in line)
        [folder] = temporary.iterdir()
        begun.kill()

    deadline = time.monotonic() + 120
    while any(map(is_locked, (folder / "locks").iterdir())) and time.monotonic() < deadline:
        time.sleep(0.1)

    other = Lab(folder)
    assert list_runners(other.store)[0].status == "stopped"
    other.close()
    with begin() as begun:
        assert begun.stdout is not None
        next(line for line in begun.stdout if "running 2 runs" in line)
        assert folder not in temporary.iterdir()
        begun.send_signal(signal.SIGTERM)

    assert list(temporary.iterdir()) == []


@pytest.fixture
def found(lab: Lab) -> Experiment:
    """An experiment of one scored pair with a verdict."""
    experiment = put_experiment(lab)
    score(lab, experiment, FIRST)
    stored = {"noise_df": 12.0, "margin": 0.00283, "screening": "promising", "stage": "screen"}
    add_verdict(lab.store, verdict_of(experiment.id) | stored)
    return experiment


def score(lab: Lab, experiment: Experiment, values: Sequence[float | None]) -> None:
    """Both runs of a pair, ended; a value of None is a run that diverged."""
    for arm, value in zip(ARMS, values, strict=True):
        put_run(lab, experiment.id, 5, arm=arm, fingerprint=arm.ljust(16, "0"))
        outcome = Outcome(status="pruned", error="diverged")
        finish(lab, outcome if value is None else Outcome(status="completed", score={"val_bpb": value}))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Lab]:
    with made_lab(tmp_path / "other") as other:
        yield other


def compared(lab: Lab, other: Lab, values: Sequence[float | None], **runner: Any) -> Agreement:
    """The agreement of the lab's pair with one of these scores in another lab, on another machine if so named."""
    score(other, put_experiment(other), values)
    for name, value in runner.items():
        other.store.execute(f"UPDATE runners SET {name} = ?", (value,))

    runs = [get_run(lab.store, key) for key in (1, 2)]
    reruns = [Rerun(arm=arm, run=run, again=run.id) for arm, run in zip(ARMS, runs, strict=True)]
    return compare(lab, other, 1, reruns, [])


def test_on_the_same_machine_one_bit_is_a_failure(lab: Lab, other: Lab, found: Experiment) -> None:
    agreement = compared(lab, other, (FIRST[0], FIRST[1] + 1e-15))
    assert (agreement.exact, agreement.reproduced) == (True, False)
    assert agreement.sentence == (
        "Experiment 1 is not reproduced: 1 of 2 scores are the same to the last bit, and all should be."
    )


def test_equal_scores_are_a_reproduction(lab: Lab, other: Lab, found: Experiment) -> None:
    agreement = compared(lab, other, FIRST, hostname="there")
    assert agreement.reproduced
    assert agreement.sentence.endswith("Though the machine is another one of the same class.")


@pytest.mark.parametrize(
    ("runner", "words"),
    [
        ({"hostname": "there"}, "another one of the same class"),
        ({"threads": 8}, "training had 2 threads and here has 8"),
        ({"hardware_class": "Tesla T4 fp16", "device": "cuda"}, "here it is Tesla T4 fp16"),
    ],
)
def test_on_another_machine_scores_agree_within_the_noise(
    lab: Lab, other: Lab, found: Experiment, runner: dict[str, Any], words: str
) -> None:
    agreement = compared(lab, other, (2.1010, 2.0790), **runner)
    assert (agreement.exact, agreement.reproduced) == (False, True)
    assert words in agreement.sentence
    assert agreement.effect is not None
    assert agreement.effect.effect == pytest.approx(-0.022)


@pytest.mark.parametrize("values", [(2.1, 2.0), (2.0787, 2.1), (2.1, None)])
def test_what_differs_by_more_is_not_reproduced(
    lab: Lab, other: Lab, found: Experiment, values: tuple[float | None, float | None]
) -> None:
    agreement = compared(lab, other, values, hostname="there")
    assert not agreement.reproduced
    assert "differ by more than noise" in agreement.sentence


def test_other_code_or_text_is_refused_and_named(lab: Lab, found: Experiment) -> None:
    refused = do(lab, "reproduce", "1")
    assert refused.exit_code == 1
    assert "the code of moe/ was c and here it is" in refused.stderr
    assert "--anyway" in refused.stderr

    text = {**get_experiment(lab.store, 1).baseline, "corpus": "mytext@3f2a9c0d11223344"}
    lab.store.execute("UPDATE runs SET config = ?", (json.dumps(text),))
    assert "corpus 'mytext' is not known" in do(lab, "reproduce", "1").stderr


def test_an_older_version_reads_a_lab_that_a_newer_one_wrote(lab: Lab, found: Experiment) -> None:
    lab.store.insert("_sqlite_migrations", {"migration_set": "blueberry", "name": "m999_later", "applied_at": "now"})
    assert "written by a newer Blueberry" in do(lab, "status").stderr
    assert "the code of moe/ was c and here it is" in do(lab, "reproduce", "1").stderr


def test_there_must_be_something_to_reproduce(lab: Lab) -> None:
    assert "there is no experiment 1" in do(lab, "reproduce", "1").stderr
    experiment = put_experiment(lab)
    assert "has no verdict yet" in do(lab, "reproduce", "1").stderr
    put_run(lab, experiment.id)
    add_verdict(lab.store, verdict_of(experiment.id))
    assert "has runs without a result" in do(lab, "reproduce", "1").stderr
