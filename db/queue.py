"""The queue of runs and the protocol of attempts. Every change of state is one transaction that says whether it won.

A claim bumps the run's fencing token and inserts the live attempt; a partial unique index on live attempts *is* the
lease. Whoever writes for an attempt shows its token; after a takeover the old token no longer works, so a runner that
was suspended past its lease cannot write late (FencedError).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from db.clock import Instant, utc_now
from db.errors import FencedError, NotFoundError
from db.events import add_event
from db.order import free_waiting, join_line, next_run, rank_run
from db.records import ENDED_RUN, Arm, Attempt, Run, Runner
from db.store import Store, to_column


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A run that a runner has just won, and its attempt."""

    run: Run
    attempt: Attempt


@dataclass(frozen=True, kw_only=True)
class Queued:
    """What add_run did: `new` means that this call made or revived it; otherwise it is shared with earlier work."""

    run: Run
    new: bool


@dataclass(frozen=True, kw_only=True)
class Point:
    """One line of metrics.jsonl. A value of None is one that was not finite."""

    step: int
    tokens: int
    seconds: float
    values: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended. `pruned` is a result (a diverged model, or one `beaten_by` the curve of a baseline run);
    `failed` is a fault, and is tried again; `refitted` ran out of memory, and is tried again with less, which counts as
    no failure."""

    status: Literal["completed", "pruned", "failed", "refitted", "cancelled"]
    score: Mapping[str, Any] | None = None
    error: str | None = None
    log_tail: str | None = None
    exit_code: int | None = None
    beaten_by: int | None = None


def add_run(store: Store, experiment_id: int, arm: Arm, values: Mapping[str, Any]) -> Queued:
    """Makes sure that a run is in the queue, or done already, and belongs to the experiment.

    Args:
        values: kind, fingerprint, seed, hardware_class, code, config, baseline, needs_run_id, priority, steps, and
            expected_seconds where they are known.

    The same kind, fingerprint and seed is the same run: it is shared, and queued again only if it failed or was
    cancelled, or was stopped early in another comparison than this. A post run whose checkpoint will never come ends as
    the run did that it needs.
    """
    with store.transaction():
        row = store.row(
            "SELECT * FROM runs WHERE kind = ? AND fingerprint = ? AND seed = ?",
            (values["kind"], values["fingerprint"], values["seed"]),
        )
        new = (
            row is None or row["status"] in ("failed", "cancelled") or _is_wanted_whole(store, row, experiment_id, arm)
        )
        if row is None:
            key = store.insert("runs", {**values, "status": "queued", "created_at": utc_now()})
        else:
            key = int(row["id"])
            # A run that is about to be cancelled for somebody else is wanted again.
            store.execute(
                "UPDATE runs SET priority = max(priority, ?), cancel_requested = 0 WHERE id = ?",
                (values["priority"], key),
            )
            if new:
                store.execute(
                    """
                    UPDATE runs SET status = 'queued', failures = 0, lost = 0, error = NULL, ended_at = NULL,
                                    beaten_by = NULL, needs_run_id = ?
                    WHERE id = ?
                    """,
                    (values.get("needs_run_id"), key),
                )

        store.execute("INSERT OR IGNORE INTO experiment_runs VALUES (?, ?, ?)", (experiment_id, key, arm))
        if new:
            join_line(store, key)

        rank_run(store, key)
        if new and values.get("needs_run_id") is not None:
            _end_waiting(store, get_run(store, values["needs_run_id"]))

        return Queued(run=get_run(store, key), new=new)


def get_run(store: Store, run_id: int) -> Run:
    """The run of that id.

    Raises:
        NotFoundError: there is none.
    """
    row = store.row("SELECT * FROM runs WHERE id = ?", (run_id,))
    if row is None:
        raise store.missing("run", "runs", run_id)

    return Run.of(row)


def claim_run(store: Store, runner: Runner, at: Instant, *, lease_seconds: float) -> Claim | None:
    """Takes the next run in the line of the runner's hardware class (db/order.py); None when none could start."""
    with store.transaction("claim"):
        row = store.row(
            """
            UPDATE runs SET status = 'running', token = token + 1, started_at = coalesce(started_at, ?),
                            step = NULL, tokens = NULL, seconds = NULL, train_loss = NULL, val_bpb = NULL
            WHERE id = ? RETURNING *
            """,
            (utc_now(), next_run(store, runner.hardware_class)),
        )
        if row is None:
            return None

        run = Run.of(row)
        stamp = utc_now()
        attempt_id = store.insert(
            "attempts",
            {
                "run_id": run.id,
                "runner_id": runner.id,
                "token": row["token"],
                "status": "live",
                "directory": f"{run.id}-{row['token']}",
                "boot_id": at.boot_id,
                "lease_until": at.seconds + lease_seconds,
                "started_at": stamp,
                "heartbeat_at": stamp,
            },
        )
        store.execute(
            """
            UPDATE experiments SET status = 'running', updated_at = ?
            WHERE status = 'queued' AND id IN (SELECT experiment_id FROM experiment_runs WHERE run_id = ?)
            """,
            (stamp, run.id),
        )
        add_event(store, "started", f"run {run.id} ({run.kind}, seed {run.seed}) started", run_id=run.id)
        return Claim(run=run, attempt=get_attempt(store, attempt_id))


