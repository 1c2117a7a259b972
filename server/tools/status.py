"""status: the whole lab, or one experiment, run, task or campaign; it can wait for something to change."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Annotated, Any

from pydantic import Field

from db.errors import RefusedError
from db.events import events_after, latest_event_id
from db.experiments import (
    get_experiment,
    latest_review,
    latest_verdict,
    list_experiments,
    list_insights,
)
from db.lab import Lab
from db.queries import curve, lineage, metric_names, overview, runs_of_experiment
from db.queue import get_run
from db.records import ENDED_EXPERIMENT, ENDED_RUN, Cycle, Event, Task, Value
from db.tasks import get_cycle, get_task, running_cycles
from moe.config import KNOBS
from server.views import (
    EventLine,
    ExperimentLine,
    ReviewView,
    RunLine,
    RunnerLine,
    VerdictView,
    View,
    curve_points,
    cut,
    event_line,
    experiment_line,
    plain_run_line,
    review_view,
    rounded,
    run_line,
    runner_line,
    verdict_view,
)

POLL_SECONDS = 0.25
_EVENTS = 12
_PAGE = 200
"""Lines of the journal read at a time."""

Curve = list[tuple[int, float | None]]


class OverviewView(View):
    """The lab at a glance."""

    experiments: dict[str, int]
    """how many of each status"""
    runs: dict[str, int]
    verdicts: dict[str, int]
    running: list[RunLine]
    queued: int
    """runs that wait"""
    seconds_left: float | None
    """until the queue is done, as far as past runs tell"""
    runners: list[RunnerLine]
    newest: list[ExperimentLine]
    """newest experiments first, at most `limit`"""
    truncated: bool
    """whether there are more experiments than listed"""
    insights: list[str]
    tasks_open: int
    """calls that agents are answering"""
    cycles_running: list[int]
    usd_today: float


class ExperimentView(View):
    """One experiment with all that is known of it."""

    id: int
    title: str
    status: str
    reason: str | None
    hypothesis: str
    method: str
    domain: str
    proposer: str
    source: str | None
    metric: str
    direction: str
    """lower or higher is better"""
    preset: str
    treatment: dict[str, Value]
    baseline: dict[str, Value]
    """the baseline's values of the same knobs"""
    lineage: list[int]
    """the experiments it was improved from, ending with itself"""
    review: ReviewView | None
    verdict: VerdictView | None
    runs: list[RunLine]
    runs_truncated: bool
    curves: dict[str, Curve]
    """val_bpb of each training run as [step, value], by "arm seed run-id" """


class RunView(View):
    """One run with its config, score and curves."""

    run: RunLine
    hardware_class: str
    fingerprint: str
    config: dict[str, Value]
    score: dict[str, Any] | None
    failures: int
    lost: int
    """attempts killed from outside; the run was queued again"""
    curves: dict[str, Curve]
    log_tail: str | None


class TaskView(View):
    """One call to an agent."""

    id: int
    kind: str
    status: str
    """queued, running, done or failed"""
    error: str | None
    experiment_ids: list[int]
    """experiments that its answer made or changed"""


