"""Calls to agents, as rows: done at once, or due work for the mind process; and campaigns of automatic research.

An idempotency key names a call for ever: the same key with the same arguments is the same call, and its answer is
the stored one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from db.clock import utc_now
from db.errors import RefusedError
from db.records import Cycle, Task
from db.store import Store, to_column


def add_task(store: Store, kind: str, arguments: Mapping[str, Any], idempotency_key: str | None = None) -> Task:
    """Queues a call, or finds the one of the same key.

    Raises:
        RefusedError: the key was used for another call.
    """
    with store.transaction():
        if idempotency_key is not None and (known := task_of_key(store, idempotency_key)):
            if known.kind != kind or known.arguments != json.loads(json.dumps(dict(arguments))):
                raise RefusedError(
                    f"idempotency key {idempotency_key!r} was used for another {known.kind} call; use a new one"
                )

            return known

        key = store.insert(
            "tasks",
            {
                "kind": kind,
                "arguments": dict(arguments),
                "idempotency_key": idempotency_key,
                "status": "queued",
                "created_at": utc_now(),
            },
        )
        return get_task(store, key)


def get_task(store: Store, task_id: int) -> Task:
    """The task of that id.

    Raises:
        NotFoundError: there is none.
    """
    row = store.row("SELECT * FROM tasks WHERE id = ?", (task_id,))
    if row is None:
        raise store.missing("task", "tasks", task_id)

    return Task.of(row)


def task_of_key(store: Store, idempotency_key: str) -> Task | None:
    """The call that this key names."""
    row = store.row("SELECT * FROM tasks WHERE idempotency_key = ?", (idempotency_key,))
    return Task.of(row) if row else None


def start_task(store: Store, task_id: int) -> bool:
    """Marks a queued task as running; False when somebody else has."""
    return bool(
        store.execute(
            "UPDATE tasks SET status = 'running', started_at = ? WHERE id = ? AND status = 'queued'",
            (utc_now(), task_id),
        )
    )


def finish_task(
    store: Store, task_id: int, *, result: Mapping[str, Any] | None = None, error: str | None = None
) -> None:
    """Writes the answer of a task, or why there is none."""
    store.execute(
        "UPDATE tasks SET status = ?, result = ?, error = ?, ended_at = ? WHERE id = ?",
        (
            "failed" if error is not None else "done",
            None if result is None else to_column(dict(result)),
            error,
            utc_now(),
            task_id,
        ),
    )


def fail_interrupted_tasks(store: Store, error: str) -> int:
    """Ends the tasks that a dead mind process left running; only its successor, holding the lock, may call this."""
    return store.execute(
        "UPDATE tasks SET status = 'failed', error = ?, ended_at = ? WHERE status = 'running'", (error, utc_now())
    )


def open_tasks(store: Store) -> list[Task]:
    """Calls that are not answered yet, oldest first: due, or under way in the mind process."""
    rows = store.rows("SELECT * FROM tasks WHERE status IN ('queued', 'running') ORDER BY id")
    return [Task.of(row) for row in rows]


def add_cycle(store: Store, values: Mapping[str, Any]) -> Cycle:
    """Begins a campaign; `values` are domain, focus_area, count, max_cycles, start_runner."""
    stamp = utc_now()
    key = store.insert(
        "cycles",
        {**values, "round": 1, "step": "suggest", "status": "running", "created_at": stamp, "updated_at": stamp},
    )
    return get_cycle(store, key)


def get_cycle(store: Store, cycle_id: int) -> Cycle:
    """The campaign of that id.

    Raises:
        NotFoundError: there is none.
    """
    row = store.row("SELECT * FROM cycles WHERE id = ?", (cycle_id,))
    if row is None:
        raise store.missing("cycle", "cycles", cycle_id)

    return Cycle.of(row)


def running_cycles(store: Store) -> list[Cycle]:
    """Campaigns that are not over, oldest first."""
    return [Cycle.of(row) for row in store.rows("SELECT * FROM cycles WHERE status = 'running' ORDER BY id")]


def move_cycle(store: Store, cycle_id: int, **columns: Any) -> None:
    """Changes columns of a campaign, such as step, round, status, error."""
    assignments = ", ".join(f"{name} = ?" for name in columns)
    store.execute(
        f"UPDATE cycles SET {assignments}, updated_at = ? WHERE id = ?",
        [*map(to_column, columns.values()), utc_now(), cycle_id],
    )
