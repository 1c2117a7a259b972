"""What attempts hold on disk, and whose trained weights are still wanted.

Weights are marked as dropped in the transaction that finds them unwanted, deleted after it, and the directory counts as
unmeasured until then: a kill in between leaves a file too many for a moment (gpu_runner/disk.py comes back to what is
unmeasured), never a row that promises a file that is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db.records import Attempt
from db.store import Store

SPARE_BYTES = 32 * 2**20
"""Left free for the database, metrics and logs while a run trains: its largest WAL is 4 MB, its curve a few."""

WEIGHTS = "checkpoint.pt"
"""In a run directory, the trained weights."""

_WANTED = """
SELECT attempts.id AS attempt_id, attempts.run_id, attempts.directory, attempts.weights_bytes AS bytes, CASE
    WHEN trained.status != 'completed' THEN NULL
    WHEN EXISTS (
        SELECT 1 FROM runs AS reader WHERE reader.needs_run_id = trained.id AND reader.kind IN ('post', 'ablate')
          AND reader.status IN ('queued', 'running')) THEN 'queued'
    WHEN EXISTS (SELECT 1 FROM uses WHERE uses.trained_id = trained.id AND uses.status IN ('queued', 'running'))
        THEN 'open'
    WHEN EXISTS (
        SELECT 1 FROM uses JOIN current_verdicts AS said ON said.experiment_id = uses.experiment_id
        WHERE uses.trained_id = trained.id AND uses.arm = 'treatment' AND uses.whole AND said.final = 1
          AND said.verdict IN ('improved', 'improved but not causal')) THEN 'improved'
    WHEN EXISTS (SELECT 1 FROM uses WHERE uses.trained_id = trained.id AND uses.arm = 'baseline' AND uses.whole)
        THEN 'baseline'
    END AS wanted_for
FROM attempts JOIN runs AS trained ON trained.id = attempts.run_id
WHERE attempts.weights_bytes > 0 AND attempts.status != 'live'
"""

_USES = """
WITH uses AS (
    SELECT runs.id AS trained_id, experiment_runs.arm, experiments.id AS experiment_id, experiments.status,
           runs.purpose = 'confirm' OR coalesce(experiments.screen_share, 1.0) = 1.0 AS whole
    FROM runs JOIN experiment_runs ON experiment_runs.run_id = runs.id
    JOIN experiments ON experiments.id = experiment_runs.experiment_id
    UNION ALL
    SELECT post.needs_run_id, experiment_runs.arm, experiments.id, experiments.status,
           post.purpose = 'confirm' OR coalesce(experiments.screen_share, 1.0) = 1.0
    FROM runs AS post JOIN experiment_runs ON experiment_runs.run_id = post.id
    JOIN experiments ON experiments.id = experiment_runs.experiment_id
    WHERE post.kind = 'post' AND post.needs_run_id IS NOT NULL)
"""
"""Which experiments rest on a trained model, and on which side: by its own score, or by that of a post run of it.
`whole`: it was trained on all of the budget, and not to be screened on a part of it."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The trained weights in one attempt's directory. `wanted_for`: queued (a run that waits or runs reads them), open
    (an experiment that is not over), improved, baseline; None: nothing."""

    attempt_id: int
    run_id: int
    directory: str
    bytes: int
    wanted_for: str | None


def list_weights(store: Store) -> list[Weights]:
    """All trained weights that are on disk, the oldest first."""
    return [Weights(**row) for row in store.rows(f"{_USES} {_WANTED} ORDER BY attempts.id")]


def drop_weights(store: Store, attempt_ids: Collection[int], *, also: Collection[str] = ()) -> list[Weights]:
    """Marks weights as dropped, those that are wanted left out; returns those whose files are now to be deleted.

    Args:
        also: what they may be wanted for and go nevertheless: 'improved', 'baseline'.
    """
    with store.transaction():
        dropped = [
            item
            for item in list_weights(store)
            if item.attempt_id in attempt_ids and (item.wanted_for is None or item.wanted_for in also)
        ]
        store.execute_many(
            "UPDATE attempts SET bytes = NULL, weights_bytes = 0 WHERE id = ?", [(item.attempt_id,) for item in dropped]
        )
        return dropped


def delete_weights(store: Store, runs_folder: Path, dropped: Iterable[Weights]) -> None:
    """Deletes the files of weights that are marked as dropped."""
    for item in dropped:
        delete_in(runs_folder / item.directory, WEIGHTS)
        note_bytes(store, item.attempt_id, runs_folder / item.directory)


def delete_in(directory: Path, pattern: str) -> None:
    """Deletes the files of such names in a run directory."""
    for path in directory.glob(pattern):
        with suppress(OSError):  # on a read-only disk it stays
            path.unlink()


def note_bytes(store: Store, attempt_id: int, directory: Path) -> None:
    """Notes what an ended attempt's directory holds, and how much of it is trained weights."""
    sizes = measure(directory)
    store.execute(
        "UPDATE attempts SET bytes = ?, weights_bytes = ? WHERE id = ?",
        (sum(sizes.values()), sizes.get(WEIGHTS, 0), attempt_id),
    )