def get_attempt(store: Store, attempt_id: int) -> Attempt:
    """The attempt of that id.

    Raises:
        NotFoundError: there is none.
    """
    row = store.row("SELECT * FROM attempts WHERE id = ?", (attempt_id,))
    if row is None:
        raise NotFoundError("attempt", attempt_id)

    return Attempt.of(row)


def live_attempts(store: Store) -> list[Attempt]:
    """Attempts that have not ended, as far as the database knows."""
    return [Attempt.of(row) for row in store.rows("SELECT * FROM attempts WHERE status = 'live' ORDER BY id")]


def adopt_attempt(store: Store, attempt: Attempt, runner: Runner, at: Instant, *, lease_seconds: float) -> Attempt:
    """Takes over a live attempt under a new token; its former owner can no longer write.

    Raises:
        FencedError: somebody else was faster.
    """
    with store.transaction("adopt"):
        token = store.value("UPDATE runs SET token = token + 1 WHERE id = ? RETURNING token", (attempt.run_id,))
        changed = store.execute(
            """
            UPDATE attempts SET token = ?, runner_id = ?, lease_until = ?, heartbeat_at = ?, boot_id = ?
            WHERE id = ? AND token = ? AND status = 'live'
            """,
            (token, runner.id, at.seconds + lease_seconds, utc_now(), at.boot_id, attempt.id, attempt.token),
        )
        if not changed:
            raise FencedError(f"attempt {attempt.id} is not held under token {attempt.token}")

        return get_attempt(store, attempt.id)


def set_pid(store: Store, attempt: Attempt, pid: int) -> None:
    """Notes the process that leads the attempt's session."""
    store.execute("UPDATE attempts SET pid = ? WHERE id = ? AND token = ?", (pid, attempt.id, attempt.token))


def ingest(
    store: Store, attempt: Attempt, points: Sequence[Point], offset: int, at: Instant, *, lease_seconds: float
) -> bool:
    """Stores new metric points, how far they were read, and a renewed lease, together; whether to cancel the run.

    Raises:
        FencedError: the attempt is no longer ours; nothing was stored.
    """
    with store.transaction("ingest"):
        changed = store.execute(
            """
            UPDATE attempts SET metrics_offset = ?, lease_until = ?, heartbeat_at = ?
            WHERE id = ? AND token = ? AND status = 'live'
            """,
            (offset, at.seconds + lease_seconds, utc_now(), attempt.id, attempt.token),
        )
        if not changed:
            raise FencedError(f"attempt {attempt.id} is not held under token {attempt.token}")

        if points:
            _store_points(store, attempt, points)

        return bool(store.value("SELECT cancel_requested FROM runs WHERE id = ?", (attempt.run_id,)))


