"""The larger parts of a status answer: the lab, one experiment, one run, one task, one campaign."""

from __future__ import annotations

from typing import Any

from agents.lineage import path_of
from db.budget import reached
from db.cards import run_kwh
from db.champions import list_champions
from db.clock import utc_now
from db.curves import curve_note
from db.experiments import get_experiment, latest_review, latest_verdict, list_experiments, list_insights
from db.formats import cut
from db.lab import Lab
from db.order import head_of_line, place_of
from db.queries import curve, lineage, metric_names, overview, runs_of_experiment
from db.queue import get_run
from db.records import Champion, Cycle, Task, Value
from db.tasks import running_cycles
from moe.config import KNOBS
from server.views import (
    ChampionView,
    ExperimentLine,
    PlaceLine,
    ReviewView,
    RunLine,
    RunnerLine,
    VerdictView,
    View,
    champion_view,
    curve_points,
    experiment_line,
    place_line,
    plain_run_line,
    review_view,
    rounded,
    run_line,
    runner_line,
    verdict_view,
)

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
    up_next: list[PlaceLine]
    """the runs that start next, on the hardware of the runner that was heard of last"""
    seconds_left: float | None
    """until the queue is done, as far as past runs tell"""
    runners: list[RunnerLine]
    newest: list[ExperimentLine]
    """newest experiments first, at most `limit`"""
    truncated: bool
    """whether there are more experiments than listed"""
    insights: list[str]
    champion: ChampionView | None
    tasks_open: int
    """calls that agents are answering"""
    cycles_running: list[int]
    usd_today: float
    gpu_hours_today: float
    """in which runs held a device of the lab since 00:00 UTC, a CPU as well"""
    kwh_today: float | None
    """null: nothing measured it, as on a CPU"""
    kwh: float | None
    """of all runs so far"""
    budget: str | None
    """which cap of the day is reached, and how to go on; null: none"""


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
    curve_note: str | None
    """on how much text val_bpb along these curves is measured, and the scores; null: on the same"""


class RunView(View):
    """One run with its config, score and curves."""

    run: RunLine
    place: PlaceLine | None
    """where it stands in the queue; null: it does not wait, or it waits for needs_run_id to complete and pass"""
    needs_run_id: int | None
    hardware_class: str
    fingerprint: str
    config: dict[str, Value]
    score: dict[str, Any] | None
    failures: int
    lost: int
    """attempts killed from outside; the run was queued again"""
    kwh: float | None
    """energy of all attempts; null: nothing measured it, as on a CPU"""
    curves: dict[str, Curve]
    curve_note: str | None
    """on how much text val_bpb along the curve is measured, and the score; null: on the same"""
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


def overview_view(lab: Lab, limit: int) -> OverviewView:
    """The lab, with its `limit` newest experiments."""
    seen = overview(lab.store)
    newest = list_experiments(lab.store, limit=limit + 1)
    return OverviewView(
        experiments=seen.experiments,
        runs=seen.runs,
        verdicts=seen.verdicts,
        running=[run_line(run) for run in seen.running[:limit]],
        queued=seen.queued,
        up_next=[
            place_line(place)
            for runner in seen.runners[:1]
            for place in head_of_line(lab.store, runner.hardware_class, limit=3)
        ],
        seconds_left=rounded(seen.seconds_left, 0),
        runners=[runner_line(lab, runner) for runner in seen.runners[:8]],
        newest=[experiment_line(lab, experiment) for experiment in newest[:limit]],
        truncated=len(newest) > limit,
        insights=[cut(insight.statement, 240) for insight in list_insights(lab.store, limit=8)],
        champion=champion_view(_champion_path(lab)),
        tasks_open=seen.tasks_open,
        cycles_running=[cycle.id for cycle in running_cycles(lab.store)][:20],
        usd_today=round(seen.usd_today, 4),
        gpu_hours_today=round(seen.today.gpu_hours, 3),
        kwh_today=rounded(seen.today.kwh),
        kwh=rounded(seen.kwh),
        budget=reached(lab.store, lab.settings.runner, utc_now()),
    )


def _champion_path(lab: Lab) -> list[Champion]:
    known = list_champions(lab.store)
    best = max((item for item in known if item.experiment_id), key=lambda item: (item.gain, -item.id), default=None)
    return [] if best is None else path_of(known, best)


def experiment_view(lab: Lab, experiment_id: int, limit: int) -> ExperimentView:
    """One experiment, with at most `limit` of its runs."""
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
        curve_note=curve_note(lab.store, get_run(lab.store, trained[-1].run_id)) if trained else None,
    )


def run_view(lab: Lab, run_id: int) -> RunView:
    """One run."""
    run = get_run(lab.store, run_id)
    names = [name for name in ("val_bpb", "train_loss") if name in metric_names(lab.store, run_id)]
    return RunView(
        run=plain_run_line(run),
        place=place_line(place) if (place := place_of(lab.store, run_id)) else None,
        needs_run_id=run.needs_run_id,
        hardware_class=run.hardware_class,
        fingerprint=run.fingerprint,
        config=run.config,
        score=run.score,
        failures=run.failures,
        lost=run.lost,
        kwh=rounded(run_kwh(lab.store, run_id)),
        curves={name: curve_points(curve(lab.store, run_id, name, points=25)) for name in names},
        curve_note=curve_note(lab.store, run),
        log_tail=run.log_tail[-2000:] if run.log_tail else None,
    )


def task_view(task: Task) -> TaskView:
    """One call to an agent."""
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


def cycle_view(lab: Lab, cycle: Cycle, limit: int) -> CycleView:
    """One campaign, with at most `limit` of its experiments."""
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
