"""Answers that take longer than a call: handed to the mind process, picked up later, and honest when it is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agents.answers import answer
from db.errors import RefusedError
from db.experiments import list_experiments
from db.lab import Lab
from db.processes import is_locked
from db.tasks import get_task
from tests.agents.conftest import KEY, ScriptedModel

IDEA = {
    "title": "A tenth of the learning rate",
    "hypothesis": "A lower lr raises val_bpb, since the model moves too little within the budget.",
    "method": "lr alone is changed; an equal val_bpb would count against it.",
    "domain": "optimization",
    "focus_area": None,
    "treatment": {"lr": 0.0006},
    "source": None,
}

ASKED: dict[str, object] = {
    "count": 1,
    "domain": None,
    "focus_area": None,
    "proposer": "auto",
    "proposals": [],
}


@pytest.fixture
def mind_ends(lab: Lab, model: ScriptedModel) -> Callable[[], None]:
    """Waits until the lab's mind process has exited."""
    return lambda: until(lambda: not is_locked(lab.lock("mind")))


def test_a_slow_answer_becomes_a_handle_and_the_same_key_picks_it_up(
    lab: Lab, model: ScriptedModel, mind_ends: Callable[[], None]
) -> None:
    model.says({"proposals": [IDEA]}, delay=1.5)
    begin = time.monotonic()
    handle = answer(lab, "suggest", ASKED, idempotency_key="slow", wait_seconds=0.2)
    assert time.monotonic() - begin < 1.5
    assert handle.status in ("queued", "running")

    done = answer(lab, "suggest", ASKED, idempotency_key="slow", wait_seconds=20)
    assert (done.id, done.status) == (handle.id, "done")
    (experiment,) = list_experiments(lab.store)
    assert (experiment.proposer, experiment.treatment) == ("llm", {"lr": 0.0006})
    assert len(model.requests) == 1
    (interaction,) = lab.store.rows("SELECT * FROM interactions")
    assert (interaction["status"], interaction["usd"], interaction["task_id"]) == ("answered", 0.0123, handle.id)
    mind_ends()


def test_a_mind_killed_in_mid_answer_is_charged_once_and_never_repeats_the_call_silently(
    lab: Lab, model: ScriptedModel, mind_ends: Callable[[], None]
) -> None:
    model.says({"proposals": [IDEA]}, delay=3.0)
    handle = answer(lab, "suggest", ASKED, idempotency_key="doomed", wait_seconds=0.0)
    until(lambda: bool(model.requests))
    os.kill(mind_of(lab), signal.SIGKILL)
    mind_ends()

    with pytest.raises(RefusedError, match="mind process was killed"):
        answer(lab, "suggest", ASKED, idempotency_key="doomed", wait_seconds=20)

    assert get_task(lab.store, handle.id).status == "failed"
    assert len(model.requests) == 1
    (interaction,) = lab.store.rows("SELECT status, usd FROM interactions")
    assert interaction["status"] == "sent"
    assert interaction["usd"] > 0.0
    assert list_experiments(lab.store) == []
    mind_ends()


def test_a_failed_call_is_the_error_of_the_task_and_no_experiment(
    lab: Lab, model: ScriptedModel, mind_ends: Callable[[], None]
) -> None:
    model.fails(401, f"no such key {KEY}")
    arguments = {"count": 1, "proposer": "llm"}
    with pytest.raises(RefusedError) as caught:
        answer(lab, "suggest", arguments, wait_seconds=20)

    assert KEY not in str(caught.value)
    assert list_experiments(lab.store) == []
    assert KEY not in (lab.folder / "logs" / "mind.log").read_text()
    mind_ends()


def mind_of(lab: Lab) -> int:
    """The process id of the lab's mind."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue

            if b"agents" in words and str(lab.folder).encode() in words:
                return int(entry.name)

    raise AssertionError("no mind process lives")


def until(is_so: Callable[[], bool]) -> None:
    """Waits for it, at most 20 s."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
