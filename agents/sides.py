"""What the two sides of a pair have come to: whether they ended, what they scored, why one was lost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from db.comparisons import Pair
from db.records import ENDED_RUN, Run


def has_ended(pair: Pair) -> bool:
    """Whether neither side is still to come."""
    return all(run is not None and run.status in ENDED_RUN for run in (pair.baseline, pair.treatment))


def is_scored(pair: Pair) -> bool:
    """Whether both sides have a score."""
    return all(run is not None and run.status == "completed" for run in (pair.baseline, pair.treatment))


def is_lost(pair: Pair) -> bool:
    """Whether the treatment has no score, and that is a result: it diverged, cannot catch up, or took too long."""
    run = pair.treatment
    return run is not None and (run.status == "pruned" or run.ran_out)


def value_of(run: Run | None, metric: str) -> float:
    """What a completed run scored.

    Raises:
        KeyError: it has no score by that metric, which agents.gates asks for first.
    """
    return float(((run.score if run else None) or {})[metric])


def mean_of(runs: Sequence[Run | None], metric: str) -> float | None:
    """The mean of what the runs scored; None of none."""
    return fmean(value_of(run, metric) for run in runs) if runs else None


def why_lost(pair: Pair) -> str:
    """Why the treatment has no score."""
    run = pair.treatment
    if run is None or run.error is None:
        return "training ended early"

    return run.error if run.beaten_by is not None else f"training ended early: {run.error}"
