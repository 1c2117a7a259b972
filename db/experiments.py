"""Experiments, their reviews and verdicts, and the insights drawn from them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from db.clock import utc_now
from db.errors import NotFoundError, RefusedError
from db.events import add_event
from db.order import rank_runs_of
from db.records import Experiment, ExperimentStatus, Insight, Review, Value, Verdict
from db.store import Store, to_column


def add_experiment(store: Store, values: Mapping[str, Any]) -> Experiment:
    """Inserts an experiment with status suggested; `values` are its columns without id, status and times."""
    stamp = utc_now()
    with store.transaction():
        key = store.insert("experiments", {**values, "status": "suggested", "created_at": stamp, "updated_at": stamp})
        add_event(store, "suggested", f"{values['proposer']} suggested: {values['title']}", experiment_id=key)
        return get_experiment(store, key)


def get_experiment(store: Store, experiment_id: int) -> Experiment:
    """The experiment of that id.

    Raises:
        NotFoundError: there is none.
    """
    row = store.row("SELECT * FROM experiments WHERE id = ?", (experiment_id,))
    if row is None:
        highest = store.value("SELECT max(id) FROM experiments")
        raise NotFoundError(
            "experiment", experiment_id, f"ids go from 1 to {highest}" if highest else "the lab is empty; suggest one"
        )

    return Experiment.of(row)


def list_experiments(
    store: Store,
    *,
    status: ExperimentStatus | None = None,
    cycle_id: int | None = None,
    oldest_first: bool = False,
    limit: int = 50,
    before_id: int | None = None,
) -> list[Experiment]:
    """Experiments, newest first unless asked otherwise, `before_id` being where the last page ended."""
    asked = {"status = ?": status, "cycle_id = ?": cycle_id, "id < ?": before_id}
    given = {term: value for term, value in asked.items() if value is not None}
    where = " AND ".join(given) or "1"
    order = "ASC" if oldest_first else "DESC"
    rows = store.rows(f"SELECT * FROM experiments WHERE {where} ORDER BY id {order} LIMIT ?", (*given.values(), limit))
    return [Experiment.of(row) for row in rows]


def search_experiments(store: Store, text: str, *, limit: int = 10) -> list[Experiment]:
    """The experiments whose words are nearest to `text` (FTS5, BM25), best first; any text is safe."""
    words = list(dict.fromkeys(re.findall(r"\w+", text)))[:40]
    if not words:
        return []

    query = " OR ".join(f'"{word}"' for word in words)
    rows = store.rows(
        """
        SELECT experiments.* FROM experiments_fts JOIN experiments ON experiments.id = experiments_fts.rowid
        WHERE experiments_fts MATCH ? ORDER BY experiments_fts.rank LIMIT ?
        """,
        (query, limit),
    )
    return [Experiment.of(row) for row in rows]


def experiments_on_knobs(store: Store, knobs: Collection[str], *, limit: int = 200) -> list[Experiment]:
    """The newest experiments whose treatment changes at least one of these knobs, superseded ones left out."""
    marks = ", ".join("?" for _ in knobs)
    rows = store.rows(
        f"""
        SELECT * FROM experiments
        WHERE status != 'superseded' AND EXISTS (SELECT 1 FROM json_each(treatment) WHERE key IN ({marks}))
        ORDER BY id DESC LIMIT ?
        """,
        (*knobs, limit),
    )
    return [Experiment.of(row) for row in rows]


def experiments_of(store: Store, treatment: Mapping[str, Value], *, limit: int = 20) -> list[Experiment]:
    """The newest experiments of exactly this treatment, on whatever baseline, superseded ones left out."""
    rows = store.rows(
        "SELECT * FROM experiments WHERE treatment = ? AND status != 'superseded' ORDER BY id DESC LIMIT ?",
        (to_column(dict(treatment)), limit),
    )
    return [Experiment.of(row) for row in rows]


def move_experiment(
    store: Store,
    experiment_id: int,
    to: ExperimentStatus,
    *,
    allowed: Collection[ExperimentStatus],
    reason: str | None = None,
) -> None:
    """Changes an experiment's status, if it has one of the `allowed` ones.

    Raises:
        NotFoundError: there is no such experiment.
        RefusedError: its status is another one.
    """
    with store.transaction():
        experiment = get_experiment(store, experiment_id)
        if experiment.status not in allowed:
            raise RefusedError(
                f"experiment {experiment_id} is {experiment.status}; "
                f"only {' or '.join(sorted(allowed))} can become {to}"
            )

        store.execute(
            "UPDATE experiments SET status = ?, reason = ?, updated_at = ? WHERE id = ?",
            (to, reason, utc_now(), experiment_id),
        )
        add_event(
            store, to, f"{experiment.title}: {to}" + (f" ({reason})" if reason else ""), experiment_id=experiment_id
        )
        rank_runs_of(store, experiment_id)


def plan_experiment(store: Store, experiment_id: int, **columns: Any) -> None:
    """Notes how an experiment is to be done: hardware_class, priority, seeds, judged_runs."""
    assignments = ", ".join(f"{name} = ?" for name in columns)
    store.execute(
        f"UPDATE experiments SET {assignments}, updated_at = ? WHERE id = ?",
        [*columns.values(), utc_now(), experiment_id],
    )


def text_sets_pinned(store: Store, metric: str) -> dict[str, int]:
    """The texts that experiments with this metric were queued for, each with the first of them."""
    rows = store.rows(
        """
        SELECT metric_text, min(id) AS experiment_id FROM experiments
        WHERE metric = ? AND metric_text IS NOT NULL GROUP BY 1
        """,
        (metric,),
    )
    return {row["metric_text"]: row["experiment_id"] for row in rows}


def add_review(store: Store, values: Mapping[str, Any]) -> Review:
    """Inserts a review; `values` are its columns without id and time."""
    with store.transaction():
        key = store.insert("reviews", {**values, "created_at": utc_now()})
        add_event(
            store,
            "reviewed",
            f"{values['reviewer']} scored {values['score']:.1f}: {values['decision']}",
            experiment_id=values["experiment_id"],
        )
        rank_runs_of(store, values["experiment_id"])
        return Review.of(store.rows("SELECT * FROM reviews WHERE id = ?", (key,))[0])


def latest_review(store: Store, experiment_id: int) -> Review | None:
    """The newest review of an experiment."""
    row = store.row("SELECT * FROM reviews WHERE experiment_id = ? ORDER BY id DESC", (experiment_id,))
    return Review.of(row) if row else None


def add_verdict(store: Store, values: Mapping[str, Any]) -> Verdict:
    """Inserts a verdict; `values` are its columns without id and time. The newest one counts."""
    with store.transaction():
        key = store.insert("verdicts", {**values, "created_at": utc_now()})
        add_event(store, "judged", str(values["sentence"]), experiment_id=values["experiment_id"])
        return Verdict.of(store.rows("SELECT * FROM verdicts WHERE id = ?", (key,))[0])


def latest_verdict(store: Store, experiment_id: int) -> Verdict | None:
    """The verdict that counts for an experiment."""
    row = store.row("SELECT * FROM current_verdicts WHERE experiment_id = ?", (experiment_id,))
    return Verdict.of(row) if row else None


def final_verdicts(store: Store, *, limit: int = 10_000) -> list[tuple[Experiment, Verdict]]:
    """Every concluded experiment with its verdict, newest first."""
    chosen = "verdicts WHERE current = 1 AND final = 1 ORDER BY id DESC LIMIT ?"
    verdicts = store.rows(f"SELECT * FROM {chosen}", (limit,))
    asked = store.rows(
        f"SELECT experiments.* FROM (SELECT id, experiment_id FROM {chosen}) AS latest "
        "JOIN experiments ON experiments.id = latest.experiment_id ORDER BY latest.id DESC",
        (limit,),
    )
    return [(Experiment.of(row), Verdict.of(verdict)) for row, verdict in zip(asked, verdicts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A final verdict on one knob that was moved, as far as insights look at it: whole rows of 10,000 take a second."""

    verdict_id: int
    said: str
    effect: float | None
    share: float
    noise: float | None
    knob: str
    before: Value
    after: Value
    preset: str
    metric: str
    equal_flops: bool


