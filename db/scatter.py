"""Two numbers of each experiment against each other, as inline SVG. Colours are in pictures.css."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from db.draw import common_reach

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 380, 300, 52, 40, 10


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One experiment; `word` is what was said of it, and colours it."""

    label: str
    across: float
    up: float
    word: str


def draw_scatter(spots: Sequence[Spot], across: str, up: str) -> Markup | None:
    """Spots around zero on both axes, each axis with its scale and name; None where nothing differs from zero.

    What lies beyond a scale, since it would flatten the rest, is drawn at its edge.
    """
    reaches = [1.08 * common_reach([abs(value) for value in values]) for values in zip(*_places(spots), strict=True)]
    if not reaches or not all(reaches):
        return None

    right, bottom = _WIDTH - _EDGE, _HEIGHT - _BOTTOM
    middle = ((_LEFT + right) / 2, (_EDGE + bottom) / 2)

    def place(x: float, y: float) -> tuple[float, float]:
        shares = [max(-1.0, min(value / reach, 1.0)) for value, reach in zip((x, y), reaches, strict=True)]
        return middle[0] + shares[0] * (right - _LEFT) / 2, middle[1] - shares[1] * (bottom - _EDGE) / 2

    parts = [
        Markup('<svg class="scatter" viewBox="0 0 {} {}" role="img" aria-label="{} against {}">').format(
            _WIDTH, _HEIGHT, up, across
        ),
        Markup('<path class="axis" d="M{} {}V{}H{}"/>').format(_LEFT, _EDGE, bottom, right),
        Markup('<path class="zero" d="M{0:.1f} {1}V{2}M{3} {4:.1f}H{5}"/>').format(
            middle[0], _EDGE, bottom, _LEFT, middle[1], right
        ),
    ]
    for spot in spots:
        x, y = place(spot.across, spot.up)
        parts.append(
            Markup('<g class="interval-{}"><title>{}</title><circle cx="{:.1f}" cy="{:.1f}" r="4"/></g>').format(
                spot.word.replace(" ", "-"), f"{spot.label}: {spot.across:+.4f}, {spot.up:+.4f}", x, y
            )
        )

    for value in (-reaches[0] / 1.08, 0.0, reaches[0] / 1.08):
        parts.append(
            Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>').format(
                place(value, 0.0)[0], bottom + 14, _tick(value)
            )
        )

    for value in (-reaches[1] / 1.08, 0.0, reaches[1] / 1.08):
        parts.append(
            Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(
                _LEFT - 5, place(0.0, value)[1] + 3, _tick(value)
            )
        )

    parts.append(
        Markup('<text class="middle" x="{:.1f}" y="{}">{}</text>').format(middle[0], _HEIGHT - 8, across)
        + Markup('<text class="middle" transform="translate(11 {:.1f}) rotate(-90)">{}</text>').format(middle[1], up)
    )
    return Markup("").join([*parts, Markup("</svg>")])


def _places(spots: Sequence[Spot]) -> list[tuple[float, float]]:
    return [(spot.across, spot.up) for spot in spots]


def _tick(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−") if value else "0"
