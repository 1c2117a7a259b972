"""Calls as rows: an idempotency key names one call for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from db.errors import NotFoundError, RefusedError
from db.tasks import (
    add_cycle,
    add_task,
    fail_interrupted_tasks,
    finish_task,
    get_cycle,
    get_task,
    move_cycle,
    open_tasks,
    running_cycles,
    start_task,
)

if TYPE_CHECKING:
    from tests.db.conftest import Filled


def test_same_key_is_the_same_call(filled: Filled) -> None:
    first = add_task(filled.store, "review", {"ids": [1, 2]}, "key")
    assert add_task(filled.store, "review", {"ids": (1, 2)}, "key") == first
    with pytest.raises(RefusedError, match="idempotency key 'key' was used for another review call"):
        add_task(filled.store, "review", {"ids": [3]}, "key")

    assert add_task(filled.store, "review", {"ids": [1, 2]}).id != first.id


def test_task_is_started_once_and_answered(filled: Filled) -> None:
    task = add_task(filled.store, "suggest", {})
    assert start_task(filled.store, task.id) is True
    assert start_task(filled.store, task.id) is False
    assert [t.id for t in open_tasks(filled.store)] == [task.id]
    finish_task(filled.store, task.id, result={"ids": [1]})
    done = get_task(filled.store, task.id)
    assert (done.status, done.result, done.error) == ("done", {"ids": [1]}, None)
    assert open_tasks(filled.store) == []
    with pytest.raises(NotFoundError, match="there is no task 99"):
        get_task(filled.store, 99)


def test_interrupted_tasks_fail_with_a_reason(filled: Filled) -> None:
    running, queued = add_task(filled.store, "suggest", {}), add_task(filled.store, "review", {})
    start_task(filled.store, running.id)
    assert fail_interrupted_tasks(filled.store, "killed") == 1
    assert [get_task(filled.store, t.id).status for t in (running, queued)] == ["failed", "queued"]


def test_cycle_moves(filled: Filled) -> None:
    columns = {"domain": None, "focus_area": None, "count": 3, "max_cycles": 2, "start_runner": True}
    cycle = add_cycle(filled.store, columns)
    assert (cycle.round, cycle.step, cycle.status) == (1, "suggest", "running")
    move_cycle(filled.store, cycle.id, step="end", status="done")
    assert get_cycle(filled.store, cycle.id).step == "end"
    assert running_cycles(filled.store) == []
