"""status: the whole lab, or one experiment, run, task or campaign; it can wait for something to change."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Annotated, Any

from pydantic import Field

from db.errors import RefusedError
from db.events import events_after, latest_event_id
from db.experiments import get_experiment
from db.lab import Lab
from db.queries import runs_of_experiment
from db.queue import get_run
from db.records import ENDED_EXPERIMENT, ENDED_RUN, Event
from db.tasks import get_cycle, get_task
from server.parts import (
    CycleView,
    ExperimentView,
    OverviewView,
    RunView,
    TaskView,
    cycle_view,
    experiment_view,
    overview_view,
    run_view,
    task_view,
)
from server.views import EventLine, View, event_line

POLL_SECONDS = 0.25
_EVENTS = 12
_PAGE = 200
"""Lines of the journal read at a time."""


class Status(View):
    """Where things stand."""

    lab: str
    event_id: int
    """newest line of the journal; pass it as since_event to wait for what comes after"""
    events: list[EventLine]
    """what happened since since_event, or most recently, oldest first"""
    events_truncated: bool
    overview: OverviewView | None = None
    experiment: ExperimentView | None = None
    run: RunView | None = None
    task: TaskView | None = None
    cycle: CycleView | None = None
    next: str
    """what to call next"""


def status(
    lab: Lab,
    *,
    experiment_id: Annotated[int | None, Field(ge=1, description="look at one experiment")] = None,
    run_id: Annotated[int | None, Field(ge=1, description="look at one run, with its curves and log")] = None,
    task_id: Annotated[int | None, Field(ge=1, description="look at a call that an agent is still answering")] = None,
    cycle_id: Annotated[int | None, Field(ge=1, description="look at a campaign of automatic research")] = None,
    wait_seconds: Annotated[
        float, Field(ge=0, le=20, description="wait this long for a change of what is asked about, then answer anyway")
    ] = 0,
    since_event: Annotated[
        int | None, Field(ge=0, description="event_id of an earlier answer: wait for, and list, what came after it")
    ] = None,
    limit: Annotated[int, Field(ge=1, le=40, description="most experiments, or runs, listed")] = 15,
) -> Status:
    """Shows the lab: queue, running experiments with progress and time left, verdicts, cards, recent events.

    Use it after `run` or `enqueue` to follow the research, and to read one experiment with its review, runs and
    verdict (experiment_id), one run's curves and log (run_id), the answer of a call that was still working (task_id),
    or a campaign (cycle_id); at most one of the four. With wait_seconds=20 it returns as soon as a run starts or ends,
    a verdict falls or an experiment changes; call it again with since_event to go on waiting. It changes nothing.
    """
    chosen = [key for key in (experiment_id, run_id, task_id, cycle_id) if key is not None]
    if len(chosen) > 1:
        raise RefusedError("ask for one of experiment_id, run_id, task_id and cycle_id at a time")

    look = _Look(lab, experiment_id=experiment_id, run_id=run_id, task_id=task_id, cycle_id=cycle_id)
    since = latest_event_id(lab.store) if since_event is None else since_event
    look.wait(since, wait_seconds)
    newest = latest_event_id(lab.store)
    events, truncated = look.events(since_event, newest)
    parts = look.parts(limit)
    return Status(
        lab=str(lab.folder),
        event_id=newest,
        events=[event_line(event) for event in events],
        events_truncated=truncated,
        next=_next(parts),
        **parts,
    )


class _Look:
    """What one call asks about."""

    def __init__(
        self, lab: Lab, *, experiment_id: int | None, run_id: int | None, task_id: int | None, cycle_id: int | None
    ) -> None:
        self.lab = lab
        self.experiment_id = experiment_id
        self.run_id = run_id
        self.task_id = task_id
        self.cycle_id = cycle_id

    def wait(self, since: int, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Returns when something has changed after event `since`, when nothing will, or when the time is over."""
        deadline = time.monotonic() + seconds
        before = self._state()
        seen = since
        while time.monotonic() < deadline and not self._is_over():
            newest = latest_event_id(self.lab.store)
            if newest > seen:
                if self._concerned(events_after(self.lab.store, seen, limit=_PAGE)):
                    return

                seen = min(newest, seen + _PAGE)

            if self._state() != before:
                return

            sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))

    def events(self, since: int | None, newest: int) -> tuple[list[Event], bool]:
        """The journal's last lines about it, after `since` where that is given; and whether some were left out."""
        start = max(since or 0, newest - _PAGE)
        page = [event for event in events_after(self.lab.store, start, limit=_PAGE) if event.id <= newest]
        found = self._concerned(page)
        left_out = since is not None and (start > since or len(found) > _EVENTS)
        return found[-_EVENTS:], left_out

    def parts(self, limit: int) -> dict[str, Any]:
        """The one part of the answer that was asked for."""
        if self.experiment_id is not None:
            return {"experiment": experiment_view(self.lab, self.experiment_id, limit)}

        if self.run_id is not None:
            return {"run": run_view(self.lab, self.run_id)}

        if self.task_id is not None:
            return {"task": task_view(get_task(self.lab.store, self.task_id))}

        if self.cycle_id is not None:
            return {"cycle": cycle_view(self.lab, get_cycle(self.lab.store, self.cycle_id), limit)}

        return {"overview": overview_view(self.lab, limit)}

    def _concerned(self, events: list[Event]) -> list[Event]:
        if self.experiment_id is not None:
            runs = {run.run_id for run in runs_of_experiment(self.lab.store, self.experiment_id)}
            return [event for event in events if event.experiment_id == self.experiment_id or event.run_id in runs]

        if self.run_id is not None:
            return [event for event in events if event.run_id == self.run_id]

        return [] if self.task_id is not None else events

    def _state(self) -> Hashable:
        # Tasks and campaigns move without a line in the journal.
        if self.task_id is not None:
            return get_task(self.lab.store, self.task_id).status

        if self.cycle_id is not None:
            cycle = get_cycle(self.lab.store, self.cycle_id)
            return cycle.status, cycle.round, cycle.step

        return None

    def _is_over(self) -> bool:
        store = self.lab.store
        if self.experiment_id is not None:
            return get_experiment(store, self.experiment_id).status in ENDED_EXPERIMENT

        if self.run_id is not None:
            return get_run(store, self.run_id).status in ENDED_RUN

        if self.task_id is not None:
            return get_task(store, self.task_id).status in ("done", "failed")

        return self.cycle_id is not None and get_cycle(store, self.cycle_id).status != "running"


