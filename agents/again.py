"""A run and its second run, side by side: the experiment's metric, and its guard where it has one."""

from __future__ import annotations

from dataclasses import dataclass

from agents.reproduction import Rerun
from db.comparisons import score_of
from db.curves import newest_curve
from db.lab import Lab
from db.queue import get_run
from db.records import Experiment, Run, RunStatus, Stage


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One number of both runs; None where a run was not scored."""

    before: float | None
    after: float | None

    @property
    def same(self) -> bool:
        """To the last bit."""
        return self.before == self.after

    def within(self, reach: float) -> bool:
        """Whether they differ by no more."""
        if self.before is None or self.after is None:
            return self.same

        return abs(self.after - self.before) <= reach


@dataclass(frozen=True, kw_only=True)
class Again:
    """One run and its second run. A run that was stopped as hopeless is compared by its last point, where the second,
    which nobody stops, had the same step."""

    seed: int
    stage: Stage
    arm: str
    metric: Measured
    guard: Measured | None
    status_before: RunStatus
    status_after: RunStatus
    stopped: bool

    @property
    def ended_alike(self) -> bool:
        """Whether both have a result, or neither finished."""
        return self.status_after == ("completed" if self.stopped else self.status_before)

    @property
    def same(self) -> bool:
        """Whether it came out the same to the last bit."""
        return self.ended_alike and self.metric.same and (self.guard is None or self.guard.same)


def set_beside(lab: Lab, other: Lab, experiment: Experiment, item: Rerun) -> Again:
    """What became of a run in both labs."""
    first, second = item.run, get_run(other.store, item.again)
    metric, guard = _measured(first, second, experiment.metric), None
    if first.beaten_by is not None:
        before, after = newest_curve(lab.store, first.id), newest_curve(other.store, second.id)
        at = len(before) - 1
        metric = Measured(before=before[at] if before else None, after=after[at] if 0 <= at < len(after) else None)
    elif experiment.guard_metric is not None:
        guard = _measured(first, second, experiment.guard_metric)

    return Again(
        seed=first.seed,
        stage=first.purpose,
        arm=item.arm,
        metric=metric,
        guard=guard,
        status_before=first.status,
        status_after=second.status,
        stopped=first.beaten_by is not None,
    )


def _measured(first: Run, second: Run, name: str) -> Measured:
    return Measured(before=score_of(first, name), after=score_of(second, name))
