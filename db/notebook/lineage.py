"""The lineage of champions as inline SVG: a tree for each preset and hardware class, its baseline on top.

A box is a config, by what it changes in the one that it grew from and the gain to expect of the whole path; the line to
it is the experiment that confirmed it, named beside the box with its verdict. The box with the largest gain stands out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from db.formats import plain, signed
from db.records import Record, Value
from db.store import Store

NEWEST = 30
"""Champions that are drawn; the oldest of a longer lineage begin it."""

_BOX, _LABEL, _INDENT, _HEIGHT, _SPACE = 330, 380, 32, 44, 12
_CHANGES, _TITLE = 42, 50  # letters that fit


class Step(Record):
    """A champion with the experiment that confirmed it; None of a root, a baseline."""

    id: int
    parent_id: int | None
    experiment_id: int | None
    preset: str
    hardware_class: str
    gain: float
    title: str | None
    baseline: dict[str, Value] | None
    treatment: dict[str, Value] | None
    verdict: str | None


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The trees of one preset and hardware class."""

    preset: str
    hardware_class: str
    picture: Markup


def read_lineages(store: Store) -> list[Lineage]:
    """All lineages of the lab, each drawn."""
    rows = store.rows(
        """
        SELECT champions.*, experiments.title, experiments.baseline, experiments.treatment, current_verdicts.verdict
        FROM champions LEFT JOIN experiments ON experiments.id = champions.experiment_id
        LEFT JOIN current_verdicts ON current_verdicts.experiment_id = champions.experiment_id
        WHERE champions.id IN (SELECT id FROM champions ORDER BY id DESC LIMIT ?)
        ORDER BY champions.preset, champions.hardware_class, champions.id
        """,
        (NEWEST,),
    )
    kinds = groupby(map(Step.of, rows), key=lambda step: (step.preset, step.hardware_class))
    return [
        Lineage(preset=preset, hardware_class=hardware_class, picture=draw_tree(list(steps)))
        for (preset, hardware_class), steps in kinds
    ]


def draw_tree(steps: Sequence[Step]) -> Markup:
    """The trees of these steps, one below the other."""
    placed = list(_place(steps))
    width = max(x for _, x, _ in placed) + _BOX + _LABEL
    height = max(y for _, _, y in placed) + _HEIGHT + 2
    spots = {step.id: (x, y) for step, x, y in placed}
    best = max(steps, key=lambda step: step.gain).id if any(step.experiment_id for step in steps) else None
    parts = [
        Markup(
            '<svg class="lineage" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">'
        ).format(width, height, f"{sum(step.experiment_id is not None for step in steps)} confirmed gains")
    ]
    for step, x, y in placed:
        if step.parent_id in spots:
            parts.append(_edge(step, spots[step.parent_id], (x, y)))

        parts.append(_box(step, x, y, "best" if step.id == best else "config"))

    return Markup("").join([*parts, Markup("</svg>")])


def _place(steps: Sequence[Step]) -> Iterator[tuple[Step, int, int]]:
    """Each step with the left upper corner of its box: a row each, below its parent and to the right of it."""
    known = {step.id for step in steps}
    children: dict[int | None, list[Step]] = {}
    for step in steps:
        children.setdefault(step.parent_id if step.parent_id in known else None, []).append(step)

    row = 0
    waiting = [(step, 0) for step in reversed(children.get(None, []))]
    while waiting:
        step, depth = waiting.pop()
        yield step, 1 + depth * _INDENT, 1 + row * (_HEIGHT + _SPACE)
        row += 1
        waiting += [(child, depth + 1) for child in reversed(children.get(step.id, []))]


def _edge(step: Step, start: tuple[int, int], end: tuple[int, int]) -> Markup:
    middle, x = end[1] + _HEIGHT // 2, end[0] + _BOX + 14
    word = step.verdict or "no verdict"
    return Markup(
        '<path class="edge" d="M{} {}V{}H{}"/><a href="lab/experiments/{}"><title>{}</title>'
        '<text class="word {}" x="{}" y="{}">{}</text><text class="small" x="{}" y="{}">experiment {}: {}</text></a>'
    ).format(
        start[0] + _INDENT // 2, start[1] + _HEIGHT, middle, end[0],
        step.experiment_id, step.title,
        word.replace(" ", "-"), x, middle - 4, word,
        x, middle + 13, step.experiment_id, _clip(step.title or "", _TITLE),
    )  # fmt: skip


def _box(step: Step, x: int, y: int, kind: str) -> Markup:
    changes = _changes(step)
    said = "baseline" if step.experiment_id is None else f"{signed(-step.gain)} val_bpb to expect in all"
    return Markup(
        '<g class="{}"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}" rx="7"/>'
        '<text x="{}" y="{}">{}</text><text class="small" x="{}" y="{}">{}</text></g>'
    ).format(kind, changes, x, y, _BOX, _HEIGHT, x + 10, y + 18, _clip(changes, _CHANGES), x + 10, y + 35, said)


def _changes(step: Step) -> str:
    if step.treatment is None:
        return f"preset {step.preset}"

    before = step.baseline or {}
    return ", ".join(f"{knob} {plain(before.get(knob))} → {plain(value)}" for knob, value in step.treatment.items())


def _clip(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
