"""The automatic cycle: suggest, review, improve, enqueue, wait for verdicts, learn, and again.

A campaign is a row; `advance` takes it one step. Each step looks at the experiments of the campaign rather than at a
memory of its own, so a step that was cut off is simply taken again.
"""

from __future__ import annotations

from agents.analyst import learn
from agents.hands import register, start_runner
from agents.improver import improve
from agents.planner import enqueue
from agents.reviewer import review
from agents.suggester import suggest
from db.errors import RefusedError
from db.events import add_event
from db.experiments import list_experiments, move_experiment
from db.lab import Lab
from db.records import ENDED_EXPERIMENT, Cycle, Experiment, ExperimentStatus
from db.tasks import add_cycle, move_cycle, running_cycles

_MOST = 10_000


def start_cycle(
    lab: Lab,
    *,
    domain: str | None = None,
    focus_area: str | None = None,
    count: int | None = None,
    max_cycles: int = 1,
    start_runner: bool = False,
) -> Cycle:
    """Begins a campaign; the mind process carries it on.

    Args:
        count: suggestions a round; max_experiments_per_suggestion of the configuration by default, and at most.
        max_cycles: rounds.
        start_runner: whether the campaign starts the daemon when it has queued something.

    Raises:
        RefusedError: count or max_cycles out of bounds.
    """
    most = lab.settings.max_experiments_per_suggestion
    wanted = most if count is None else count
    if not 1 <= wanted <= most:
        raise RefusedError(f"count={wanted} is outside 1 to {most} (max_experiments_per_suggestion)")

    if not 1 <= max_cycles <= 1000:
        raise RefusedError(f"max_cycles={max_cycles} is outside 1 to 1000")

    with lab.store.transaction():
        cycle = add_cycle(
            lab.store,
            {
                "domain": domain,
                "focus_area": focus_area,
                "count": wanted,
                "max_cycles": max_cycles,
                "start_runner": start_runner,
            },
        )
        add_event(lab.store, "cycle", f"campaign {cycle.id} began: {wanted} ideas a round, {_rounds(max_cycles)}")
        return cycle


def due_cycles(lab: Lab) -> list[Cycle]:
    """Campaigns that can go on now: all but those that wait for runs."""
    return [
        cycle
        for cycle in running_cycles(lab.store)
        if cycle.step != "wait" or all(item.status in ENDED_EXPERIMENT for item in _mine(lab, cycle))
    ]


def advance(lab: Lab, cycle: Cycle) -> None:
    """Takes one step.

    Raises:
        LabError: a step that cannot be taken, such as a model call that failed; the campaign stays where it is.
    """
    steps = {
        "suggest": _suggest,
        "review": _review,
        "improve": _improve,
        "enqueue": _enqueue,
        "wait": _wait,
        "learn": _learn,
    }
    steps[cycle.step](lab, cycle)


def _suggest(lab: Lab, cycle: Cycle) -> None:
    # Suggestions of a step that was cut off are there already, not yet reviewed.
    if not _mine(lab, cycle, "suggested"):
        made = suggest(
            lab, count=cycle.count, domain=cycle.domain, focus_area=cycle.focus_area, cycle_id=cycle.id
        ).experiments
        if not made:
            move_cycle(lab.store, cycle.id, step="end", status="done", error="nothing new could be suggested")
            return

    move_cycle(lab.store, cycle.id, step="review")


def _review(lab: Lab, cycle: Cycle) -> None:
    for experiment in _mine(lab, cycle, "suggested"):
        review(lab, [experiment.id])

    move_cycle(lab.store, cycle.id, step="improve" if _mine(lab, cycle, "needs_work") else "enqueue")


def _improve(lab: Lab, cycle: Cycle) -> None:
    for experiment in _mine(lab, cycle, "needs_work"):
        try:
            improve(lab, experiment.id)
        except RefusedError as error:  # nobody here knows a repair: that is an end, and says so
            move_experiment(lab.store, experiment.id, "rejected", allowed=["needs_work"], reason=str(error))

    move_cycle(lab.store, cycle.id, step="review" if _mine(lab, cycle, "suggested") else "enqueue")


def _enqueue(lab: Lab, cycle: Cycle) -> None:
    approved = _mine(lab, cycle, "approved")
    if approved:
        register(lab)

    for experiment in approved:
        try:
            enqueue(lab, [experiment.id])
        except RefusedError as error:
            move_experiment(lab.store, experiment.id, "failed", allowed=["approved"], reason=str(error))

    if cycle.start_runner and approved:
        start_runner(lab)

    move_cycle(lab.store, cycle.id, step="wait")


def _wait(lab: Lab, cycle: Cycle) -> None:
    move_cycle(lab.store, cycle.id, step="learn")


def _learn(lab: Lab, cycle: Cycle) -> None:
    learn(lab)
    with lab.store.transaction():
        if cycle.round < cycle.max_cycles:
            move_cycle(lab.store, cycle.id, step="suggest", round=cycle.round + 1)
        else:
            move_cycle(lab.store, cycle.id, step="end", status="done")
            add_event(lab.store, "cycle", f"campaign {cycle.id} is done after {_rounds(cycle.round)}")


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count != 1)}"


def _mine(lab: Lab, cycle: Cycle, status: ExperimentStatus | None = None) -> list[Experiment]:
    return list_experiments(lab.store, status=status, cycle_id=cycle.id, oldest_first=True, limit=_MOST)