def moves_judged(store: Store, *, limit: int = 10_000) -> list[Moved]:
    """Of the `limit` newest concluded experiments those that moved one knob and are not invalid, newest first."""
    rows = store.rows(
        """
        SELECT latest.id AS verdict_id, said, effect, share, noise, preset, experiments.metric, equal_flops, treatment,
               json_extract(baseline, '$.' || (SELECT key FROM json_each(treatment))) AS before
        FROM (SELECT * FROM verdicts WHERE current = 1 AND final = 1 ORDER BY id DESC LIMIT ?) AS latest
        JOIN experiments ON experiments.id = latest.experiment_id
        WHERE verdict != 'invalid' AND (SELECT count(*) FROM json_each(treatment)) = 1 ORDER BY latest.id DESC
        """,
        (limit,),
    )
    found = []
    for row in rows:
        ((knob, after),) = json.loads(row.pop("treatment")).items()
        found.append(Moved(**row | {"knob": knob, "after": after, "equal_flops": bool(row["equal_flops"])}))

    return found


def experiments_to_judge(store: Store) -> list[Experiment]:
    """Open experiments of which a run has ended since they were judged last, oldest first."""
    rows = store.rows(
        """
        SELECT * FROM experiments INDEXED BY experiments_due
        WHERE status IN ('queued', 'running') AND judged_runs != ends ORDER BY id
        """
    )
    return [Experiment.of(row) for row in rows]


