"""From a question in chat to a verdict from real training, while everything that can be killed is killed.

One lab on the nano preset, a real MCP client in each protocol era, the real daemon, real training processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from agents.hands import stop_runners
from db.experiments import latest_verdict, list_insights
from db.lab import Lab
from db.processes import is_process
from db.runners import list_runners
from tests.gpu_runner.soundness import lab_processes
from tests.server.conftest import RawServer, connect

_Found = TypeVar("_Found")

IDEA = {
    "title": "A hundredth of the learning rate",
    "hypothesis": "With lr this low the model hardly learns within the budget, so val_bpb rises a lot.",
    "domain": "optimization",
    "treatment": {"lr": 1e-4},
}
REVIEW = {
    "novelty": 7,
    "feasibility": 10,
    "impact": 7,
    "clarity": 9,
    "efficiency": 9,
    "feedback": "Known to matter; a good first check that the lab sees what must be seen.",
}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    for name in os.environ:
        if name.startswith(("BLUEBERRY_", "OPENROUTER_")):
            monkeypatch.delenv(name)

    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / "blueberry.toml").write_text(
        'preset = "nano"\n[runner]\ndevice = "cpu"\nlease_seconds = 2\npoll_seconds = 0.1\n'
    )
    made = Lab(folder)
    yield made
    stop_runners(made)
    made.close()


@pytest.mark.timeout(400)  # three clients, two daemons and ten children, each of which starts torch
def test_a_question_becomes_a_verdict_whoever_dies_on_the_way(lab: Lab) -> None:
    with connect(lab.folder, "legacy") as chat:
        [experiment] = chat.call("suggest", proposals=[IDEA])["experiments"]
        key = experiment["id"]
        chat.call("review", experiment_id=key, review=REVIEW)
        [plan] = chat.call("enqueue", experiment_ids=[key])["plans"]
        assert plan["runs_new"] == 5
        chat.call("run")
    # The client is gone, and its server with it; the daemon is not.

    first = until("a daemon", lambda: next((r.pid for r in list_runners(lab.store) if r.pid), None))
    kill(until("a training process", lambda: process_of(lab, "moe.train")))
    kill(first)
    lost = until("a second life of a training run", lambda: process_of(lab, "gpu_runner.shim"))
    assert lost

    watcher = RawServer(lab.folder)
    watcher.begin("status", wait_seconds=20)
    watcher.kill()

    with connect(lab.folder, "2026-07-28") as chat, connect(lab.folder, "legacy") as another:
        until("the first daemon's end", lambda: None if is_process(first) else True)
        second = chat.call("run")["runners"][0]
        assert second["alive"]
        assert second["pid"] != first
        kill(until("the scoring of a checkpoint", lambda: process_of(lab, "moe.evaluate")))
        since = 0
        deadline = time.monotonic() + 240
        seen = another.call("status", experiment_id=key)
        while seen["experiment"]["status"] != "concluded":
            assert time.monotonic() < deadline, seen
            seen = chat.call("status", experiment_id=key, wait_seconds=10, since_event=since)
            since = seen["event_id"]

        verdict = seen["experiment"]["verdict"]
        assert (verdict["verdict"], verdict["final"]) == ("not promising", True)
        assert verdict["low"] > 0
        assert "lr 0.01 → 0.0001: not promising" in verdict["sentence"]

    assert latest_verdict(lab.store, key) is not None
    assert [insight.knob for insight in list_insights(lab.store)] == ["lr"]
    assert_every_run_ended_once(lab)


def assert_every_run_ended_once(lab: Lab) -> None:
    """Whatever was killed: one result a run, curves without gap or double, no broken link."""
    runs = lab.store.rows("SELECT * FROM runs")
    assert {run["status"] for run in runs} == {"completed"}
    assert sum(run["lost"] for run in runs) >= 1
    completed = lab.store.rows("SELECT run_id, count(*) AS n FROM attempts WHERE status = 'completed' GROUP BY run_id")
    assert {row["n"] for row in completed} == {1}
    assert len(completed) == len(runs)
    for run in runs:
        if run["kind"] == "train":
            last = lab.store.value("SELECT max(step) FROM metric_points WHERE run_id = ? AND name = 'lr'", (run["id"],))
            assert last == run["steps"]

    assert lab.store.rows("PRAGMA foreign_key_check") == []
    assert lab.store.value("PRAGMA integrity_check") == "ok"


def process_of(lab: Lab, module: str) -> int | None:
    """A process that runs `module` for this lab, under a command line of its own or as a fork of that name."""
    name = module[:15]  # Linux keeps no more of a fork's
    return next((pid for pid, found in lab_processes(lab.folder).items() if found[:15] == name), None)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def until(what: str, look: Callable[[], _Found | None]) -> _Found:
    """What `look` finds, within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found

        time.sleep(0.01)

    raise AssertionError(f"{what} was not seen within 60 s")