def measure(directory: Path) -> dict[str, int]:
    """Bytes of each file in a run directory, by name; none when it is not there. Links count as themselves."""
    sizes = {}
    with suppress(OSError):
        for path in directory.iterdir():
            with suppress(FileNotFoundError):  # a process that still lives has renamed it
                sizes[path.name] = path.lstat().st_size

    return sizes


def unmeasured_attempts(store: Store, *, limit: int) -> list[Attempt]:
    """Ended attempts of which is not known what they hold: their run goes on from them, or a daemon died meanwhile."""
    rows = store.rows("SELECT * FROM attempts WHERE bytes IS NULL AND status != 'live' ORDER BY id LIMIT ?", (limit,))
    return [Attempt.of(row) for row in rows]


def attempts_of(store: Store, run_id: int) -> list[Attempt]:
    """The attempts of a run, the oldest first."""
    return [Attempt.of(row) for row in store.rows("SELECT * FROM attempts WHERE run_id = ? ORDER BY id", (run_id,))]


def attempt_in(store: Store, directory: str) -> Attempt | None:
    """The attempt whose run directory has that name."""
    run_id = directory.partition("-")[0]
    row = store.row("SELECT * FROM attempts WHERE run_id = ? AND directory = ?", (run_id, directory))
    return None if row is None else Attempt.of(row)


def has_weights(store: Store, run_id: int) -> bool:
    """Whether the trained weights of a run are there, as far as is known."""
    bytes_left = store.value("SELECT weights_bytes FROM attempts WHERE run_id = ? AND status = 'completed'", (run_id,))
    return bytes_left is None or bytes_left > 0


def has_run(store: Store, values: Mapping[str, Any]) -> bool:
    """Whether a run of that kind, fingerprint and seed is done or will be, so that db.queue.add_run() shares it."""
    return bool(
        store.value(
            """
            SELECT count(*) FROM runs
            WHERE kind = ? AND fingerprint = ? AND seed = ? AND status NOT IN ('failed', 'cancelled')
            """,
            (values["kind"], values["fingerprint"], values["seed"]),
        )
    )


def held_bytes(store: Store) -> int:
    """What all ended attempts hold on disk."""
    return int(store.value("SELECT total(bytes) FROM attempts"))


def forget_weights(store: Store, run_id: int) -> None:
    """Notes that a run's weights are not where they should be."""
    store.execute(
        "UPDATE attempts SET bytes = max(0, bytes - weights_bytes), weights_bytes = 0 WHERE run_id = ?", (run_id,)
    )


def free_identity(store: Store, values: Mapping[str, Any]) -> bool:
    """Lets a training run be done again whose weights are wanted and gone; whether there was one.

    The completed run keeps its result and its place in earlier experiments, and gives up its fingerprint: the next
    db.queue.add_run() with these values makes a new run.
    """
    with store.transaction():
        row = store.row(
            "SELECT * FROM runs WHERE kind = ? AND fingerprint = ? AND seed = ? AND status = 'completed'",
            (values["kind"], values["fingerprint"], values["seed"]),
        )
        if row is None or has_weights(store, row["id"]):
            return False

        store.execute("UPDATE runs SET fingerprint = fingerprint || '~' || id WHERE id = ?", (row["id"],))
        return True


def as_size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
