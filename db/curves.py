"""Learning curves: val_bpb at the points of a run, in their order, and whose curve a run has to keep up with."""

from __future__ import annotations

from itertools import groupby

from db.comparisons import CLASS_FIELDS
from db.records import Run
from db.store import Store

NEWEST = 1000
"""Completed runs of a hardware class among which those of one class of config are looked for."""

_FIELDS = (*CLASS_FIELDS, "progress_evals")


def rivals(store: Store, run_id: int) -> list[Run]:
    """The completed baselines with which a screening treatment is compared by val_bpb alone, one an open experiment.

    Empty where any open experiment has no such baseline yet, or needs the run to its end: as a baseline, as weights, by
    another metric, or because a confirmation follows whatever the screening says.
    """
    rows = store.rows(
        """
        SELECT mine.arm = 'treatment' AND experiments.metric = 'val_bpb' AND experiments.direction = 'lower'
               AND experiments.confirm = 'promising' AS comparable,
               (SELECT base.id FROM experiment_runs AS theirs JOIN runs AS base ON base.id = theirs.run_id
                WHERE theirs.experiment_id = mine.experiment_id AND theirs.arm = 'baseline' AND base.kind = 'train'
                  AND base.purpose = 'screen' AND base.seed = treated.seed AND base.status = 'completed') AS baseline_id
        FROM experiment_runs AS mine JOIN runs AS treated ON treated.id = mine.run_id
        JOIN experiments ON experiments.id = mine.experiment_id
        WHERE mine.run_id = ? AND treated.kind = 'train' AND treated.purpose = 'screen'
          AND experiments.status IN ('queued', 'running')
        """,
        (run_id,),
    )
    if not all(row["comparable"] and row["baseline_id"] is not None for row in rows):
        return []

    keys = sorted({row["baseline_id"] for row in rows})
    return [Run.of(row) for key in keys for row in store.rows("SELECT * FROM runs WHERE id = ?", (key,))]


def attempt_curve(store: Store, attempt_id: int) -> list[float | None]:
    """val_bpb at each point of an attempt, the earlier ones that it resumed from among them; None: not finite."""
    rows = store.rows(
        """
        SELECT value FROM metrics
        WHERE attempt_id = ? AND name_id = (SELECT id FROM metric_names WHERE name = 'val_bpb') ORDER BY step
        """,
        (attempt_id,),
    )
    return [row["value"] for row in rows]


def newest_curve(store: Store, run_id: int) -> list[float | None]:
    """val_bpb at each point of a run's newest attempt, however it ended."""
    attempt_id = store.value("SELECT max(id) FROM attempts WHERE run_id = ?", (run_id,))
    return [] if attempt_id is None else attempt_curve(store, attempt_id)


def completed_curve(store: Store, run_id: int) -> list[float | None]:
    """val_bpb at each point of a completed run."""
    attempt_id = store.value("SELECT id FROM attempts WHERE run_id = ? AND status = 'completed'", (run_id,))
    return [] if attempt_id is None else attempt_curve(store, attempt_id)


def curve_note(store: Store, run: Run) -> str | None:
    """On how much text val_bpb along a run's curve is measured, and on how much its score; None for equal text, or
    before there is a curve."""
    row = store.row(
        """
        SELECT max(CASE metric_names.name WHEN 'val_bpb' THEN 1 END) AS has_curve,
               max(CASE metric_names.name WHEN 'val_tokens' THEN metrics.value END) AS tokens
        FROM metrics JOIN metric_names ON metric_names.id = metrics.name_id
        WHERE metrics.attempt_id = (SELECT max(id) FROM attempts WHERE run_id = ?)
          AND metric_names.name IN ('val_bpb', 'val_tokens')
        """,
        (run.id,),
    )
    score = run.score or {}
    tokens, split = score.get("tokens", run.config.get("eval_tokens")), "test" if run.purpose == "confirm" else "val"
    if row is None or not row["has_curve"] or tokens is None or (row["tokens"] == tokens and split == "val"):
        return None

    part = "part" if row["tokens"] is None else f"{row['tokens']:,.0f} tokens"
    return f"val_bpb along the curve: {part} of val; the score: {tokens:,} tokens of {split}"


def class_curves(store: Store, run: Run) -> list[list[list[float]]]:
    """The curves of all completed runs of the same size, text, budget and hardware class; one group an equal config.

    Runs of a group differ in their seeds alone. Curves with a value that was not finite are left out.
    """
    fields = " AND ".join(
        f"json_extract(theirs.config, '$.{name}') IS json_extract(mine.config, '$.{name}')" for name in _FIELDS
    )
    rows = store.rows(
        f"""
        SELECT done.fingerprint, done.id, metrics.value
        FROM (SELECT theirs.id, theirs.fingerprint FROM
                  (SELECT id, fingerprint, config FROM runs
                   WHERE hardware_class = :class AND kind = 'train' AND status = 'completed'
                   ORDER BY id DESC LIMIT {NEWEST}) AS theirs, runs AS mine
              WHERE mine.id = :run AND {fields}) AS done
        JOIN attempts ON attempts.run_id = done.id AND attempts.status = 'completed'
        JOIN metrics ON metrics.attempt_id = attempts.id
                    AND metrics.name_id = (SELECT id FROM metric_names WHERE name = 'val_bpb')
        ORDER BY done.fingerprint, done.id, metrics.step
        """,
        {"class": run.hardware_class, "run": run.id},
    )
    groups = []
    for _, of_config in groupby(rows, key=lambda row: row["fingerprint"]):
        curves = [[point["value"] for point in points] for _, points in groupby(of_config, key=lambda row: row["id"])]
        groups.append([curve for curve in curves if None not in curve])

    return groups
