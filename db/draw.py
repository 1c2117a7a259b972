"""Pictures as inline SVG: curves of runs, effects with their intervals. Colours are in pictures.css."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from markupsafe import Markup

from db.formats import count, cut
from db.queries import CurvePoint

STYLES = Path(__file__).with_name("pictures.css")
"""What every page and file that shows these pictures has to contain."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 300, 120, 40, 16, 6


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a picture; the words of `name` are also its CSS classes: baseline, treatment, run, seed."""

    name: str
    points: Sequence[CurvePoint]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One line of a forest plot. `floor` is the noise floor around zero, `text` the numbers at its right."""

    label: str
    effect: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    word: str
    text: str = ""


def draw_curves(metric: str, series: Sequence[Series], *, last_label: str | None = None) -> Markup | None:
    """A metric over steps, a line a series; None when nothing has been measured. Gaps are non-finite values.

    Args:
        last_label: what is written below the last step, instead of its number.
    """
    measured = [point for line in series for point in line.points if point.value is not None]
    if not measured:
        return None

    last = max(point.step for point in measured) or 1
    # The first steps fall steeply and would flatten the rest: the scale fits what comes after them.
    scaled = [point.value for point in measured if point.step >= last / 10 and point.value is not None]
    low, high = min(scaled), max(scaled)
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)

    at_the_end = last_label or f"step {last}"

    def place(point: CurvePoint) -> tuple[float, float]:
        assert point.value is not None
        x = _LEFT + (_WIDTH - _LEFT - 6) * point.step / last
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - point.value) / (high - low)
        return x, max(-9.0 * _HEIGHT, min(y, 9.0 * _HEIGHT))

    parts = [
        Markup('<svg class="curves" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            _WIDTH, _HEIGHT, f"{metric} over steps"
        ),
        Markup('<path class="axis" d="M{0} {1}V{2}H{3}"/>').format(_LEFT, _TOP, _HEIGHT - _BOTTOM, _WIDTH - 6),
        Markup('<text x="{}" y="{}" class="tick end">{}</text>').format(_LEFT - 5, _TOP + 8, _tick(high)),
        Markup('<text x="{}" y="{}" class="tick end">{}</text>').format(_LEFT - 5, _HEIGHT - _BOTTOM, _tick(low)),
        Markup('<text x="{}" y="{}" class="tick end">{}</text>').format(_WIDTH - 6, _HEIGHT - 3, at_the_end),
        Markup('<text x="{}" y="{}" class="tick">{}</text>').format(_LEFT, _HEIGHT - 3, metric),
        Markup('<svg width="{}" height="{}" overflow="hidden">').format(_WIDTH, _HEIGHT - _BOTTOM + 3),
    ]
    for line in series:
        known = [place(point) if point.value is not None else None for point in line.points]
        path = _path(known)
        if path:
            parts.append(
                Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(line.name, path, line.name)
            )

        if sum(spot is not None for spot in known) < 12:
            parts += [
                Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(line.name, *spot)
                for spot in known
                if spot is not None
            ]

    return Markup("").join([*parts, Markup("</svg></svg>")])


def draw_interval(
    effect: float | None, low: float | None, high: float | None, *, reach: float, word: str, text: str, width: int = 180
) -> Markup | None:
    """An effect and its interval around zero, on a scale from -reach to +reach; `text` says it in numbers."""
    if effect is None or reach <= 0.0:
        return None

    def place(value: float) -> float:
        return width / 2 + max(-1.0, min(value / reach, 1.0)) * (width / 2 - 8)

    kind = word.replace(" ", "-")
    bar = Markup("")
    if low is not None and high is not None:
        bar = Markup('<path class="bar" d="M{:.1f} 12H{:.1f}M{:.1f} 7V17M{:.1f} 7V17"/>').format(
            place(low), place(high), place(low), place(high)
        )

    return Markup(
        '<svg class="interval interval-{}" viewBox="0 0 {} 24" width="{}" height="24" role="img" aria-label="{}">'
        '<path class="zero" d="M{} 1V23"/>{}{}</svg>'
    ).format(kind, width, width, f"effect {text}", width / 2, bar, _mark(place(effect), effect / reach))


