"""The ledger of calls to language models. A call is written before it is sent, charged at its worst case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from db.clock import utc_now
from db.store import Store, to_column


def open_interaction(store: Store, values: Mapping[str, Any]) -> int:
    """Writes a call that is about to be sent: agent, model, prompt, usd (worst case), task_id, experiment_id."""
    return store.insert("interactions", {**values, "status": "sent", "created_at": utc_now()})


def close_interaction(store: Store, interaction_id: int, values: Mapping[str, Any]) -> None:
    """Writes how a call ended: status, answer, error, tokens, usd (real, where the provider says), latency."""
    assignments = ", ".join(f"{name} = ?" for name in values)
    store.execute(
        f"UPDATE interactions SET {assignments}, answered_at = ? WHERE id = ?",
        [*map(to_column, values.values()), utc_now(), interaction_id],
    )


def usd_today(store: Store) -> float:
    """Dollars of this UTC day, calls without an answer at their worst case."""
    today = utc_now()[:10]
    return float(store.value("SELECT coalesce(sum(usd), 0.0) FROM interactions WHERE created_at >= ?", (today,)))


def experiment_usd(store: Store, experiment_id: int) -> float:
    """What the model calls about an experiment cost."""
    value = store.value("SELECT coalesce(sum(usd), 0.0) FROM interactions WHERE experiment_id = ?", (experiment_id,))
    return float(value)
