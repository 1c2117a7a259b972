"""The lineage of champions: a tree for each preset and hardware class, its baseline on top; read, laid out and drawn.

A box is a config, by what it changes in the one that it grew from and the gain to expect of the whole path. The line to
it is the experiment that confirmed it, named beside the box with its verdict, effect and interval. In each tree the box
with the largest gain, its champion, stands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from db.formats import cut, difference, plain, span
from db.records import Record, Value
from db.store import Store

BOX, LABEL, HEIGHT = 330, 380, 44
"""Width of a box, room beside it, height of a box."""

INDENT, SPACE = 32, 12
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
    effect: float | None
    low: float | None
    high: float | None
    noise: float | None

    @property
    def changes(self) -> str:
        """What it changes in the config that it grew from."""
        if self.treatment is None:
            return f"preset {self.preset}"

        before = self.baseline or {}
        return ", ".join(f"{knob} {plain(before.get(knob))} → {plain(value)}" for knob, value in self.treatment.items())

    @property
    def found(self) -> str:
        """The effect of its experiment, with the interval."""
        return span(self.effect, self.low, self.high, self.noise)

    @property
    def expected(self) -> str:
        """The gain of the whole path to it, to expect in truth."""
        return "baseline" if self.experiment_id is None else f"{self.in_all} val_bpb to expect in all"

    @property
    def in_all(self) -> str:
        """The same, the number alone."""
        return "–" if self.experiment_id is None else difference(-self.gain, self.noise)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A step with the left upper corner of its box, and whether it is its tree's champion."""

    step: Step
    x: int
    y: int
    parent: Placed | None
    best: bool


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The trees of one preset and hardware class."""

    preset: str
    hardware_class: str
    steps: Sequence[Step]

    def draw(self, page: str | None = None) -> Markup:
        """Its picture; the experiments are links where it is known below which `page` theirs are."""
        return draw_tree(self.steps, page)


def read_lineages(store: Store, *, newest: int) -> list[Lineage]:
    """All lineages of the lab, of its newest champions; the oldest that is left of a longer one begins it."""
    rows = store.rows(
        """
        SELECT champions.*, experiments.title, experiments.baseline, experiments.treatment,
               current_verdicts.said AS verdict, current_verdicts.effect, current_verdicts.low, current_verdicts.high,
               current_verdicts.noise
        FROM champions LEFT JOIN experiments ON experiments.id = champions.experiment_id
        LEFT JOIN current_verdicts ON current_verdicts.experiment_id = champions.experiment_id
        WHERE champions.id IN (SELECT id FROM champions ORDER BY id DESC LIMIT ?)
        ORDER BY champions.preset, champions.hardware_class, champions.id
        """,
        (newest,),
    )
    kinds = groupby(map(Step.of, rows), key=lambda step: (step.preset, step.hardware_class))
    return [
        Lineage(preset=preset, hardware_class=hardware_class, steps=list(steps))
        for (preset, hardware_class), steps in kinds
    ]


def layout(steps: Sequence[Step]) -> list[Placed]:
    """Each step in a row of its own, below its parent and to the right of it."""
    known = {step.id for step in steps}
    children: dict[int | None, list[Step]] = {}
    for step in steps:
        children.setdefault(step.parent_id if step.parent_id in known else None, []).append(step)

    placed: list[Placed] = []
    for root in children.get(None, []):
        best = _best(root, children)
        waiting: list[tuple[Step, Placed | None]] = [(root, None)]
        while waiting:
            step, parent = waiting.pop()
            x = 1 if parent is None else parent.x + INDENT
            spot = Placed(step=step, x=x, y=1 + len(placed) * (HEIGHT + SPACE), parent=parent, best=step.id == best)
            placed.append(spot)
            waiting += [(child, spot) for child in reversed(children.get(step.id, []))]

    return placed


def size(placed: Sequence[Placed]) -> tuple[int, int]:
    """Width and height of the picture."""
    return max(spot.x for spot in placed) + BOX + LABEL, max(spot.y for spot in placed) + HEIGHT + 2


def draw_tree(steps: Sequence[Step], page: str | None = None) -> Markup:
    """The trees of these steps, one below the other, as SVG."""
    placed = layout(steps)
    width, height = size(placed)
    said = f"{sum(step.experiment_id is not None for step in steps)} confirmed gains"
    parts = [
        Markup(
            '<svg class="lineage" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">'
        ).format(width, height, said)
    ]
    for spot in placed:
        if spot.parent is not None:
            parts.append(_edge(spot, spot.parent, page))

        parts.append(_box(spot))

    return Markup("").join([*parts, Markup("</svg>")])


def _best(root: Step, children: dict[int | None, list[Step]]) -> int | None:
    tree = [root]
    for step in tree:
        tree += children.get(step.id, [])

    confirmed = [step for step in tree if step.experiment_id is not None]
    return max(confirmed, key=lambda step: (step.gain, -step.id)).id if confirmed else None


def _edge(spot: Placed, parent: Placed, page: str | None) -> Markup:
    step, middle, x = spot.step, spot.y + HEIGHT // 2, spot.x + BOX + 14
    word = step.verdict or "no verdict"
    line = Markup('<path class="edge" d="M{} {}V{}H{}"/>').format(
        parent.x + INDENT // 2, parent.y + HEIGHT, middle, spot.x
    )
    label = Markup(
        '<title>{}</title><text class="word {}" x="{}" y="{}">{} <tspan class="found">{}</tspan></text>'
        '<text class="small" x="{}" y="{}">experiment {}: {}</text>'
    ).format(
        step.title, word.replace(" ", "-"), x, middle - 4, word, step.found,
        x, middle + 13, step.experiment_id, cut(step.title or "", _TITLE),
    )  # fmt: skip
    if page is None:
        return line + Markup("<g>{}</g>").format(label)

    return line + Markup('<a href="{}{}">{}</a>').format(page, step.experiment_id, label)


def _box(spot: Placed) -> Markup:
    step, x, y = spot.step, spot.x, spot.y
    return Markup(
        '<g class="{}"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}" rx="7"/>'
        '<text x="{}" y="{}">{}</text><text class="small" x="{}" y="{}">{}</text></g>'
    ).format(
        "best" if spot.best else "config", step.changes, x, y, BOX, HEIGHT,
        x + 10, y + 18, cut(step.changes, _CHANGES), x + 10, y + 35, step.expected,
    )  # fmt: skip
