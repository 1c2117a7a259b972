"""The lab's journal: one line for everything that happened, written in the transaction that made it happen."""

from __future__ import annotations

from db.clock import utc_now
from db.records import Event
from db.store import Store


def add_event(
    store: Store, kind: str, message: str, *, experiment_id: int | None = None, run_id: int | None = None
) -> None:
    """Appends a line."""
    store.insert(
        "events",
        {"at": utc_now(), "kind": kind, "message": message, "experiment_id": experiment_id, "run_id": run_id},
    )


def events_after(store: Store, event_id: int, *, limit: int = 50) -> list[Event]:
    """The oldest lines after that one."""
    rows = store.rows("SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?", (event_id, limit))
    return [Event.of(row) for row in rows]


def latest_event_id(store: Store) -> int:
    """The id of the newest line; 0 in an empty lab."""
    return store.value("SELECT max(id) FROM events") or 0
