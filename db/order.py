"""The line in which runs wait for a runner: who is next, and why.

Of the runs of a hardware class that could start now, the next is the one of the highest priority; among those, the one
of the lowest *turn*. A run takes a numbered ticket when it joins the queue, and is set back by some places:

    turn = ticket + 32 log2(expected seconds / expected improvements), the second term kept within 64 to 512

A probe is not set back. The improvements expected are the sum, over the open experiments that wait for the run, of the
probability that their latest review predicts; an experiment's second run in line counts for half, its third for a
third. So probes come first, which take seconds and show what need not be run at all; a baseline that many wait for
before what one waits for; the promising and the short before the doubtful and the long; many experiments' first pairs
before one experiment's twentieth.

Nobody starves. Tickets only grow and nobody is set back by more than 512 places, so at most 512 runs of equal priority
that joined later can start before a run that is ready; and since a doubling buys 32 places, the n-th of them promises
at least 2^(n / 32) times as much a second: all those that are merely shorter hold a run up for less than 46 times its
own seconds together. A run that lost its runner comes back with its old ticket.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from db.records import RunKind
from db.store import Store

PLACES_PER_DOUBLING = 32
LEAST_SET_BACK, MOST_SET_BACK = 64, 512

UNREVIEWED = 0.25
"""Probability of success where no review predicts one: about what priors of the catalog are."""

USUAL_SECONDS: dict[RunKind, float] = {"probe": 5.0, "train": 600.0, "post": 60.0, "ablate": 60.0}
"""Expected of a run about which nothing is known, before one of its kind was done on its hardware class."""

_MOST_WAITING = 64
"""Open experiments that are counted; one more would move a run by less than a place."""

_LINE = """
FROM runs WHERE status = 'queued' AND ready = 1 AND hardware_class = :class
ORDER BY priority DESC, turn, id
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run stands that could start now. `set_back` counts places behind its ticket."""

    position: int
    run_id: int
    kind: RunKind
    seed: int
    priority: int
    set_back: int
    gains: float | None
    """improvements expected; None, as are the seconds, where an older Blueberry queued the run"""
    seconds: float | None

    @property
    def why(self) -> str:
        """What decided the place, in words."""
        words = [f"priority {self.priority}"] if self.priority else []
        if self.gains is None or self.seconds is None:
            words.append("first come, first served")
        else:
            words.append(f"{self.gains:.2g} improvements expected for about {self.seconds:.3g} s")

        return ", ".join(words)


def next_run(store: Store, hardware_class: str) -> int | None:
    """The run that a claim takes."""
    key = store.value(f"SELECT id {_LINE} LIMIT 1", {"class": hardware_class})
    return None if key is None else int(key)


def head_of_line(store: Store, hardware_class: str, *, limit: int = 5) -> list[Place]:
    """The next runs, in the order in which they will be claimed if nothing changes."""
    rows = store.rows(f"SELECT * {_LINE} LIMIT :limit", {"class": hardware_class, "limit": limit})
    return [_place(row, position) for position, row in enumerate(rows, 1)]


def place_of(store: Store, run_id: int) -> Place | None:
    """Where a run stands; None when it does not wait, or waits for another run."""
    row = store.row("SELECT * FROM runs WHERE id = ? AND status = 'queued' AND ready = 1", (run_id,))
    if row is None:
        return None

    before = store.value(
        """
        SELECT (SELECT count(*) FROM runs WHERE status = 'queued' AND ready = 1 AND hardware_class = :hardware_class
                AND priority > :priority)
             + (SELECT count(*) FROM runs WHERE status = 'queued' AND ready = 1 AND hardware_class = :hardware_class
                AND priority = :priority AND (turn, id) < (:turn, :id))
        """,
        row,
    )
    return _place(row, 1 + int(before))


def join_line(store: Store, run_id: int) -> None:
    """Gives a run that was just queued its ticket, and says whether it could start."""
    store.execute(
        """
        UPDATE runs SET ticket = 1 + (SELECT max(ticket) FROM runs), ready = needs_run_id IS NULL OR EXISTS (
            SELECT 1 FROM runs AS need WHERE need.id = runs.needs_run_id AND need.status = 'completed' AND need.passed)
        WHERE id = ?
        """,
        (run_id,),
    )


def free_waiting(store: Store, run_id: int) -> None:
    """Lets the runs start that need this one, if it has completed and passed."""
    store.execute(
        """
        UPDATE runs SET ready = (SELECT status = 'completed' AND passed IS 1 FROM runs AS need WHERE need.id = :id)
        WHERE needs_run_id = :id
        """,
        {"id": run_id},
    )


def rank_run(store: Store, run_id: int) -> None:
    """Sets a queued run's place anew, after something changed that it rests on."""
    run = store.row(
        "SELECT kind, hardware_class, ticket, expected_seconds FROM runs WHERE id = ? AND status = 'queued'", (run_id,)
    )
    if run is None:
        return

    gains = _expected_gains(store, run_id, run["ticket"])
    seconds = run["expected_seconds"] or seconds_of_kind(store, run["kind"], run["hardware_class"])
    store.execute(
        "UPDATE runs SET gains = ?, expected_seconds = ?, turn = ticket + ? WHERE id = ?",
        (gains, seconds, set_back(run["kind"], gains, seconds), run_id),
    )


