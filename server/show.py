"""How answers look to a person: tables on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from textwrap import indent
from typing import Any

from pydantic import BaseModel
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from db.formats import part, span
from db.queries import Overview, RunProgress
from server.commands import as_commands
from server.parts import CycleView, ExperimentView, OverviewView, RunView, TaskView
from server.tools.enqueue import Enqueued
from server.tools.improve import ImprovementsView
from server.tools.review import Reviews
from server.tools.run import RunHandle
from server.tools.status import Status
from server.tools.suggest import Suggestion
from server.views import (
    EventLine,
    ExperimentLine,
    PlaceLine,
    ReviewView,
    RunLine,
    RunnerLine,
    StillWorking,
    VerdictView,
)

_STYLES = {
    "improved": "green",
    "improved but not causal": "magenta",
    "worse": "red",
    "equivalent": "cyan",
    "no evidence yet": "yellow",
    "promising": "bright_green",
    "not promising": "dim",
    "invalid": "magenta",
    "failed": "red",
    "running": "bold",
}
_PLAIN_WIDTH = 160


def make_console() -> Console:
    """A console on stdout; wide where it is not a terminal, so that lines stay whole.

    Without rich's markup: what people, models and errors write may hold brackets, as in [runner].
    """
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


def render(view: BaseModel) -> RenderableType:
    """An answer of a verb, for people."""
    parts = _PARTS[type(view)](view)
    after = getattr(view, "next", None)
    return Group(*parts, Text(f"next: {as_commands(after)}", style="dim")) if after else Group(*parts)


def duration(seconds: float | None) -> str:
    """12 s, 3 min 20 s, 2 h 5 min; a dash where nothing is known."""
    if seconds is None:
        return "–"

    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"

    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"

    return f"{whole // 3600} h {whole % 3600 // 60} min"


def energy(kwh: float | None) -> str:
    """0.0213 kWh; never 0 for what nothing has measured."""
    return "not measured" if kwh is None else f"{kwh:.4f} kWh"


def interval(verdict: VerdictView) -> str:
    """The effect with its interval, such as -0.0213 [-0.0301, -0.0125]."""
    text = span(verdict.effect, verdict.low, verdict.high, verdict.noise).replace("−", "-")  # as sentences write it
    return text if verdict.share == 1.0 else f"{text} at {part(verdict.share)} of the budget"


def word(text: str | None) -> Text:
    """A status or verdict in its colour."""
    return Text(text or "–", style=_STYLES.get(text or "", ""))


def verdict_table(rows: Sequence[tuple[ExperimentLine, VerdictView | None]]) -> RenderableType:
    """What the research says, in plain words."""
    table = _table("#", "experiment", "verdict", "effect on the metric [interval]", "pairs", "in plain words")
    for line, verdict in rows:
        table.add_row(
            str(line.id),
            line.title,
            word(verdict.verdict if verdict else line.status),
            interval(verdict) if verdict else "–",
            str(verdict.pairs) if verdict else "0",
            (verdict.sentence if verdict else line.sentence) or "–",
        )

    return table


def progress_line(run: RunProgress) -> str:
    """What one run is doing, in one line."""
    what = f"run {run.run_id} ({run.kind if run.kind == 'probe' else run.arm or run.kind}, seed {run.seed})"
    parts = [f"{what} of #{run.experiment_id} {run.title}" if run.experiment_id else what]
    if run.step is not None and run.steps:
        parts.append(f"step {run.step}/{run.steps}")

    if run.val_bpb is not None:
        parts.append(f"val_bpb {run.val_bpb:.4f}")

    if run.seconds_left is not None:
        parts.append(f"{duration(run.seconds_left)} left")

    return ", ".join(parts)


def queue_line(seen: Overview) -> str:
    """How much waits."""
    left = f", about {duration(seen.seconds_left)} left in all" if seen.seconds_left is not None else ""
    return f"{len(seen.running)} running, {seen.queued} waiting{left}"


def progress_table(seen: Overview) -> RenderableType:
    """What runs now, as a table that is drawn again and again."""
    if not seen.running:
        return Text(queue_line(seen), style="dim")

    table = _table("run", "experiment", "step", "", "val_bpb", "left")
    for run in seen.running:
        share = run.step / run.steps if run.step and run.steps else 0.0
        table.add_row(
            f"{run.run_id} {run.arm or run.kind} seed {run.seed}",
            f"#{run.experiment_id} {run.title}" if run.experiment_id else "–",
            f"{run.step}/{run.steps}" if run.step is not None else "starting",
            "█" * round(20 * share) + "░" * (20 - round(20 * share)),
            f"{run.val_bpb:.4f}" if run.val_bpb is not None else "–",
            duration(run.seconds_left),
        )

    return Group(table, Text(queue_line(seen), style="dim"))


def experiment_table(lines: Sequence[ExperimentLine]) -> RenderableType:
    """Experiments in a list."""
    if not lines:
        return Text("no experiments")

    table = _table("#", "status", "experiment", "treatment", "score", "verdict")
    for line in lines:
        table.add_row(
            str(line.id),
            word(line.status),
            line.title,
            ", ".join(f"{name}={value}" for name, value in line.treatment.items()),
            f"{line.score:.1f}" if line.score is not None else "–",
            word(line.verdict),
        )

    return table


def runner_table(lines: Sequence[RunnerLine]) -> RenderableType:
    """The cards and their daemons."""
    if not lines:
        return Text("no runner is known yet; start one with: blueberry runner start")

    table = _table("runner", "device", "state", "heard of", "says")
    for line in lines:
        state = f"alive (pid {line.pid})" if line.state == "alive" else as_commands(line.state)
        table.add_row(str(line.id), line.device_name, state, line.heartbeat_at, line.message or "")

    return table


def place_text(place: PlaceLine) -> Text:
    """A run that waits, and why it stands where it does."""
    return Text(f"in line {place.position}: run {place.run_id} ({place.kind}, seed {place.seed}), {place.why}")


def event_text(event: EventLine) -> Text:
    """A line of the journal."""
    about = f"#{event.experiment_id} " if event.experiment_id else ""
    return Text(f"{event.at[11:19]}  {about}{event.message}")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in ("#", "verdict", "pairs", "status", "left", ""))

    return table


def _suggestion(view: Suggestion) -> list[RenderableType]:
    parts: list[RenderableType] = [experiment_table(view.experiments)] if view.experiments else []
    for line in view.experiments:
        parts.append(Text(f"#{line.id} {line.hypothesis}", style="dim"))

    for refusal in view.refused:
        parts.append(Text(f"refused: {refusal.title}: {refusal.reason}", style="yellow"))

    parts += [_review(item) for item in view.reviews]
    parts += [_plan(plan) for plan in view.plans]
    return parts + _working(view.working)


def _reviews(view: Reviews) -> list[RenderableType]:
    return [*(_review(item) for item in view.reviews), *_working(view.working)]


def _review(view: ReviewView) -> RenderableType:
    scores = ", ".join(
        f"{name} {getattr(view, name):.1f}" for name in ("novelty", "feasibility", "impact", "clarity", "efficiency")
    )
    head = f"#{view.experiment_id} {view.title}: {view.score:.1f}, {view.decision} ({view.reviewer})"
    return Group(Text(head, style="bold"), Text(indent(f"{scores}\n{view.feedback}", "   ")))


def _improvements(view: ImprovementsView) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for item in view.improvements:
        became = f"#{item.experiment.id} {item.experiment.title}" if item.experiment else item.parent_status
        parts.append(Text(f"#{item.parent_id} -> {became}: {item.changes}"))

    return parts + _working(view.working)


def _enqueued(view: Enqueued) -> list[RenderableType]:
    parts: list[RenderableType] = [_plan(plan) for plan in view.plans]
    left = f", about {duration(view.seconds_left)}" if view.seconds_left is not None else ""
    return [*parts, Text(f"{view.queued} runs wait{left}"), *_working(view.working)]


def _plan(plan: Any) -> RenderableType:
    notes = "".join(f"; {note}" for note in plan.notes)
    return Text(
        f"#{plan.experiment_id} {plan.title}: queued {plan.runs_new} new runs, {plan.runs_shared} shared, seeds "
        f"{', '.join(map(str, plan.seeds))}, about {duration(plan.seconds)} of training, "
        f"{plan.memory_bytes / 2**30:.1f} GiB{notes}"
    )


def _handle(view: RunHandle) -> list[RenderableType]:
    left = f", about {duration(view.seconds_left)} left" if view.seconds_left is not None else ""
    done = Text(as_commands(view.done))
    parts: list[RenderableType] = [done, Text(f"{len(view.running)} running, {view.queued} waiting{left}")]
    return [*parts, Text(view.budget, style="yellow")] if view.budget else parts


def _working(working: StillWorking | None) -> list[RenderableType]:
    if working is None:
        return []

    return [Text(f"still working: blueberry status --task {working.task_id}", style="yellow")]


def _status(view: Status) -> list[RenderableType]:
    part = view.experiment or view.run or view.task or view.cycle or view.overview
    shown = _PARTS[type(part)](part) if part is not None else []
    return [Text(f"lab {view.lab}", style="dim"), *shown, *(event_text(event) for event in view.events)]


def _overview(view: OverviewView) -> list[RenderableType]:
    def counts(values: dict[str, int]) -> str:
        return ", ".join(f"{count} {name}" for name, count in values.items()) or "none"

    left = f" (about {duration(view.seconds_left)} left)" if view.seconds_left is not None else ""
    parts: list[RenderableType] = [
        Text(f"experiments: {counts(view.experiments)}"),
        Text(f"runs: {counts(view.runs)}{left}"),
        Text(f"verdicts: {counts(view.verdicts)}"),
        Text(f"today: {view.gpu_hours_today:.3g} GPU-hours, energy {energy(view.kwh_today)}, ${view.usd_today:.2f}"),
        runner_table(view.runners),
    ]
    if view.budget:
        parts.append(Text(view.budget, style="yellow"))

    if view.running:
        parts.append(_run_table(view.running))

    parts += [place_text(place) for place in view.up_next]
    if view.champion:
        changes = ", ".join(f"{name}={value}" for name, value in view.champion.changes.items())
        of = ", ".join(f"#{key}" for key in view.champion.experiment_ids)
        gain = f"expected to save {view.champion.gain:.3f} val_bpb"
        parts.append(Text(f"champion: {changes} ({gain} over preset {view.champion.preset}; confirmed by {of})"))

    parts.append(experiment_table(view.newest))
    parts += [Text(f"learnt: {insight}") for insight in view.insights]
    return parts


def _experiment(view: ExperimentView) -> list[RenderableType]:
    change = ", ".join(f"{name} {view.baseline.get(name)} -> {value}" for name, value in view.treatment.items())
    parts: list[RenderableType] = [
        Text(f"#{view.id} {view.title}", style="bold"),
        Text(f"{view.status}" + (f" ({view.reason})" if view.reason else "") + f", {view.domain}, by {view.proposer}"),
        Text(f"hypothesis: {view.hypothesis}"),
        Text(f"treatment: {change} (preset {view.preset}); {view.metric}, {view.direction} is better"),
    ]
    if view.method:
        parts.append(Text(f"method: {view.method}"))

    if view.review:
        parts.append(_review(view.review))

    if view.verdict:
        verdict = view.verdict
        parts.append(Text.assemble("verdict: ", word(verdict.verdict), f" {interval(verdict)}, {verdict.pairs} pairs"))
        parts.append(Text(verdict.sentence))
        parts.append(Text(f"cost: {duration(verdict.cost_seconds)}, energy {energy(verdict.cost_kwh)}"))

    return [*parts, _run_table(view.runs)] if view.runs else parts


def _run_table(runs: Sequence[RunLine]) -> RenderableType:
    table = _table("run", "kind", "status", "seed", "step", "val_bpb", "left", "problem")
    for run in runs:
        table.add_row(
            str(run.id),
            run.arm or run.kind,
            word(run.status),
            str(run.seed),
            f"{run.step}/{run.steps}" if run.step is not None else "–",
            f"{run.val_bpb:.4f}" if run.val_bpb is not None else "–",
            duration(run.seconds_left),
            run.error or run.disturbance or "",
        )

    return table


def _run(view: RunView) -> list[RenderableType]:
    parts: list[RenderableType] = [_run_table([view.run]), Text(f"on {view.hardware_class}, {view.fingerprint}")]
    if view.place:
        parts.append(place_text(view.place))
    elif view.run.status == "queued" and view.needs_run_id is not None:
        parts.append(Text(f"waits for run {view.needs_run_id} to complete and pass"))

    parts.append(Text(f"energy: {energy(view.kwh)}"))
    if view.run.disturbance:
        parts.append(Text(f"disturbed: {view.run.disturbance}", style="yellow"))

    for name, points in view.curves.items():
        shown = ", ".join(f"{step}: {value:.4f}" for step, value in points if value is not None)
        parts.append(Text(f"{name}: {shown}"))

    if view.curve_note:
        parts.append(Text(view.curve_note, style="dim"))

    return [*parts, Text(view.log_tail, style="dim")] if view.log_tail else parts


def _task(view: TaskView) -> list[RenderableType]:
    ids = f", experiments {', '.join(map(str, view.experiment_ids))}" if view.experiment_ids else ""
    return [Text(f"task {view.id} ({view.kind}): {view.status}{ids}" + (f": {view.error}" if view.error else ""))]


def _cycle(view: CycleView) -> list[RenderableType]:
    error = f": {view.error}" if view.error else ""
    line = f"campaign {view.id}: {view.status}, round {view.round} of {view.max_cycles}, {view.step}{error}"
    return [Text(line), experiment_table(view.experiments)]


_PARTS: dict[type[BaseModel], Callable[[Any], list[RenderableType]]] = {
    Suggestion: _suggestion,
    Reviews: _reviews,
    ImprovementsView: _improvements,
    Enqueued: _enqueued,
    RunHandle: _handle,
    Status: _status,
    OverviewView: _overview,
    ExperimentView: _experiment,
    RunView: _run,
    TaskView: _task,
    CycleView: _cycle,
}
