"""What is shown: every number on a page, in a tool's answer or in a report is a stored column or a query here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from db.budget import Usage, usage
from db.cards import lab_kwh
from db.clock import utc_now
from db.interactions import usd_today
from db.records import Run, RunKind, Runner, RunStatus
from db.runners import list_runners
from db.store import Store


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class RunProgress(_View):
    """A run, and where it stands. Times in seconds; None where nothing is known yet."""

    run_id: int
    kind: RunKind
    status: RunStatus
    seed: int
    arm: str | None = None
    experiment_id: int | None = None
    title: str | None = None
    step: int | None
    steps: int | None
    train_loss: float | None
    val_bpb: float | None
    seconds: float | None
    seconds_left: float | None
    tokens_per_second: float | None
    disturbance: str | None
    error: str | None


class GpuReading(_View):
    """One look at a card."""

    at: str
    utilization_percent: float | None
    memory_bytes: int | None
    temperature_celsius: float | None
    power_watts: float | None
    slowdowns: str | None
    """why the card was slower than meant"""
    others: int | None
    """processes on it that are not the run's"""


class Overview(_View):
    """The whole lab at a glance."""

    experiments: dict[str, int]
    runs: dict[str, int]
    verdicts: dict[str, int]
    running: list[RunProgress]
    queued: int
    seconds_left: float | None
    runners: list[Runner]
    gpu: GpuReading | None
    tasks_open: int
    cycles_running: int
    interactions: int
    usd_today: float
    today: Usage
    kwh: float | None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One point of a curve; value None where it was not finite."""

    step: int
    value: float | None


def overview(store: Store) -> Overview:
    """Counts, what runs, the cards, the money."""
    gpu = store.row("SELECT * FROM gpu_samples ORDER BY id DESC LIMIT 1")
    running = running_runs(store)
    return Overview(
        experiments=tally(store, "experiments"),
        runs=tally(store, "runs"),
        verdicts=tally(store, "verdicts"),
        running=running,
        queued=sum(tally(store, "queued").values()),
        seconds_left=_seconds_left(store, running),
        runners=list_runners(store),
        gpu=GpuReading.model_validate(gpu) if gpu else None,
        tasks_open=int(store.value("SELECT count(*) FROM tasks WHERE status IN ('queued', 'running')")),
        cycles_running=int(store.value("SELECT count(*) FROM cycles WHERE status = 'running'")),
        interactions=tally(store, "interactions").get("all", 0),
        usd_today=usd_today(store),
        today=usage(store, utc_now()),
        kwh=lab_kwh(store),
    )


def gpu_readings(store: Store, runner_id: int, *, limit: int) -> list[GpuReading]:
    """The newest looks at one runner's card, the oldest of them first."""
    rows = store.rows("SELECT * FROM gpu_samples WHERE runner_id = ? ORDER BY id DESC LIMIT ?", (runner_id, limit))
    return [GpuReading.model_validate(row) for row in reversed(rows)]


def tally(store: Store, subject: str) -> dict[str, int]:
    """How many there are of each sort, most first: experiments or runs by status, queued runs by kind, verdicts by
    word; all interactions."""
    rows = store.rows("SELECT word, n FROM tallies WHERE subject = ? AND n > 0 ORDER BY n DESC, word", (subject,))
    return {row["word"]: row["n"] for row in rows}


