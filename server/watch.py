"""`blueberry runner watch`: what trains, live on the terminal, with curves, time left, the queue and the cards.

It only looks: Ctrl-C ends the looking and nothing else. Where stdout is no terminal it prints one frame.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import click
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from db.curves import curve_note
from db.errors import LabUnusableError
from db.events import events_after, latest_event_id
from db.lab import Lab
from db.order import head_of_line
from db.queries import GpuReading, RunProgress, curve, gpu_readings, overview
from db.queue import get_run
from server.commands import as_commands
from server.desk import Desk
from server.show import duration, event_text, place_text, queue_line
from server.views import EventLine, PlaceLine, RunnerLine, event_line, place_line, runner_line

_LOOK_SECONDS = 1.0
_POINTS = 120
_SAMPLES = 120
_EVENTS = 5
_NEXT = 3
_BARS = "▁▂▃▄▅▆▇█"
_NAME_WIDTH, _VALUE_WIDTH, _WIDEST_CURVE = 12, 9, 60


class WatchedRun(BaseModel):
    """A run that is being done, with the values of its two curves; None where one was not finite."""

    model_config = ConfigDict(frozen=True)

    progress: RunProgress
    train_loss: list[float | None]
    val_bpb: list[float | None]
    curve_note: str | None


class WatchedCard(BaseModel):
    """A card with its newest readings, oldest first."""

    model_config = ConfigDict(frozen=True)

    runner: RunnerLine
    samples: list[GpuReading]


class Frame(BaseModel):
    """All that is shown at one moment."""

    model_config = ConfigDict(frozen=True)

    lab: str
    cards: list[WatchedCard]
    runs: list[WatchedRun]
    queue: str
    up_next: list[PlaceLine]
    events: list[EventLine]


@click.option("--once", is_flag=True, help="Print one frame.")
def watch(desk: Desk, once: bool) -> None:
    """Watch what trains: curves, speed, time left, the queue, the cards. Ctrl-C ends the looking alone."""
    frame = look(desk.lab)
    if once or desk.as_json or not desk.console.is_terminal:
        desk.console.print(render_frame(frame, desk.console.width))
        desk.say(frame.model_dump(mode="json"))
        return

    with Live(console=desk.console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            live.update(_latest(desk.lab, desk.console.width), refresh=True)
            time.sleep(_LOOK_SECONDS)


def look(lab: Lab) -> Frame:
    """What there is to see at this moment."""
    seen = overview(lab.store)
    return Frame(
        lab=str(lab.folder),
        cards=[
            WatchedCard(runner=runner_line(lab, runner), samples=gpu_readings(lab.store, runner.id, limit=_SAMPLES))
            for runner in seen.runners
        ],
        runs=[
            WatchedRun(
                progress=run,
                train_loss=[point.value for point in curve(lab.store, run.run_id, "train_loss", points=_POINTS)],
                val_bpb=[point.value for point in curve(lab.store, run.run_id, "val_bpb", points=_POINTS)],
                curve_note=curve_note(lab.store, get_run(lab.store, run.run_id)),
            )
            for run in seen.running
        ],
        queue=queue_line(seen),
        up_next=[
            place_line(place)
            for hardware in dict.fromkeys(runner.hardware_class for runner in seen.runners)
            for place in head_of_line(lab.store, hardware, limit=_NEXT)
        ],
        events=[
            event_line(event)
            for event in events_after(lab.store, max(0, latest_event_id(lab.store) - _EVENTS), limit=_EVENTS)
        ],
    )


def render_frame(frame: Frame, width: int) -> RenderableType:
    """A frame of lines that are cut, not folded, at `width` columns."""
    lines = [Text(f"lab {frame.lab}", style="dim")]
    room = max(8, min(_WIDEST_CURVE, width - _NAME_WIDTH - _VALUE_WIDTH - 2))
    for card in frame.cards:
        lines += _card(card, room)

    if not frame.cards:
        lines.append(Text(as_commands("no runner is known yet: run(action='start') starts one")))

    for run in frame.runs:
        lines += [Text(), *_run(run, room)]

    lines += [Text(), Text(frame.queue, style="bold"), *map(place_text, frame.up_next)]
    lines += [event_text(event) for event in frame.events]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"

    return Group(*lines)


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A curve in one line of at most `width` characters, from its lowest value to its highest; gaps stay gaps."""
    count = min(width, len(values))
    groups = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(known) / len(known) if (known := _finite(group)) else math.nan for group in groups]
    finite = [mean for mean in means if not math.isnan(mean)]
    if not finite:
        return " " * count

    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(" " if math.isnan(mean) else _BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def _latest(lab: Lab, width: int) -> RenderableType:
    try:
        return render_frame(look(lab), width)
    except LabUnusableError as error:  # a full disk, a lock: it may pass
        return Text(str(error), style="red")


def _card(card: WatchedCard, room: int) -> list[Text]:
    line = Text.assemble((card.runner.device_name, "bold"), f" {as_commands(card.runner.state)}")
    said = [Text(card.runner.message, style="dim")] if card.runner.message else []
    if not card.samples:
        return [line, *said]

    last = card.samples[-1]
    readings = (
        (last.temperature_celsius, "{:.0f} °C"),
        (last.power_watts, "{:.0f} W"),
        (None if last.memory_bytes is None else last.memory_bytes / 2**30, "{:.1f} GiB"),
    )
    for value, form in readings:
        if value is not None:
            line.append(f", {form.format(value)}")

    if last.slowdowns:
        line.append(f", slowed: {last.slowdowns}", style="yellow")

    if last.others:
        line.append(f", shared with {last.others} other process{'es' * (last.others > 1)}", style="yellow")

    busy = [sample.utilization_percent for sample in card.samples]
    return [line, *said, _curve("busy", busy, "{:.0f} %", room, "green")]


def _run(run: WatchedRun, room: int) -> list[Text]:
    seen = run.progress
    of = f" of #{seen.experiment_id} {seen.title}" if seen.experiment_id else ""
    head = Text.assemble((f"run {seen.run_id} ({seen.arm or seen.kind}, seed {seen.seed})", "bold"), of)
    parts = ["starting" if seen.step is None else f"step {seen.step}{f'/{seen.steps}' if seen.steps else ''}"]
    if seen.tokens_per_second is not None:
        parts.append(f"{seen.tokens_per_second:,.0f} tokens/s")

    if seen.seconds_left is not None:
        parts.append(f"{duration(seen.seconds_left)} left")

    lines = [head, Text(", ".join(parts))]
    if seen.step is not None and seen.steps:
        done = round(room * min(1.0, seen.step / seen.steps))
        lines.append(Text(f"{'':{_NAME_WIDTH}}{'█' * done}{'░' * (room - done)}", style="bold"))

    if run.train_loss:
        lines.append(_curve("train_loss", run.train_loss, "{:.4f}", room, "cyan"))

    if run.val_bpb:
        lines.append(_curve("val_bpb", run.val_bpb, "{:.4f}", room, "magenta"))

    if run.curve_note:
        lines.append(Text(run.curve_note, style="dim"))

    return lines


def _curve(name: str, values: Sequence[float | None], form: str, room: int, style: str) -> Text:
    last = values[-1] if values else None
    said = "not finite" if last is None else form.format(last)
    return Text.assemble(f"{name:{_NAME_WIDTH}}", (f"{sparkline(values, room):{room}}", style), f"  {said}")


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