def _next(parts: dict[str, Any]) -> str:
    if (experiment := parts.get("experiment")) is not None:
        return _AFTER[experiment.status].format(id=experiment.id)

    if (run := parts.get("run")) is not None:
        return "wait with status(run_id, wait_seconds=20)" if run.run.status not in ENDED_RUN else "this run is over"

    if (task := parts.get("task")) is not None:
        if task.status == "done":
            return "look at its experiments with status(experiment_id)"

        return "wait with status(task_id, wait_seconds=20)" if task.status != "failed" else "mend the error, call again"

    if (cycle := parts.get("cycle")) is not None:
        return "wait with status(cycle_id, wait_seconds=20)" if cycle.status == "running" else "the campaign is over"

    return _next_in_lab(parts["overview"])


_AFTER = {
    "suggested": "review(experiment_id={id})",
    "approved": "enqueue(experiment_ids=[{id}])",
    "needs_work": "improve(experiment_id={id})",
    "rejected": "suggest a better one",
    "superseded": "look at its successor, whose parent_id is {id}",
    "queued": "run() starts the runner; then status(experiment_id={id}, wait_seconds=20)",
    "running": "status(experiment_id={id}, wait_seconds=20)",
    "concluded": "read the verdict; enqueue(experiment_ids=[{id}], confirm=True) has it confirmed on new pairs, or "
    "goes on with more of them; or suggest what follows",
    "failed": "read reason and the failed run with status(run_id); then enqueue it again or suggest another",
    "cancelled": "enqueue(experiment_ids=[{id}]) takes it up again",
}


def _next_in_lab(seen: OverviewView) -> str:
    counts = seen.experiments
    if seen.queued and not any(runner.alive for runner in seen.runners):
        return f"{seen.queued} runs wait and no runner is alive: run() starts it"

    alive = [runner for runner in seen.runners if runner.alive]
    if seen.queued and not seen.running and alive and all(runner.state.startswith("paused") for runner in alive):
        return f"{seen.queued} runs wait and the runner is paused: run(action='resume')"

    if seen.queued and not seen.running and not seen.up_next:
        return (
            f"none of the {seen.queued} waiting runs is for the runner that is alive: they were queued for other "
            "hardware or another number of processes; set [runner] in blueberry.toml back and run(action='restart'), "
            "or cancel them"
        )

    if seen.running or seen.queued:
        return "status(wait_seconds=20, since_event=event_id) waits for what happens next"

    for name, verb in (("needs_work", "improve()"), ("suggested", "review()")):
        if counts.get(name):
            return f"{counts[name]} experiments are {name}: {verb}"

    if counts.get("approved"):
        return f"{counts['approved']} experiments are approved: enqueue(experiment_ids=[...])"

    found = "report() writes down what was found; " if seen.verdicts else ""
    return f"{found}suggest() brings new ideas"
