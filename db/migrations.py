"""The schema, as a list of steps that is only ever appended to. Each runs in a transaction with its own record.

The text of a longer step is a module of db/schema/.
"""

from __future__ import annotations

from sqlite_utils import Database, Migrations

from db.failpoints import failpoint
from db.schema import champions, hypotheses, lab, queue_order, rungs, tallies

MIGRATIONS = Migrations("blueberry")


def _run(db: Database, script: str) -> None:
    for statement in script.split(";\n\n"):
        if statement.strip():
            db.conn.execute(statement)
            failpoint("migrate.statement")


@MIGRATIONS()
def m001_lab(db: Database) -> None:
    """Everything that the lab remembers."""
    _run(db, lab.TABLES)
    db["experiments"].enable_fts(["title", "hypothesis", "method", "treatment"], create_triggers=True)  # type: ignore[union-attr]  # a table, no view
    _run(db, lab.VIEWS)


@MIGRATIONS()
def m002_runner_mode(db: Database) -> None:
    """Whether a runner may claim: open, paused (claims nothing), draining (and ends when nothing trains any more)."""
    _run(
        db,
        "ALTER TABLE runners ADD COLUMN mode TEXT NOT NULL DEFAULT 'open' "
        "CHECK (mode IN ('open', 'paused', 'draining'))",
    )


@MIGRATIONS()
def m003_disk(db: Database) -> None:
    """What each attempt holds on disk. NULL: not measured yet; weights_bytes 0: it has no weights, or none any more."""
    _run(db, _DISK)


@MIGRATIONS()
def m004_cards(db: Database) -> None:
    """Energy, disturbances, and the micro-batches that were too large for a card."""
    _run(db, _CARDS)


@MIGRATIONS()
def m005_queue_order(db: Database) -> None:
    """Which queued run is next, as columns and one index."""
    _run(db, queue_order.COLUMNS)


@MIGRATIONS()
def m006_tallies(db: Database) -> None:
    """Counts, marks and indices, so that a large lab answers as quickly as a small one."""
    _run(db, tallies.TALLIES)
    _run(db, tallies.VERDICTS)
    _run(db, tallies.INDICES)


@MIGRATIONS()
def m007_hypotheses(db: Database) -> None:
    """Screening and confirmation told apart; what is registered, and what every verdict rests on."""
    _run(db, hypotheses.HYPOTHESES)


@MIGRATIONS()
def m008_equal_flops(db: Database) -> None:
    """Whether the treatment gets as many tokens as cost the baseline's FLOPs, instead of as many tokens."""
    _run(db, "ALTER TABLE experiments ADD COLUMN equal_flops INTEGER NOT NULL DEFAULT 0")


@MIGRATIONS()
def m009_champions(db: Database) -> None:
    """The lineage of confirmed gains, and the questions whether they add up."""
    _run(db, champions.CHAMPIONS)


@MIGRATIONS()
def m010_pruning(db: Database) -> None:
    """Which baseline's curve a pruned run could not catch up with; NULL where its model diverged."""
    _run(db, "ALTER TABLE runs ADD COLUMN beaten_by INTEGER REFERENCES runs (id)")


@MIGRATIONS()
def m011_seconds(db: Database) -> None:
    """How long a run of either side trained, beside what a verdict says of it; NULL where it is not known."""
    _run(
        db,
        "ALTER TABLE verdicts ADD COLUMN baseline_seconds REAL;\n\n"
        "ALTER TABLE verdicts ADD COLUMN treatment_seconds REAL",
    )


@MIGRATIONS()
def m012_processes(db: Database) -> None:
    """How many processes train a run together, and on how many cards; every hour of a run counts once for each card."""
    _run(db, _PROCESSES)


@MIGRATIONS()
def m013_rungs(db: Database) -> None:
    """Screening on a part of the budget: of each experiment, and of what each verdict rests on."""
    _run(db, rungs.RUNGS)


@MIGRATIONS()
def m014_text_sets(db: Database) -> None:
    """Which text an experiment is judged by, where that is a named set of the user's own; NULL otherwise."""
    _run(db, "ALTER TABLE experiments ADD COLUMN metric_text TEXT")


_DISK = """
ALTER TABLE attempts ADD COLUMN bytes INTEGER;

ALTER TABLE attempts ADD COLUMN weights_bytes INTEGER;

CREATE INDEX attempts_weights ON attempts (id) WHERE weights_bytes > 0;

CREATE INDEX attempts_unmeasured ON attempts (id) WHERE bytes IS NULL AND status != 'live';

CREATE INDEX IF NOT EXISTS runs_needs ON runs (needs_run_id) WHERE needs_run_id IS NOT NULL;

"""

_PROCESSES = """
ALTER TABLE runners ADD COLUMN cards INTEGER NOT NULL DEFAULT 1;

ALTER TABLE runners ADD COLUMN processes INTEGER NOT NULL DEFAULT 1;

"""

_CARDS = """
ALTER TABLE gpu_samples ADD COLUMN uptime REAL;

ALTER TABLE gpu_samples ADD COLUMN energy_joules REAL;

ALTER TABLE gpu_samples ADD COLUMN slowdowns TEXT;

ALTER TABLE gpu_samples ADD COLUMN others INTEGER;

ALTER TABLE attempts ADD COLUMN joules REAL;

ALTER TABLE attempts ADD COLUMN card_fault TEXT;

ALTER TABLE attempts ADD COLUMN micro_batch_size INTEGER;

ALTER TABLE runs ADD COLUMN disturbance TEXT;

ALTER TABLE verdicts ADD COLUMN cost_kwh REAL;

CREATE INDEX attempts_ended ON attempts (ended_at);

CREATE TABLE energy_days (
    day TEXT NOT NULL,
    runner_id INTEGER NOT NULL REFERENCES runners (id),
    joules REAL NOT NULL,
    PRIMARY KEY (day, runner_id)
) WITHOUT ROWID;

CREATE TABLE micro_batches (
    hardware_class TEXT NOT NULL,
    model TEXT NOT NULL,
    fits INTEGER,
    fails INTEGER,
    updated_at TEXT NOT NULL,
    PRIMARY KEY (hardware_class, model)
) WITHOUT ROWID;

"""
