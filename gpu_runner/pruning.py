"""Stopping a screening treatment that cannot win: its val_bpb compared with the baseline's of the same seed.

A point counts against a run if it is behind the baseline by more than chance and the rest of training could make up
for: some deviations of single runs over seeds, as the lab has measured them, plus a share of what the baseline itself
still gained from there on. Two such points in a row stop it. Points are compared at equal progress: the k-th of n is
at k / n of the budget, whether that is tokens, seconds, or tokens of equal cost.

The constants are calibrated on real curves, also of treatments that start behind and win (benchmarks/pruning.py). Not
compared: baselines, confirmations, results other than val_bpb, and treatments that change how a run unfolds, because
those are behind by design until their end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from db.curves import attempt_curve, class_curves, completed_curve, rivals
from db.queue import Outcome, get_run
from db.records import Attempt, Run
from db.store import Store

DEVIATIONS = 3.0
"""Of the noise, by which a run may be behind."""

CATCH_UP = 0.5
"""Of what the baseline still gained, that a run may make up for."""

IN_A_ROW = 2
"""Points."""

FIRST = 0.25
"""Part of the budget that every run gets."""

UNFOLDS = (
    "schedule",
    "warmup_fraction",
    "decay_fraction",
    "min_lr_ratio",
    "ema_decay",
    "batch_doublings",
    "length_doublings",
    "progress_evals",
)
"""Fields that change when a curve falls, rather than how far."""

_Z = 1.6449  # of the normal distribution at .95


@dataclass(frozen=True, kw_only=True)
class Behind:
    """A run that cannot win: the point of `points` at which that is known, both values there, and the margin."""

    point: int
    points: int
    value: float
    baseline: float
    margin: float

    def describe(self, run: Run, baseline: Run) -> str:
        """For the run's row."""
        where = f"step {run.step} of {run.steps}" if run.steps else f"{self.point / self.points:.0%} of its budget"
        return (
            f"stopped at {where}: val_bpb {self.value:.3f} is {self.value - self.baseline:.3f} behind run "
            f"{baseline.id}, the baseline of seed {run.seed}, where {self.margin:.3f} could still be made up for"
        )


def find_beaten(store: Store, attempt: Attempt) -> Outcome | None:
    """How a screening treatment that cannot win ends; None while it may go on.

    It is a function of what the database holds, so whoever settles an attempt that somebody else ended finds the same.
    """
    outcome = None
    run = get_run(store, attempt.run_id)
    for baseline in rivals(store, run.id):
        if any(run.config.get(name) != baseline.config.get(name) for name in UNFOLDS):
            return None

        points = completed_curve(store, baseline.id)
        found = behind(attempt_curve(store, attempt.id), points, spread(class_curves(store, baseline), len(points)))
        if found is None:
            return None

        outcome = Outcome(status="pruned", error=found.describe(run, baseline), beaten_by=baseline.id)

    return outcome


def behind(
    curve: Sequence[float | None], baseline: Sequence[float | None], deviations: Sequence[float]
) -> Behind | None:
    """Whether a curve is hopelessly behind at its last points; None where it is not, or where that cannot be known.

    Args:
        curve: val_bpb at the points so far.
        baseline: at all points of a run that is done.
        deviations: of a single run over seeds, at each point of the baseline; infinite where they are not known.
    """
    done, points = len(curve), len(baseline)
    if done >= points or done < max(IN_A_ROW, FIRST * points):
        return None

    margin = 0.0
    for k in range(done - IN_A_ROW, done):
        value, reference, end = curve[k], baseline[k], baseline[-1]
        if value is None or reference is None or end is None:
            return None

        margin = DEVIATIONS * deviations[k] + CATCH_UP * max(0.0, reference - end)
        if value - reference <= margin:
            return None

    value, reference = curve[-1], baseline[done - 1]
    assert value is not None
    assert reference is not None
    return Behind(point=done, points=points, value=value, baseline=reference, margin=margin)


def spread(groups: Sequence[Sequence[Sequence[float]]], points: int) -> list[float]:
    """The deviation over seeds at each point, pooled over groups of runs of equal config: its upper bound at 95 %.

    The bound makes little knowledge a wide margin: of 1 degree of freedom it is infinite, of 2 it is 5 times what was
    seen, of 20 it is 1.4 times. Quantiles of chi-squared by Wilson and Hilferty (1931).
    """
    complete = [[curve for curve in group if len(curve) == points] for group in groups]
    df = sum(len(group) - 1 for group in complete if group)
    shrink = 0.0 if df == 0 else 1.0 - 2.0 / (9.0 * df) - _Z * math.sqrt(2.0 / (9.0 * df))
    if shrink <= 0.01:
        return [math.inf] * points

    found = []
    for k in range(points):
        means = [fmean(curve[k] for curve in group) if group else 0.0 for group in complete]
        squares = math.fsum(
            (curve[k] - mean) ** 2 for group, mean in zip(complete, means, strict=True) for curve in group
        )
        found.append(math.sqrt(squares / (df * shrink**3)))

    return found