def finish_attempt(store: Store, attempt: Attempt, outcome: Outcome, *, max_failures: int) -> Run:
    """Ends an attempt and, unless a failed one is to be tried again, its run: one result, once.

    Raises:
        FencedError: the attempt is no longer ours; nothing was stored.
    """
    with store.transaction("finish"):
        ended = {"pruned": "completed", "refitted": "failed"}.get(outcome.status, outcome.status)
        _end_attempt(store, attempt, ended, outcome.error, outcome.exit_code)
        status = "queued" if outcome.status == "refitted" else str(outcome.status)
        if outcome.status == "failed":
            failures = store.value(
                "UPDATE runs SET failures = failures + 1 WHERE id = ? RETURNING failures", (attempt.run_id,)
            )
            status = "failed" if failures >= max_failures else "queued"

        return _settle(store, attempt.run_id, status, outcome)


def lose_attempt(store: Store, attempt: Attempt, reason: str, *, max_lost: int) -> Run:
    """Gives up an attempt whose processes are dead without a result; the run is queued again.

    Raises:
        FencedError: the attempt is no longer ours.
    """
    with store.transaction("lose"):
        _end_attempt(store, attempt, "lost", reason, None)
        lost = store.value("UPDATE runs SET lost = lost + 1 WHERE id = ? RETURNING lost", (attempt.run_id,))
        status = "failed" if lost >= max_lost else "queued"
        return _settle(store, attempt.run_id, status, Outcome(status="failed", error=reason))


def put_back(store: Store, attempt: Attempt, reason: str) -> Run:
    """Queues a run again because its runner stops; neither a failure nor a loss.

    Raises:
        FencedError: the attempt is no longer ours.
    """
    with store.transaction("put_back"):
        _end_attempt(store, attempt, "cancelled", reason, None)
        return _settle(store, attempt.run_id, "queued", Outcome(status="failed", error=reason))


def cancel_experiment_runs(store: Store, experiment_id: int) -> int:
    """Cancels the runs that no other open experiment shares: queued ones at once, running ones by their runner."""
    with store.transaction("cancel"):
        rows = store.rows(
            """
            SELECT runs.id, runs.status FROM runs JOIN experiment_runs AS mine ON mine.run_id = runs.id
            WHERE mine.experiment_id = :id AND runs.status IN ('queued', 'running') AND NOT EXISTS (
                SELECT 1 FROM experiment_runs AS theirs JOIN experiments ON experiments.id = theirs.experiment_id
                WHERE theirs.run_id = runs.id AND theirs.experiment_id != :id
                  AND experiments.status IN ('queued', 'running'))
            """,
            {"id": experiment_id},
        )
        for row in rows:
            if get_run(store, row["id"]).status in ENDED_RUN:
                continue  # with the run whose checkpoint it needs

            if row["status"] == "queued":
                _settle(store, row["id"], "cancelled", Outcome(status="cancelled"))
            else:
                store.execute("UPDATE runs SET cancel_requested = 1 WHERE id = ?", (row["id"],))

        return len(rows)


def prioritize_experiment(store: Store, experiment_id: int) -> int:
    """Puts an experiment's queued runs before all others; returns how many there are."""
    with store.transaction():
        highest = store.value("SELECT max(priority) FROM runs WHERE status = 'queued'") or 0
        return store.execute(
            """
            UPDATE runs SET priority = ?
            WHERE status = 'queued' AND id IN (SELECT run_id FROM experiment_runs WHERE experiment_id = ?)
            """,
            (highest + 1, experiment_id),
        )


def count_queued(store: Store, hardware_class: str | None = None) -> int:
    """Runs that wait, of one hardware class or of all."""
    return int(
        store.value(
            "SELECT count(*) FROM runs WHERE status = 'queued' AND (:class IS NULL OR hardware_class = :class)",
            {"class": hardware_class},
        )
    )


