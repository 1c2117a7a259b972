"""Do short runs foretell long ones? What the lab's own experiments say, in its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from agents.foretelling import FEWEST, rank_correlation
from db.foretelling import Foretold
from db.formats import part
from db.reporting import ReportedLab
from db.scatter import Spot, draw_scatter
from server.report.document import Block, Heading, Paragraph, Picture, Table

SHOWN = 0.25
"""Part of the budget that is drawn, or the one nearest to it."""


def foretelling(found: ReportedLab) -> Iterator[Block]:
    """How early effects rank experiments, against the effects at the whole budget."""
    if not found.foretold:
        return

    rows = sorted(_of_one_kind(found.foretold), key=_kind)
    groups = [list(some) for _, some in groupby(rows, key=_kind)]
    yield Heading(text="Do short runs foretell long ones?")
    most = max(map(len, groups))
    if most < FEWEST:
        experiments = "experiment has" if most == 1 else "experiments have"
        yield Paragraph(
            text=f"Not known yet: {most} {experiments} an effect early and at the end of the whole budget, and a rank "
            f"correlation of fewer than {FEWEST} says nothing."
        )
        return

    yield Paragraph(text=_explained(rows))
    yield Table(
        columns=("early effect", "experiments", "rank correlation", "95 % interval"),
        rows=[_row(some) for some in groups],
        numbers=3,
    )
    large = [some for some in groups if len(some) >= FEWEST]
    drawn = min(large, key=lambda some: (some[0].how != "rung", abs(some[0].part - SHOWN)))
    metric, early = drawn[0].metric, _early(drawn[0])
    spots = [
        Spot(label=f"{row.experiment_id} {row.title}", across=row.early, up=row.whole, word=row.word) for row in drawn
    ]
    picture = draw_scatter(spots, f"{metric} {early}", f"{metric} at the whole budget")
    if picture is not None:
        yield Picture(
            name="foretelling",
            svg=picture,
            caption=f"Treatment less baseline, one spot an experiment: {early}, and at the end of the whole budget. "
            "Spots at an edge lie beyond it.",
        )


def _of_one_kind(rows: Sequence[Foretold]) -> list[Foretold]:
    """Those of the preset, card and metric that most experiments have: scales of others are not comparable."""
    kinds = Counter(kind for kind, _ in {(_scale(row), row.experiment_id) for row in rows})
    [(kind, _)] = kinds.most_common(1)
    return [row for row in rows if _scale(row) == kind]


def _scale(row: Foretold) -> tuple[str, str, str]:
    return row.preset, row.hardware_class, row.metric


def _kind(row: Foretold) -> tuple[bool, float]:
    return row.how != "rung", row.part


def _early(row: Foretold) -> str:
    size = part(row.part)
    return f"screened at {size} of the budget" if row.how == "rung" else f"when {size} of training was done"


def _row(some: Sequence[Foretold]) -> tuple[str, ...]:
    found = rank_correlation([(row.early, row.whole) for row in some])
    cells = ("–", "–") if found is None else (f"{found.value:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}")
    return _early(some[0]), str(len(some)), *(cell.replace("-", "−") for cell in cells)


def _explained(rows: Sequence[Foretold]) -> str:
    first = rows[0]
    text = (
        f"Spearman's correlation between the effect on {first.metric} early and at the end of the whole budget, over "
        f"experiments on preset {first.preset} on {first.hardware_class}; the interval is a bootstrap over them. "
        "Chance in the effects lowers it."
    )
    if any(row.how == "rung" for row in rows):
        text += (
            " Of what was screened short only what was promising was confirmed, or what somebody asked for: the rest "
            "of the range is missing, so this is the correlation among those, not among all ideas."
        )

    if any(row.how == "curve" for row in rows):
        text += (
            " Along a curve both effects are of the same runs, so that they share their chance, and learning rates "
            "have not come down yet."
        )

    return text