def rank_runs_of(store: Store, experiment_id: int) -> None:
    """Sets the places of an experiment's queued runs anew, shared ones included."""
    for row in store.rows(
        """
        SELECT run_id FROM experiment_runs JOIN runs ON runs.id = run_id
        WHERE experiment_id = ? AND runs.status = 'queued'
        """,
        (experiment_id,),
    ):
        rank_run(store, row["run_id"])


def set_back(kind: RunKind, gains: float, seconds: float) -> int:
    """Places behind its ticket for a run that takes `seconds` and promises `gains` improvements."""
    if kind == "probe":
        return 0

    places = PLACES_PER_DOUBLING * math.log2(max(seconds, 1e-3) / max(gains, 1e-9))
    return max(LEAST_SET_BACK, min(MOST_SET_BACK, round(places)))


def seconds_of_kind(store: Store, kind: RunKind, hardware_class: str) -> float:
    """What a run of the kind took on the hardware class, mean of the last 20; what is usual before the first."""
    value = store.value(
        """
        SELECT avg((julianday(attempts.ended_at) - julianday(attempts.started_at)) * 86400.0) FROM (
            SELECT id FROM runs WHERE status = 'completed' AND hardware_class = ? AND kind = ?
            ORDER BY id DESC LIMIT 20) AS latest
        JOIN attempts ON attempts.run_id = latest.id AND attempts.status = 'completed'
        """,
        (hardware_class, kind),
    )
    return USUAL_SECONDS[kind] if value is None else float(value)


def _expected_gains(store: Store, run_id: int, ticket: int) -> float:
    value = store.value(
        """
        SELECT sum(probability) FROM (
            SELECT coalesce((SELECT success_probability FROM reviews WHERE reviews.experiment_id = experiments.id
                             ORDER BY id DESC LIMIT 1), :unreviewed)
                   / (1.0 + (SELECT count(*) FROM experiment_runs AS also JOIN runs ON runs.id = also.run_id
                             WHERE also.experiment_id = experiments.id AND also.arm = mine.arm
                               AND runs.status = 'queued' AND runs.ticket < :ticket)) AS probability
            FROM experiment_runs AS mine JOIN experiments ON experiments.id = mine.experiment_id
            WHERE mine.run_id = :run AND experiments.status IN ('queued', 'running')
            ORDER BY mine.experiment_id DESC LIMIT :most)
        """,
        {"run": run_id, "ticket": ticket, "unreviewed": UNREVIEWED, "most": _MOST_WAITING},
    )
    # Nobody's verdict waits for what is asked for after it, such as taking a trained model apart.
    return UNREVIEWED if value is None else float(value)


def _place(row: Mapping[str, Any], position: int) -> Place:
    return Place(
        position=position,
        run_id=row["id"],
        kind=row["kind"],
        seed=row["seed"],
        priority=row["priority"],
        set_back=row["turn"] - row["ticket"],
        gains=row["gains"],
        seconds=row["expected_seconds"],
    )