class CycleView(View):
    """One campaign of automatic research."""

    id: int
    status: str
    round: int
    max_cycles: int
    step: str
    error: str | None
    experiments: list[ExperimentLine]


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
    events, truncated = look.events(since_event)
    parts = look.parts(limit)
    return Status(
        lab=str(lab.folder),
        event_id=latest_event_id(lab.store),
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

    def events(self, since: int | None) -> tuple[list[Event], bool]:
        """The journal's lines about it: after `since`, otherwise the last ones; and whether some were left out."""
        start = max(0, latest_event_id(self.lab.store) - _PAGE) if since is None else since
        found = self._concerned(events_after(self.lab.store, start, limit=_PAGE))
        if since is None:
            return found[-_EVENTS:], False

        return found[-_EVENTS:], len(found) > _EVENTS

    def parts(self, limit: int) -> dict[str, Any]:
        """The one part of the answer that was asked for."""
        if self.experiment_id is not None:
            return {"experiment": _experiment(self.lab, self.experiment_id, limit)}

        if self.run_id is not None:
            return {"run": _run(self.lab, self.run_id)}

        if self.task_id is not None:
            return {"task": _task(get_task(self.lab.store, self.task_id))}

        if self.cycle_id is not None:
            return {"cycle": _cycle(self.lab, get_cycle(self.lab.store, self.cycle_id), limit)}

        return {"overview": _overview(self.lab, limit)}

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


def _overview(lab: Lab, limit: int) -> OverviewView:
    seen = overview(lab.store)
    newest = list_experiments(lab.store, limit=limit + 1)
    return OverviewView(
        experiments=seen.experiments,
        runs=seen.runs,
        verdicts=seen.verdicts,
        running=[run_line(run) for run in seen.running[:limit]],
        queued=seen.queued,
        seconds_left=rounded(seen.seconds_left, 0),
        runners=[runner_line(lab, runner) for runner in seen.runners[:8]],
        newest=[experiment_line(lab, experiment) for experiment in newest[:limit]],
        truncated=len(newest) > limit,
        insights=[cut(insight.statement, 240) for insight in list_insights(lab.store, limit=8)],
        tasks_open=seen.tasks_open,
        cycles_running=[cycle.id for cycle in running_cycles(lab.store)][:20],
        usd_today=round(seen.usd_today, 4),
    )


def _experiment(lab: Lab, experiment_id: int, limit: int) -> ExperimentView:
    experiment = get_experiment(lab.store, experiment_id)
    review = latest_review(lab.store, experiment_id)
    verdict = latest_verdict(lab.store, experiment_id)
    runs = runs_of_experiment(lab.store, experiment_id)
    trained = [run for run in runs[:limit] if run.kind == "train" and run.step]
    return ExperimentView(
        id=experiment.id,
        title=experiment.title,
        status=experiment.status,
        reason=experiment.reason,
        hypothesis=cut(experiment.hypothesis, 2000),
        method=cut(experiment.method, 2000),
        domain=experiment.domain,
        proposer=experiment.proposer,
        source=experiment.source,
        metric=experiment.metric,
        direction=experiment.direction,
        preset=experiment.preset,
        treatment=experiment.treatment,
        baseline={name: experiment.baseline[name] for name in experiment.treatment if name in KNOBS},
        lineage=lineage(lab.store, experiment_id),
        review=review_view(experiment, review) if review else None,
        verdict=verdict_view(verdict) if verdict else None,
        runs=[run_line(run) for run in runs[:limit]],
        runs_truncated=len(runs) > limit,
        curves={
            f"{run.arm} {run.seed} run-{run.run_id}": curve_points(curve(lab.store, run.run_id, "val_bpb", points=6))
            for run in trained[:12]
        },
    )


def _run(lab: Lab, run_id: int) -> RunView:
    run = get_run(lab.store, run_id)
    names = [name for name in ("val_bpb", "train_loss") if name in metric_names(lab.store, run_id)]
    return RunView(
        run=plain_run_line(run),
        hardware_class=run.hardware_class,
        fingerprint=run.fingerprint,
        config=run.config,
        score=run.score,
        failures=run.failures,
        lost=run.lost,
        curves={name: curve_points(curve(lab.store, run_id, name, points=25)) for name in names},
        log_tail=run.log_tail[-2000:] if run.log_tail else None,
    )


def _task(task: Task) -> TaskView:
    result = task.result or {}
    made = [*result.get("experiments", []), *result.get("reviews", []), *result.get("plans", [])]
    made += [item["experiment"] for item in result.get("improvements", []) if item.get("experiment")]
    ids = [item.get("experiment_id") or item.get("id") for item in made]
    return TaskView(
        id=task.id,
        kind=task.kind,
        status=task.status,
        error=cut(task.error, 1500) if task.error else None,
        experiment_ids=[key for key in ids if isinstance(key, int)][:50],
    )


def _cycle(lab: Lab, cycle: Cycle, limit: int) -> CycleView:
    experiments = list_experiments(lab.store, cycle_id=cycle.id, oldest_first=True, limit=limit)
    return CycleView(
        id=cycle.id,
        status=cycle.status,
        round=cycle.round,
        max_cycles=cycle.max_cycles,
        step=cycle.step,
        error=cut(cycle.error, 1500) if cycle.error else None,
        experiments=[experiment_line(lab, experiment) for experiment in experiments],
    )


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
    "concluded": "read the verdict; enqueue it again with more seeds for firmer evidence, or suggest what follows",
    "failed": "read reason and the failed run with status(run_id); then enqueue it again or suggest another",
    "cancelled": "enqueue(experiment_ids=[{id}]) takes it up again",
}


def _next_in_lab(seen: OverviewView) -> str:
    counts = seen.experiments
    if seen.queued and not any(runner.alive for runner in seen.runners):
        return f"{seen.queued} runs wait and no runner is alive: run() starts it"

    if seen.running or seen.queued:
        return "status(wait_seconds=20, since_event=event_id) waits for what happens next"

    for name, verb in (("needs_work", "improve()"), ("suggested", "review()")):
        if counts.get(name):
            return f"{counts[name]} experiments are {name}: {verb}"

    if counts.get("approved"):
        return f"{counts['approved']} experiments are approved: enqueue(experiment_ids=[...])"

    return "suggest() brings new ideas"
