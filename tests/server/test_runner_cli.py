"""`blueberry runner ...` against a real daemon."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agents.hands import alive_runners, stop_runners
from db.lab import Lab
from db.runners import list_runners
from tests.server.conftest import connect
from tests.server.test_cli import answer, do


@pytest.fixture
def idle(lab: Lab) -> Iterator[Lab]:
    """A lab with nothing to do, whose daemon is ended with the test."""
    lab.store.execute("DELETE FROM runners")
    (lab.folder / "blueberry.toml").write_text('preset = "nano"\n[runner]\ndevice = "cpu"\n')
    yield lab
    stop_runners(lab)


def test_runner_is_started_paused_restarted_and_drained(idle: Lab) -> None:
    started = answer(idle, "runner", "start")
    [line] = started["runners"]
    assert (line["alive"], line["state"]) == (True, "alive")
    assert started["done"] == f"runner 1 (pid {line['pid']}, {line['device_name']}) is alive"

    paused = "paused: finishes what trains, claims nothing until `blueberry runner resume`"
    assert paused in do(idle, "runner", "pause").stdout
    restarted = answer(idle, "runner", "restart")
    assert restarted["done"].endswith("started anew; what trained goes on")
    assert [(line["pid"], line["state"][:6]) for line in restarted["runners"]] == [(line["pid"], "paused")]
    assert "paused: finishes what trains" in do(idle, "runner", "status").stdout
    with connect(idle.folder) as session:
        assert session.call("run")["done"].endswith("until run(action='resume')")
        assert session.call("run", action="resume")["done"].endswith("is alive")
        session.call("run", action="drain")

    while alive_runners(idle):
        pass

    [runner] = list_runners(idle.store)
    assert (runner.status, runner.mode) == ("stopped", "open")


def test_nothing_to_restart_or_drain_is_said_so(lab: Lab) -> None:
    for verb in ("restart", "drain"):
        refused = do(lab, "runner", verb)
        assert refused.exit_code == 1
        assert "no runner is alive" in refused.stderr

    assert "not running, and paused" in do(lab, "runner", "pause").stdout
    assert "is not running" in do(lab, "runner", "resume").stdout
