"""What the verbs answer with: small typed views of the lab's records, each enough by itself and bounded in size.

Chat clients show a model the structured content alone, and cut what is longer than about 25,000 tokens. So texts
are cut here, lists have limits, and whoever cuts a list says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from agents.hands import is_alive, state_of
from db.experiments import latest_review, latest_verdict
from db.formats import cut, places
from db.lab import Lab
from db.order import Place
from db.queries import CurvePoint, RunProgress
from db.records import Champion, Event, Experiment, Review, Run, Runner, Task, Value, Verdict


class View(BaseModel):
    """A part of an answer. The string below a field is its description in the published schema."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Illustrated(View):
    """An answer with pictures, which a chat client gets as images beside it."""

    images: list[str]
    """PNG files of at most 200 kB, shown with this answer"""


class ExperimentLine(View):
    """One experiment in a list."""

    id: int
    title: str
    status: str
    """suggested, approved, needs_work, rejected, superseded, queued, running, concluded, failed or cancelled"""
    domain: str
    proposer: str
    treatment: dict[str, Value]
    """config overrides that are compared with the baseline"""
    parent_id: int | None
    """the experiment that this one improves"""
    score: float | None
    """latest review, 1 to 10"""
    verdict: str | None
    """screened: promising or not promising, which claims nothing; confirmed: improved, improved but not causal, worse,
    equivalent or no evidence yet; or invalid"""
    sentence: str | None
    """the verdict in plain words, or why the experiment ended"""


class SuggestedLine(ExperimentLine):
    """One experiment with its hypothesis."""

    hypothesis: str


class VerdictView(View):
    """What the runs say of a hypothesis. effect = treatment - baseline, in units of the metric."""

    verdict: str
    """promising, not promising: after screening, which claims nothing; improved, worse, equivalent, ...: confirmed"""
    stage: str | None
    """screen: pairs that may share baselines; confirm: new pairs, scored on the sealed test split"""
    final: bool
    sentence: str
    reason: str | None
    metric: str
    effect: float | None
    low: float | None
    """lower end of the interval of the effect"""
    high: float | None
    confidence: float | None
    noise: float | None
    """deviation of the difference in one pair where nothing is different, to whose digits all else is rounded"""
    expected: float | None
    """the true effect to expect: the observed one, shrunk toward what effects have been in this lab"""
    evidence: float | None
    """e-value that the treatment is better; it is claimed to be at `needed`"""
    needed: float | None
    pairs: int
    """pairs of runs of equal seed"""
    share: float
    """part of the budget that they were trained for; below 1 the effect is not that of the whole budget"""
    seeds: list[int]
    baseline_mean: float | None
    treatment_mean: float | None
    baseline_parameters: int | None
    treatment_parameters: int | None
    baseline_active_parameters: int | None
    treatment_active_parameters: int | None
    baseline_flops: float | None
    treatment_flops: float | None
    baseline_seconds: float | None
    """median of how long training one run took; machines are shared, so only the sentence says when a ratio is clear"""
    treatment_seconds: float | None
    cost_seconds: float
    cost_kwh: float | None
    """null: nothing measured it, as on a CPU"""


class ReviewView(View):
    """Scores from 1 to 10, their weighted mean, and where it leads."""

    experiment_id: int
    title: str
    status: str
    """of the experiment after the review"""
    reviewer: str
    score: float
    decision: str
    """approve, refine, rewrite or reject"""
    novelty: float
    feasibility: float
    impact: float
    clarity: float
    efficiency: float
    success_probability: float | None
    feedback: str


class ChampionView(View):
    """The config that confirmed gains have led to, which new suggestions are compared with."""

    id: int
    preset: str
    changes: dict[str, Value]
    """what it changes over the root of its lineage, a baseline"""
    gain: float
    """val_bpb that all of it together is expected to save"""
    experiment_ids: list[int]
    """the experiments that confirmed it, one on top of the other"""


class RunLine(View):
    """One run: a child process on one config and seed. Times in seconds; null where nothing is known yet."""

    id: int
    kind: str
    """probe (does the knob act, is it causal, does it fit) or train"""
    status: str
    arm: str | None
    """probe, baseline or treatment"""
    seed: int
    experiment_id: int | None
    step: int | None
    steps: int | None
    val_bpb: float | None
    """bits per byte on held-out text, lower is better; until a run is completed its curve's last, over less text"""
    seconds_left: float | None
    disturbance: str | None
    """what made it a worse measurement: a throttled card, one that others used too, memory errors; null: nothing"""
    error: str | None


class PlaceLine(View):
    """Where a run stands that waits for a runner and could start now."""

    run_id: int
    position: int
    """1 is next on its hardware class"""
    kind: str
    seed: int
    priority: int
    why: str
    """runs of equal priority go by what they promise for their seconds, and by how long they have waited"""


class RunnerLine(View):
    """One card, or a host's CPU, and its daemon."""

    id: int
    device_name: str
    hardware_class: str
    alive: bool
    """whether a daemon drives it now"""
    state: str
    """alive, paused, draining or not running, and what to do about it"""
    pid: int | None
    message: str | None
    heartbeat_at: str


class EventLine(View):
    """One line of the lab's journal."""

    id: int
    at: str
    kind: str
    message: str
    experiment_id: int | None
    run_id: int | None


class StillWorking(View):
    """A call that an agent is still answering. It goes on whether or not anyone waits."""

    task_id: int
    kind: str
    status: Literal["queued", "running"]


