"""The cards of the lab: who drives them, when they were last heard of, and what they measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from db.clock import utc_now
from db.records import Runner, RunnerMode
from db.store import Store


def register_runner(store: Store, values: Mapping[str, Any]) -> Runner:
    """Writes what a host's card is, or updates it; `values` are hostname to threads, and message.

    A runner that is running stays so: registering only describes the hardware.
    """
    stamp = utc_now()
    with store.transaction():
        key = store.value(
            "SELECT id FROM runners WHERE hostname = ? AND device_key = ?", (values["hostname"], values["device_key"])
        )
        if key is None:
            key = store.insert(
                "runners", {**values, "status": "registered", "started_at": stamp, "heartbeat_at": stamp}
            )
        else:
            assignments = ", ".join(f"{name} = ?" for name in values)
            store.execute(f"UPDATE runners SET {assignments} WHERE id = ?", [*values.values(), key])

        return get_runner(store, int(key))


def get_runner(store: Store, runner_id: int) -> Runner:
    """The runner of that id, which must exist."""
    return Runner.of(store.rows("SELECT * FROM runners WHERE id = ?", (runner_id,))[0])


def list_runners(store: Store) -> list[Runner]:
    """All runners, the one last heard of first."""
    return [Runner.of(row) for row in store.rows("SELECT * FROM runners ORDER BY heartbeat_at DESC, id")]


def start_runner(store: Store, runner_id: int, *, pid: int, boot_id: str, message: str) -> None:
    """Notes that a daemon drives this card now."""
    stamp = utc_now()
    store.execute(
        """
        UPDATE runners SET status = 'running', pid = ?, boot_id = ?, message = ?, started_at = ?, heartbeat_at = ?
        WHERE id = ?
        """,
        (pid, boot_id, message, stamp, stamp, runner_id),
    )


def beat_runner(store: Store, runner_id: int, *, message: str | None = None) -> None:
    """Notes that the daemon lives, and what it has to say."""
    store.execute(
        "UPDATE runners SET heartbeat_at = ?, message = coalesce(?, message) WHERE id = ?",
        (utc_now(), message, runner_id),
    )


def stop_runner(store: Store, runner_id: int, message: str) -> None:
    """Notes that the daemon has gone."""
    store.execute(
        "UPDATE runners SET status = 'stopped', pid = NULL, message = ?, heartbeat_at = ? WHERE id = ?",
        (message, utc_now(), runner_id),
    )


def set_mode(store: Store, runner_id: int, mode: RunnerMode) -> None:
    """Lets a runner claim, or not; its daemon heeds it at the next claim, and so does the next daemon."""
    store.execute("UPDATE runners SET mode = ? WHERE id = ?", (mode, runner_id))