def running_runs(store: Store) -> list[RunProgress]:
    """The runs that are being done now, each with the oldest open experiment that asked for it, or the oldest."""
    rows = store.rows(
        """
        WITH asked AS (
            SELECT runs.id AS run_id, coalesce(
                (SELECT experiments.id FROM experiment_runs CROSS JOIN experiments
                 WHERE experiment_runs.run_id = runs.id AND experiments.id = experiment_runs.experiment_id
                   AND experiments.status IN ('queued', 'running') ORDER BY experiment_runs.experiment_id LIMIT 1),
                (SELECT min(experiment_id) FROM experiment_runs WHERE run_id = runs.id)) AS experiment_id
            FROM runs WHERE runs.status = 'running')
        SELECT runs.*, experiment_runs.arm, experiments.id AS experiment_id, experiments.title
        FROM asked JOIN runs ON runs.id = asked.run_id
        LEFT JOIN experiments ON experiments.id = asked.experiment_id
        LEFT JOIN experiment_runs
            ON experiment_runs.run_id = asked.run_id AND experiment_runs.experiment_id = asked.experiment_id
        ORDER BY runs.id
        """
    )
    return [_progress(row) for row in rows]


def runs_of_experiment(store: Store, experiment_id: int) -> list[RunProgress]:
    """All runs of one experiment: probes, then by seed, those whose checkpoints others need before them."""
    rows = store.rows(
        """
        SELECT runs.*, experiment_runs.arm, experiment_runs.experiment_id, experiments.title
        FROM experiment_runs JOIN runs ON runs.id = experiment_runs.run_id
        JOIN experiments ON experiments.id = experiment_runs.experiment_id
        WHERE experiment_runs.experiment_id = ?
        ORDER BY runs.kind != 'probe', runs.seed, runs.kind != 'train', experiment_runs.arm
        """,
        (experiment_id,),
    )
    return [_progress(row) for row in rows]


def trained_runs(store: Store, experiment_id: int) -> list[Run]:
    """The completed training runs of an experiment, by seed."""
    rows = store.rows(
        """
        SELECT runs.* FROM experiment_runs JOIN runs ON runs.id = experiment_runs.run_id
        WHERE experiment_runs.experiment_id = ? AND runs.kind = 'train' AND runs.status = 'completed'
        ORDER BY runs.seed, runs.id
        """,
        (experiment_id,),
    )
    return [Run.of(row) for row in rows]


def completed_directory(store: Store, run_id: int) -> str | None:
    """The name of the directory in which a run was completed."""
    name = store.value("SELECT directory FROM attempts WHERE run_id = ? AND status = 'completed'", (run_id,))
    return None if name is None else str(name)


def probe_runs(store: Store, experiment_id: int) -> list[Run]:
    """The probes of an experiment, the one that counts last: the newest, unless it failed or was cancelled."""
    rows = store.rows(
        """
        SELECT runs.* FROM experiment_runs JOIN runs ON runs.id = experiment_runs.run_id
        WHERE experiment_runs.experiment_id = ? AND runs.kind = 'probe'
        ORDER BY runs.status NOT IN ('failed', 'cancelled'), runs.id
        """,
        (experiment_id,),
    )
    return [Run.of(row) for row in rows]


def experiment_seconds(store: Store, experiment_id: int) -> float:
    """Seconds of a device that the attempts of an experiment's runs took, shared runs in full, each card by itself."""
    return float(
        store.value(
            """
            SELECT coalesce(sum((julianday(attempts.ended_at) - julianday(attempts.started_at)) * 86400.0
                                * runners.cards), 0.0)
            FROM experiment_runs JOIN attempts ON attempts.run_id = experiment_runs.run_id
            JOIN runners ON runners.id = attempts.runner_id
            WHERE experiment_runs.experiment_id = ? AND attempts.ended_at IS NOT NULL
            """,
            (experiment_id,),
        )
    )


def flops_per_second(store: Store, hardware_class: str) -> float | None:
    """Training FLOP/s that this hardware class has reached over its last 20 runs; None before the first."""
    value = store.value(
        """
        SELECT avg(rate) FROM (
            SELECT json_extract(score, '$.flops') / json_extract(score, '$.train_seconds') AS rate FROM runs
            WHERE status = 'completed' AND hardware_class = ? AND kind = 'train'
              AND json_extract(score, '$.train_seconds') > 0
            ORDER BY id DESC LIMIT 20)
        """,
        (hardware_class,),
    )
    return None if value is None else float(value)


