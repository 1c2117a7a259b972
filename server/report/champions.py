"""The champions in the report of a lab: how confirmed gains were stacked, and whether those tried together interact."""

from __future__ import annotations

from collections.abc import Iterator

from agents.wording import interaction
from db.champions import Combination
from db.lineage import Lineage, layout
from db.reporting import ReportedLab
from server.report.document import Block, Heading, Paragraph, Picture, Table
from server.report.numbers import span


def champions(found: ReportedLab) -> Iterator[Block]:
    """Each lineage as a tree and a table, and the interactions that were asked for; nothing before the first gain."""
    if not found.lineages:
        return

    yield Heading(text="Champions")
    yield Paragraph(
        text="A confirmed gain makes a new config of the one that it was measured against, and later questions build "
        "on the best. Gains of different experiments are never just added: one that was confirmed against an older "
        "config counts on top of the champion only once both were confirmed together."
    )
    for number, lineage in enumerate(found.lineages, start=1):
        yield from _lineage(lineage, number)

    if found.combinations:
        yield Heading(text="Interactions that were tested")
        yield Table(
            columns=("#", "gain of #", "on top of #", "verdict", "interaction", "alone", "on top"),
            rows=[_combination(item) for item in found.combinations],
            numbers=2,
        )
        yield Paragraph(
            text="The two interact where the interval of the effect on top lies wholly outside that of the effect "
            "alone. That they do not is never shown, only that there is no sign of it.",
            quiet=True,
        )


def _lineage(lineage: Lineage, number: int) -> Iterator[Block]:
    yield Picture(
        name=f"lineage-{number}",
        svg=lineage.draw(),
        caption=f"Preset {lineage.preset} on {lineage.hardware_class}. Each line is an experiment that confirmed a "
        "gain over the config above it, with the effect observed. Framed: the largest gain to expect.",
    )
    yield Table(
        columns=("champion", "grew from", "it changes", "experiment", "verdict", "effect", "gain to expect in all"),
        rows=[
            (
                f"{spot.step.id}{' (best)' if spot.best else ''}",
                "–" if spot.parent is None else str(spot.parent.step.id),
                spot.step.changes,
                "–" if spot.step.experiment_id is None else f"{spot.step.experiment_id} {spot.step.title}",
                spot.step.verdict or "–",
                spot.step.found,
                spot.step.in_all,
            )
            for spot in layout(lineage.steps)
        ],
        numbers=2,
    )


def _combination(item: Combination) -> tuple[str, ...]:
    verdict, alone = item.verdict, item.alone
    found = None
    if verdict is not None and verdict.stage == "confirm":
        found = interaction(alone, verdict.low, verdict.high)

    return (
        str(item.experiment.id),
        str(item.experiment.combines_id),
        str(item.champion_experiment_id),
        item.experiment.status.replace("_", " ") if verdict is None else verdict.said,
        found or "not known yet",
        "–" if alone is None else span(alone),
        "–" if verdict is None else span(verdict),
    )