def common_reach(widths: Sequence[float]) -> float:
    """Half the width of a scale for all effects. One diverged treatment must not flatten the others: beyond eight times
    the middle one, the scale is cut."""
    positive = [width for width in widths if width > 0.0]
    return min(max(positive), 8.0 * median(positive)) if positive else 0.0


def widest(*values: float | None) -> float:
    """The largest distance from zero."""
    return max((abs(value) for value in values if value is not None), default=0.0)


def draw_forest(rows: Sequence[Effect]) -> Markup | None:
    """Effects below each other on one scale, each with its interval and, shaded, its noise floor; None without any."""
    reach = 1.08 * common_reach([widest(row.effect, row.low, row.high, row.floor) for row in rows])
    if reach <= 0.0:
        return None

    labels, plot, texts, line, axis = 250, 330, 190, 26, 24
    width, height = labels + plot + texts, line * len(rows) + axis
    middle = labels + plot / 2

    def place(value: float) -> float:
        return middle + max(-1.0, min(value / reach, 1.0)) * (plot / 2 - 12)

    parts = [Markup('<svg class="forest" viewBox="0 0 {} {}" role="img" aria-label="effects">').format(width, height)]
    for number, row in enumerate(rows):
        y = line * number + line / 2
        kind = row.word.replace(" ", "-")
        if row.floor:
            left, right = place(-row.floor), place(row.floor)
            parts.append(
                Markup('<rect class="floor" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}"/>').format(
                    left, y - line / 2, right - left, line
                )
            )

        bar = Markup("")
        if row.low is not None or row.high is not None:  # an end that is not there is infinitely far
            low, high = (place(-reach if row.low is None else row.low), place(reach if row.high is None else row.high))
            bar = Markup('<path class="bar" d="M{:.1f} 0H{:.1f}"/>').format(low, high)

        parts.append(
            Markup(
                '<g class="interval-{}" transform="translate(0 {:.1f})"><title>{}</title>'
                '<text x="0" y="4">{}</text>{}{}<text class="end" x="{}" y="4">{}</text></g>'
            ).format(
                kind,
                y,
                f"{row.label}: effect {row.text}",
                cut(row.label, 37),
                bar,
                _mark(place(row.effect), row.effect / reach, 0.0),
                width,
                row.text,
            )
        )

    bottom = line * len(rows)
    parts.append(Markup('<path class="zero" d="M{0:.1f} 0V{1}"/>').format(middle, bottom))
    for value in (-reach / 1.08, 0.0, reach / 1.08):
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}">{}</text>').format(
                place(value), bottom + 16, f"{value:+.2g}".replace("-", "−") if value else "0"
            )
        )

    return Markup("").join([*parts, Markup("</svg>")])


def _tick(value: float) -> str:
    if abs(value) >= 1000:
        return count(value)

    return f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.2g}"  # there is room for six characters


def _mark(x: float, share: float, y: float = 12.0) -> Markup:
    if abs(share) <= 1.0:
        return Markup('<circle cx="{:.1f}" cy="{:g}" r="4"/>').format(x, y)

    way = 1 if share > 0 else -1  # beyond the scale: an arrowhead points there
    return Markup('<path class="beyond" d="M{:.1f} {:g}l{} -5v10z"/>').format(x + 7 * way, y, -9 * way)


def _path(spots: Sequence[tuple[float, float] | None]) -> str:
    drawn, moving = [], True
    for spot in spots:
        if spot is None:
            moving = True
            continue

        drawn.append(f"{'M' if moving else 'L'}{spot[0]:.1f} {spot[1]:.1f}")
        moving = False

    return "".join(drawn)
