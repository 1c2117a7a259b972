"""The pictures of a report as PNG, since chat clients show no SVG. matplotlib is the optional extra `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from db.draw import Effect, common_reach, widest
from db.errors import RefusedError
from db.formats import cut
from db.lineage import BOX, HEIGHT, INDENT, Step, layout, size
from db.reporting import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BYTES = 200_000
"""Of one PNG: chat clients refuse or shrink what is larger."""

_COLOURS = {
    "improved": "#12805c",
    "worse": "#b93a32",
    "equivalent": "#586079",
    "pair": "#8b90a5",
    "expected": "#4f5be0",
    "baseline": "#8b90a5",
    "treatment": "#4f5be0",
    "invalid": "#7a3fa0",
    "improved but not causal": "#7a3fa0",
}
_OPEN = "#8f6207"


class PlotsUnavailableError(RefusedError):
    """matplotlib is not installed."""


def plot_forest(rows: Sequence[Effect], title: str, path: Path) -> None:
    """Effects with their intervals, the noise floor shaded.

    Raises:
        PlotsUnavailableError: matplotlib is not installed.
    """
    figure = _figure(9.0, 1.1 + 0.3 * len(rows))
    axes = figure.add_subplot()
    reach = 1.08 * common_reach([widest(row.effect, row.low, row.high, row.floor) for row in rows])
    for place, row in enumerate(rows):
        colour = _COLOURS.get(row.word, _OPEN)
        if row.floor:
            axes.barh(place, 2 * row.floor, left=-row.floor, height=1.0, color="#e3e6f3", zorder=0)

        if row.low is not None or row.high is not None:
            ends = (-reach if row.low is None else row.low, reach if row.high is None else row.high)
            axes.hlines(place, max(ends[0], -reach), min(ends[1], reach), color=colour, linewidth=2)

        mark = "o" if abs(row.effect) <= reach else ">" if row.effect > 0 else "<"
        axes.plot(max(-reach, min(row.effect, reach)), place, mark, color=colour, clip_on=False)

    axes.axvline(0.0, color="#61677c", linewidth=0.8, linestyle=":")
    axes.set_xlim(-reach, reach)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [cut(row.label, 44) for row in rows], fontsize=8)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), [row.text for row in rows], fontsize=8)
    axes.set_xlabel(title, fontsize=9)
    _finish(figure, path)


def plot_curves(curves: Sequence[Curves], path: Path) -> None:
    """Each metric over training: thin a line a seed, thick the mean.

    Raises:
        PlotsUnavailableError: matplotlib is not installed.
    """
    figure = _figure(9.0, 3.4)
    for place, item in enumerate(curves, start=1):
        axes = figure.add_subplot(1, len(curves), place)
        late: list[float] = []
        for arm, lines in item.seeds.items():
            for points, width in [*((line, 0.5) for line in lines), (item.mean[arm], 1.8)]:
                known = [(point.step / 10.0, point.value) for point in points if point.value is not None]
                label = arm if width > 1.0 else None
                axes.plot(
                    *zip(*known, strict=True) if known else ((), ()), color=_COLOURS[arm], linewidth=width, label=label
                )
                late += [value for percent, value in known if percent >= 10.0]

        if late and max(late) > min(late):  # the first steps fall steeply and would flatten the rest
            axes.set_ylim(min(late) - 0.03 * (max(late) - min(late)), max(late) + 0.03 * (max(late) - min(late)))

        axes.set_title(item.metric, fontsize=9)
        axes.set_xlabel("% of training", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)

    _finish(figure, path)


def plot_lineage(steps: Sequence[Step], path: Path) -> None:
    """The tree of champions, as db/lineage.py draws it.

    Raises:
        PlotsUnavailableError: matplotlib is not installed.
    """
    placed = layout(steps)
    width, height = size(placed)
    figure = _figure(9.0, 9.0 * height / width)
    axes = figure.add_subplot()
    axes.set_xlim(-6.0, width)
    axes.set_ylim(height, -4.0)
    axes.set_axis_off()
    for spot in placed:
        step, x, y = spot.step, spot.x, spot.y
        right, low, middle = x + BOX, y + HEIGHT, y + HEIGHT / 2
        edge, line = ("#12805c", 1.6) if spot.best else ("#c5c8d8", 0.8)
        axes.plot([x, right, right, x, x], [y, y, low, low, y], color=edge, linewidth=line)
        _write(axes, x + 10, y + 13, cut(step.changes, 46), "#1d2030", 8.0)
        _write(axes, x + 10, y + 31, step.expected, "#61677c", 7.0)
        if spot.parent is not None:
            down = spot.parent.x + INDENT / 2
            axes.plot([down, down, x], [spot.parent.y + HEIGHT, middle, middle], color="#61677c", linewidth=0.8)
            word = step.verdict or "no verdict"
            _write(axes, right + 14, middle - 9, f"{word} {step.found}", _COLOURS.get(word, _OPEN), 8.0)
            _write(
                axes, right + 14, middle + 9, cut(f"experiment {step.experiment_id}: {step.title}", 56), "#61677c", 7.0
            )

    _finish(figure, path)


def _write(axes: Axes, x: float, y: float, text: str, colour: str, size: float) -> None:
    # parse_math: a title may hold dollar signs
    axes.text(x, y, text, color=colour, fontsize=size, verticalalignment="center", parse_math=False)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure  # takes a second to load, and is an extra
    except ImportError:
        raise PlotsUnavailableError(
            "PNG plots need matplotlib: pip install 'blueberry-lab[report]'; HTML and Markdown have theirs without"
        ) from None

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)

    for dpi in (110, 80, 50):
        figure.savefig(path, dpi=dpi)
        if path.stat().st_size <= MOST_BYTES:
            return

    path.unlink()
    raise RefusedError(f"{path.name} would be over {MOST_BYTES // 1000} kB; the HTML holds the same picture")