def rounded(value: float | None, digits: int = 6) -> float | None:
    """A number as people read it."""
    return None if value is None else round(value, digits)


def short(value: float | None) -> float | None:
    """A number to three digits."""
    return None if value is None else float(f"{value:.3g}")


def experiment_line(lab: Lab, experiment: Experiment) -> ExperimentLine:
    """An experiment with its score and verdict."""
    review = latest_review(lab.store, experiment.id)
    verdict = latest_verdict(lab.store, experiment.id)
    sentence = verdict.sentence if verdict else experiment.reason
    return ExperimentLine(
        id=experiment.id,
        title=cut(experiment.title, 120),
        status=experiment.status,
        domain=experiment.domain,
        proposer=experiment.proposer,
        treatment=experiment.treatment,
        parent_id=experiment.parent_id,
        score=rounded(review.score, 2) if review else None,
        verdict=verdict.said if verdict else None,
        sentence=cut(sentence, 300) if sentence else None,
    )


def suggested_line(lab: Lab, experiment: Experiment) -> SuggestedLine:
    """An experiment with its hypothesis."""
    line = experiment_line(lab, experiment).model_dump()
    return SuggestedLine.model_validate(line | {"hypothesis": cut(experiment.hypothesis, 600)})


def champion_view(path: Sequence[Champion]) -> ChampionView | None:
    """The last champion of a path from a root; None where there is none."""
    if len(path) < 2:
        return None

    root, champion = path[0], path[-1]
    return ChampionView(
        id=champion.id,
        preset=champion.preset,
        changes={name: value for name, value in champion.config.items() if root.config.get(name) != value},
        gain=round(champion.gain, 4),
        experiment_ids=[item.experiment_id for item in path if item.experiment_id is not None],
    )


def verdict_view(verdict: Verdict) -> VerdictView:
    """A verdict without its row's bookkeeping."""
    numbers = {
        name: rounded(value := getattr(verdict, name), places(verdict.noise, value))
        for name in ("effect", "low", "high", "expected", "baseline_mean", "treatment_mean")
    }
    numbers |= {name: short(getattr(verdict, name)) for name in ("confidence", "noise", "evidence", "needed")}
    seconds = {name: rounded(getattr(verdict, name), 1) for name in ("baseline_seconds", "treatment_seconds")}
    costs = {"cost_seconds": round(verdict.cost_seconds, 1), "cost_kwh": rounded(verdict.cost_kwh)}
    values = verdict.model_dump() | numbers | seconds | costs | {"verdict": verdict.said}
    return VerdictView.model_validate(values)


def review_view(experiment: Experiment, review: Review) -> ReviewView:
    """A review, and what became of its experiment."""
    values = review.model_dump() | {
        "title": cut(experiment.title, 120),
        "status": experiment.status,
        "score": rounded(review.score, 2),
        "feedback": cut(review.feedback, 1500),
    }
    return ReviewView.model_validate(values)


def run_line(run: RunProgress) -> RunLine:
    """A run and where it stands."""
    return RunLine(
        id=run.run_id,
        kind=run.kind,
        status=run.status,
        arm=run.arm,
        seed=run.seed,
        experiment_id=run.experiment_id,
        step=run.step,
        steps=run.steps,
        val_bpb=rounded(run.val_bpb),
        seconds_left=rounded(run.seconds_left, 1),
        disturbance=run.disturbance,
        error=cut(run.error, 300) if run.error else None,
    )


def plain_run_line(run: Run) -> RunLine:
    """A run by itself, not as part of an experiment."""
    left = None
    if run.status == "running" and run.step and run.steps and run.seconds:
        left = round(run.seconds / run.step * (run.steps - run.step), 1)

    return RunLine(
        id=run.id,
        kind=run.kind,
        status=run.status,
        arm=None,
        seed=run.seed,
        experiment_id=None,
        step=run.step,
        steps=run.steps,
        val_bpb=rounded(run.val_bpb),
        seconds_left=left,
        disturbance=run.disturbance,
        error=cut(run.error, 1000) if run.error else None,
    )


def place_line(place: Place) -> PlaceLine:
    """A place in the line of queued runs."""
    return PlaceLine(
        run_id=place.run_id,
        position=place.position,
        kind=place.kind,
        seed=place.seed,
        priority=place.priority,
        why=place.why,
    )


def runner_line(lab: Lab, runner: Runner) -> RunnerLine:
    """A runner, and whether it lives."""
    return RunnerLine(
        id=runner.id,
        device_name=runner.device_name,
        hardware_class=runner.hardware_class,
        alive=is_alive(lab, runner),
        state=state_of(lab, runner),
        pid=runner.pid,
        message=cut(runner.message, 300) if runner.message else None,
        heartbeat_at=runner.heartbeat_at,
    )


def event_line(event: Event) -> EventLine:
    """A line of the journal, cut to a sentence."""
    return EventLine.model_validate(event.model_dump() | {"message": cut(event.message, 240)})


def still_working(task: Task) -> StillWorking | None:
    """The handle of a task that has not ended."""
    if task.status not in ("queued", "running"):
        return None

    return StillWorking(task_id=task.id, kind=task.kind, status=task.status)


def curve_points(points: Sequence[CurvePoint]) -> list[tuple[int, float | None]]:
    """A curve as [step, value] pairs."""
    return [(point.step, rounded(point.value)) for point in points]