def mark_judged(store: Store, experiment_id: int) -> None:
    """Notes that all runs of the experiment that have ended by now were weighed."""
    store.execute("UPDATE experiments SET judged_runs = ends WHERE id = ?", (experiment_id,))


def put_insight(
    store: Store,
    *,
    knob: str,
    direction: str,
    preset: str,
    metric: str,
    statement: str,
    verdict: str,
    effect: float | None,
    verdict_ids: Sequence[int],
) -> bool:
    """Writes what is known of a knob moved in a direction, with the verdicts it rests on; whether anything changed."""
    with store.transaction():
        row = store.row(
            "SELECT id, statement FROM insights WHERE knob = ? AND direction = ? AND preset = ? AND metric = ?",
            (knob, direction, preset, metric),
        )
        cited = store.rows(
            "SELECT verdict_id FROM insight_verdicts WHERE insight_id = ?", (row["id"] if row else None,)
        )
        if row and row["statement"] == statement and {item["verdict_id"] for item in cited} == set(verdict_ids):
            return False

        stamp = utc_now()
        columns: dict[str, Value] = {
            "statement": statement,
            "verdict": verdict,
            "effect": effect,
            "verdict_count": len(verdict_ids),
            "updated_at": stamp,
        }
        if row:
            key = int(row["id"])
            assignments = ", ".join(f"{name} = ?" for name in columns)
            store.execute(f"UPDATE insights SET {assignments} WHERE id = ?", [*map(to_column, columns.values()), key])
            store.execute("DELETE FROM insight_verdicts WHERE insight_id = ?", (key,))
        else:
            where = {"knob": knob, "direction": direction, "preset": preset, "metric": metric}
            key = store.insert("insights", {**where, "created_at": stamp, **columns})

        store.execute_many("INSERT INTO insight_verdicts VALUES (?, ?)", [(key, verdict) for verdict in verdict_ids])
        add_event(store, "learned", statement)
        return True


def list_insights(store: Store, *, limit: int = 50) -> list[Insight]:
    """Insights, those resting on most verdicts first."""
    rows = store.rows("SELECT * FROM insights ORDER BY verdict_count DESC, updated_at DESC LIMIT ?", (limit,))
    return [Insight.of(row) for row in rows]