def seconds_around_training(store: Store, hardware_class: str) -> float | None:
    """What a training run took beside training itself (start, evaluation) over the last 20; None before the first."""
    value = store.value(
        """
        SELECT avg(wall - training) FROM (
            SELECT (julianday(attempts.ended_at) - julianday(attempts.started_at)) * 86400.0 AS wall,
                   json_extract(runs.score, '$.train_seconds') AS training
            FROM runs JOIN attempts ON attempts.run_id = runs.id AND attempts.status = 'completed'
            WHERE runs.kind = 'train' AND runs.status = 'completed' AND runs.hardware_class = ?
            ORDER BY runs.id DESC LIMIT 20)
        """,
        (hardware_class,),
    )
    return None if value is None else float(value)


def curve(store: Store, run_id: int, metric: str, *, points: int = 200) -> list[CurvePoint]:
    """A metric of a run's latest attempt, thinned to about `points` points, the first and the last kept."""
    rows = store.rows(
        """
        WITH series AS (
            SELECT step, value, row_number() OVER (ORDER BY step) AS place, count(*) OVER () AS total
            FROM metrics WHERE attempt_id = (SELECT max(id) FROM attempts WHERE run_id = :run)
              AND name_id = (SELECT id FROM metric_names WHERE name = :metric))
        SELECT step, value FROM series
        WHERE place = 1 OR place = total OR place % max(1, total / :points) = 0 ORDER BY step
        """,
        {"run": run_id, "metric": metric, "points": points},
    )
    return [CurvePoint(step=row["step"], value=row["value"]) for row in rows]


def metric_names(store: Store, run_id: int) -> list[str]:
    """The metrics that a run's latest attempt has recorded."""
    rows = store.rows(
        """
        SELECT DISTINCT metric_names.name FROM metrics JOIN metric_names ON metric_names.id = metrics.name_id
        WHERE metrics.attempt_id = (SELECT max(id) FROM attempts WHERE run_id = ?) ORDER BY 1
        """,
        (run_id,),
    )
    return [row["name"] for row in rows]


def lineage(store: Store, experiment_id: int) -> list[int]:
    """An experiment's ancestors, the oldest first, ending with itself."""
    rows = store.rows(
        """
        WITH RECURSIVE ancestors (id, parent_id) AS (
            SELECT id, parent_id FROM experiments WHERE id = ?
            UNION SELECT experiments.id, experiments.parent_id
            FROM experiments JOIN ancestors ON experiments.id = ancestors.parent_id)
        SELECT id FROM ancestors ORDER BY id
        """,
        (experiment_id,),
    )
    return [row["id"] for row in rows]


def _progress(row: dict[str, Any]) -> RunProgress:
    step, steps, seconds = row["step"], row["steps"], row["seconds"]
    left = None
    if row["status"] == "running" and step and steps and seconds:
        left = seconds / step * (steps - step)

    rate = row["tokens"] / seconds if row["tokens"] and seconds else None
    return RunProgress(**row | {"run_id": row["id"], "seconds_left": left, "tokens_per_second": rate})


def _seconds_left(store: Store, running: Sequence[RunProgress]) -> float | None:
    # Queued runs take as long as runs of their kind have taken so far; before the first, nobody knows.
    taken = {
        row["kind"]: row["seconds"]
        for row in store.rows(
            """
            SELECT runs.kind,
                   avg((julianday(attempts.ended_at) - julianday(attempts.started_at)) * 86400.0) AS seconds
            FROM (SELECT * FROM attempts WHERE status = 'completed' ORDER BY id DESC LIMIT 50) AS attempts
            JOIN runs ON runs.id = attempts.run_id GROUP BY runs.kind
            """
        )
    }
    parts = [n * taken[kind] if kind in taken else None for kind, n in tally(store, "queued").items()]
    parts += [run.seconds_left for run in running if run.kind == "train"]
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None