def _is_wanted_whole(store: Store, row: Mapping[str, Any], experiment_id: int, arm: Arm) -> bool:
    """Whether a run was stopped in another comparison than the one that asks for it now."""
    if row["status"] != "pruned" or row["beaten_by"] is None:
        return False

    linked = store.value(
        "SELECT count(*) FROM experiment_runs WHERE experiment_id = ? AND run_id = ?", (experiment_id, row["id"])
    )
    return arm != "treatment" or not linked


def _end_attempt(store: Store, attempt: Attempt, status: str, error: str | None, exit_code: int | None) -> None:
    # Nothing ends before it began, also where the clock was set back meanwhile: durations are shown and added up.
    changed = store.execute(
        """
        UPDATE attempts SET status = ?, error = ?, exit_code = ?, ended_at = max(started_at, ?)
        WHERE id = ? AND token = ? AND status = 'live'
        """,
        (status, error, exit_code, utc_now(), attempt.id, attempt.token),
    )
    if not changed:
        raise FencedError(f"attempt {attempt.id} is not held under token {attempt.token}")


def _settle(store: Store, run_id: int, status: str, outcome: Outcome) -> Run:
    run = get_run(store, run_id)
    if status == "queued" and run.cancel_requested:
        status = "cancelled"

    store.execute(
        """
        UPDATE runs SET status = ?, error = ?, log_tail = coalesce(?, log_tail), beaten_by = ?, ended_at = ?
        WHERE id = ?
        """,
        (
            status,
            outcome.error,
            outcome.log_tail,
            outcome.beaten_by,
            None if status == "queued" else utc_now(),
            run_id,
        ),
    )
    message = f"run {run_id} ({run.kind}, seed {run.seed}) {status}"
    if status == "queued":
        message = f"run {run_id} ({run.kind}, seed {run.seed}) goes back to the queue"

    if outcome.score is not None:
        _store_score(store, run_id, outcome.score)
        if "val_bpb" in outcome.score:
            message += f", val_bpb {outcome.score['val_bpb']:.4f}"

    if outcome.error:
        message += f": {outcome.error}"

    add_event(store, "ended" if status != "queued" else "requeued", message, run_id=run_id)
    free_waiting(store, run_id)
    run = get_run(store, run_id)
    _end_waiting(store, run)
    return run


def _end_waiting(store: Store, run: Run) -> None:
    """Ends the post runs that wait for a checkpoint of `run`, if it has ended without one, as it did."""
    if run.status not in ("pruned", "failed", "cancelled"):
        return

    rows = store.rows(
        "SELECT id FROM runs WHERE needs_run_id = ? AND kind = 'post' AND status = 'queued'",
        (run.id,),
    )
    for row in rows:
        error = f"run {run.id} left no checkpoint: {run.error or run.status}"
        _settle(store, row["id"], run.status, Outcome(status="failed", error=error))


def _store_score(store: Store, run_id: int, score: Mapping[str, Any]) -> None:
    store.execute(
        "UPDATE runs SET score = ?, passed = ?, val_bpb = ? WHERE id = ?",
        (to_column(dict(score)), bool(score.get("passed", True)), score.get("val_bpb"), run_id),
    )


def _store_points(store: Store, attempt: Attempt, points: Sequence[Point]) -> None:
    names = {name for point in points for name in point.values}
    store.execute_many("INSERT OR IGNORE INTO metric_names (name) VALUES (?)", [(name,) for name in sorted(names)])
    ids = {row["name"]: row["id"] for row in store.rows("SELECT id, name FROM metric_names")}
    store.execute_many(
        "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)",
        [(attempt.id, ids[name], point.step, value) for point in points for name, value in point.values.items()],
    )
    last = points[-1]
    latest = {name: value for point in points for name, value in point.values.items() if value is not None}
    store.execute(
        """
        UPDATE runs SET step = ?, tokens = ?, seconds = ?, train_loss = coalesce(?, train_loss),
                        val_bpb = coalesce(?, val_bpb)
        WHERE id = ?
        """,
        (last.step, last.tokens, last.seconds, latest.get("train_loss"), latest.get("val_bpb"), attempt.run_id),
    )
