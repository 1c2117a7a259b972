"""The report of a whole lab: what was found, what was tried, and what it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from db.clock import utc_now
from db.draw import Effect, draw_forest
from db.formats import plain
from db.reporting import Line, ReportedLab
from moe.config import KNOBS
from server.report.champions import champions
from server.report.document import Block, Document, Finding, Heading, Paragraph, Picture, Table
from server.report.foretelling import foretelling
from server.report.methods import METHODS, baseline_of, baselines, error_control, versions
from server.report.numbers import cost, difference, e_value, effect_of, level, span

IN_A_FOREST = 40
"""Lines that one can still take in; the table has all."""


def lab_document(found: ReportedLab) -> Document:
    """All that there is to say of a lab."""
    blocks = [
        *_findings(found),
        *_forests(found),
        *champions(found),
        *_table(found),
        *foretelling(found),
        *_unclaimed(found),
        *_ended(found),
        *_method(found),
    ]
    return Document(
        title="What this lab has found",
        above=f"Blueberry · written {utc_now()[:16].replace('T', ' ')} UTC",
        blocks=blocks,
    )


@dataclass(frozen=True, kw_only=True)
class Forest:
    """Effects on one metric against one baseline, best first: what may be compared with each other."""

    name: str
    metric: str
    baseline: str
    rows: list[Effect]


def forests(found: ReportedLab) -> list[Forest]:
    """The effects by metric and baseline; those of shorter screenings are no effects on the same scale."""
    drawn = []
    for number, ((metric, baseline), lines) in enumerate(_groups(found.lines).items(), start=1):
        rows = [
            row
            for line in lines
            if line.verdict.share == 1.0
            and (row := effect_of(line.verdict, f"{line.experiment.id} {line.experiment.title}")) is not None
        ]
        best_first = sorted(rows, key=attrgetter("effect"), reverse=lines[0].experiment.direction == "higher")
        if rows:
            drawn.append(
                Forest(name=f"forest-{number}", metric=metric, baseline=baseline, rows=best_first[:IN_A_FOREST])
            )

    return drawn


def _groups(lines: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in sorted(lines, key=_place):
        groups.setdefault((line.verdict.metric, baseline_of(line.experiment)), []).append(line)

    return groups


def summary(found: ReportedLab) -> str:
    """What there is, in a sentence."""
    words: dict[str, int] = {}
    for line in found.lines:
        words[line.verdict.said] = words.get(line.verdict.said, 0) + 1

    if not words:
        return "No experiment has a verdict yet."

    counted = ", ".join(f"{count} {word}" for word, count in words.items())
    shown = f"; shown are {len(found.lines)}" if found.total > len(found.lines) else ""
    return f"{found.total} experiment{'s' if found.total != 1 else ''} with a verdict{shown}: {counted}."


def _findings(found: ReportedLab) -> Iterator[Block]:
    yield Paragraph(text=summary(found))
    yield error_control(found.families)
    for line in sorted(found.lines, key=_place):
        if line.verdict.verdict in ("improved", "improved but not causal"):
            compared = f" (experiment {line.experiment.id}; compared with {baseline_of(line.experiment)})"
            yield Finding(word=line.verdict.said, sentence=line.verdict.sentence + compared)

    if left := _left(found):
        yield Paragraph(text=left)


def _left(found: ReportedLab) -> str | None:
    """What a screening saw as a gain and did not confirm, because that would take too many pairs or was left out."""
    keys = [
        line.experiment.id
        for line in found.lines
        if line.verdict.stage == "screen" and line.verdict.said == "not promising" and _better(line)
    ]
    if not keys:
        return None

    several = "experiments" if len(keys) > 1 else "experiment"
    return (
        "Seen as better by the whole interval of the screening, and not confirmed (each verdict says why, such as that "
        f"it takes more than max_pairs): {several} {', '.join(map(str, sorted(keys)))}. That claims nothing; "
        "`blueberry enqueue --confirm ID` has one confirmed."
    )


def _better(line: Line) -> bool:
    low, high = line.verdict.low, line.verdict.high
    return (high is not None and high < 0.0) if line.experiment.direction == "lower" else bool(low and low > 0.0)


def _forests(found: ReportedLab) -> Iterator[Block]:
    for forest in forests(found):
        picture = draw_forest(forest.rows)
        if picture is not None:
            yield Picture(
                name=forest.name,
                svg=picture,
                caption=f"Treatment less baseline ({forest.baseline}), in {forest.metric}, best first, with 95 % "
                "intervals. Shaded: one noise floor.",
            )


def _table(found: ReportedLab) -> Iterator[Block]:
    if not found.lines:
        return

    yield Heading(text="All experiments with a verdict")
    groups = _groups(found.lines)
    for (metric, baseline), lines in groups.items():
        if len(groups) > 1:
            yield Paragraph(text=f"{metric}, compared with {baseline}:")

        yield Table(
            columns=("#", "experiment", "change", "verdict", metric, "expected", "floor", "pairs", "e-value"),
            rows=[_row(line) for line in lines],
            numbers=5,
        )

    yield Paragraph(
        text="Effects are treatment less baseline, with 95 % intervals. Expected: the effect to expect in truth. "
        "Floor: the noise floor, the deviation of single runs over seeds, as it was known at the first look. E-value: "
        "of what was claimed, otherwise that it is better, of what that needs.",
        quiet=True,
    )
    knobs = dict.fromkeys(knob for line in found.lines for knob in line.experiment.treatment if knob in KNOBS)
    yield Heading(text="Where the ideas are from")
    yield Table(columns=("knob", "acts on", "source"), rows=[(k, KNOBS[k].acts_on, KNOBS[k].source) for k in knobs])
    sources = [(str(line.experiment.id), line.experiment.source) for line in found.lines if line.experiment.source]
    if sources:
        yield Table(columns=("#", "source of the idea"), rows=sources)


def _place(line: Line) -> tuple[int, float]:
    """Claims first, and of one word the largest gain."""
    words = ("improved", "improved but not causal", "worse", "equivalent", "promising", "no evidence yet")
    effect = line.verdict.effect or 0.0
    word = words.index(line.verdict.said) if line.verdict.said in words else len(words)
    return word, effect if line.experiment.direction == "lower" else -effect


def _row(line: Line) -> tuple[str, ...]:
    experiment, verdict, hypothesis = line.experiment, line.verdict, line.hypothesis
    evidence = "–"
    if hypothesis is not None and hypothesis.claim is not None:
        evidence = e_value(getattr(hypothesis, hypothesis.claim))
    elif hypothesis is not None:
        looked = verdict.needed is not None
        evidence = f"{e_value(hypothesis.improved)} of {e_value(verdict.needed)}" if looked else "not looked at yet"

    return (
        str(experiment.id),
        experiment.title,
        ", ".join(f"{k} {plain(experiment.baseline.get(k))} → {plain(v)}" for k, v in experiment.treatment.items()),
        verdict.said if verdict.effect is not None else f"{verdict.said}: {verdict.reason}",
        span(verdict),
        difference(verdict, verdict.expected),
        level(verdict, verdict.margin),
        str(verdict.pairs),
        evidence,
    )


def _unclaimed(found: ReportedLab) -> Iterator[Block]:
    yield Heading(text="Registered and not claimed")
    if not found.unclaimed:
        yield Paragraph(text="None: whatever was registered has been claimed, or nothing was registered.")
        return

    yield Table(
        columns=("#", "experiment", "campaign", "pairs", "better", "worse", "equivalent"),
        rows=[
            (
                str(item.experiment_id),
                title,
                item.campaign,
                str(len(item.seeds)),
                e_value(item.improved),
                e_value(item.worse),
                e_value(item.equivalent),
            )
            for item, title in found.unclaimed
        ],
        numbers=4,
    )


def _ended(found: ReportedLab) -> Iterator[Block]:
    if found.ended:
        yield Heading(text="Runs that were pruned or failed")
        yield Table(
            columns=("run", "status", "seed", "of experiment", "why"),
            rows=[
                (str(run.run_id), run.status, str(run.seed), run.experiments, run.error or "–") for run in found.ended
            ],
        )


def _method(found: ReportedLab) -> Iterator[Block]:
    yield Heading(text="How it was done")
    yield Paragraph(text=METHODS)
    runs = ", ".join(f"{count} {status}" for status, count in found.runs.items()) or "none"
    yield Paragraph(text=f"Runs: {runs}. The lab has cost {cost(found.cost)}.")
    if found.lines:
        yield baselines(found.lines)

    yield from versions(found)
    if found.lines:
        seeds = sorted((line.experiment.id, ", ".join(map(str, line.verdict.seeds))) for line in found.lines)
        yield Table(
            columns=("#", "seeds of the pairs that the verdict rests on"), rows=[(str(key), of) for key, of in seeds]
        )
        yield Paragraph(text="Every pair with both of its scores: blueberry report ID.", quiet=True)
