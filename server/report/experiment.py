"""The report of one experiment."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from agents.pairs import configs_of
from db import formats
from db.clock import utc_now
from db.comparisons import Pair, score_of
from db.draw import Effect, Series, draw_curves, draw_forest
from db.formats import count, duration, part, plain
from db.records import Experiment, Run, Verdict
from db.reporting import Reported
from moe.config import KNOBS
from server.report.document import Block, Document, Finding, Heading, Paragraph, Picture, Table
from server.report.methods import METHODS, baseline_of, error_control, made_with, tokens_of
from server.report.numbers import (
    cost,
    degrees,
    difference,
    e_value,
    effect_of,
    guard_deviation,
    guard_span,
    level,
    plainly,
    span,
)


def experiment_document(found: Reported) -> Document:
    """All that there is to say of one experiment."""
    experiment = found.experiment
    blocks = [*_question(experiment), *_finding(found)]
    if found.verdict is not None:
        blocks += [*_evidence(found, found.verdict), *_sides(found, found.verdict)]

    blocks += [*_curves(found), *_pairs(found), *_lost(found), *_method(found)]
    return Document(
        title=experiment.title,
        above=f"Experiment {experiment.id} · written {utc_now()[:16].replace('T', ' ')} UTC",
        blocks=blocks,
    )


def effects(found: Reported) -> list[Effect]:
    """The forest of one experiment: each pair, the effect of all of them, and the one to expect."""
    verdict = found.verdict
    if verdict is None or verdict.effect is None:
        return []

    rows = [
        Effect(
            label=f"seed {pair.seed} ({_stage(found, pair)})",
            effect=gap,
            floor=verdict.margin,
            word="pair",
            text=difference(verdict, gap),
        )
        for pair in found.alike
        if (gap := pair.difference(verdict.metric)) is not None
    ]
    pooled = effect_of(verdict, f"all {verdict.pairs} pairs of the {_STAGES[verdict.stage or 'screen']}")
    rows += [pooled] if pooled else []
    if verdict.expected is not None:
        expected = difference(verdict, verdict.expected)
        label = "the true effect to expect"
        rows.append(Effect(label=label, effect=verdict.expected, floor=verdict.margin, word="expected", text=expected))

    return rows


_STAGES = {"screen": "screening", "confirm": "confirmation"}


def _question(experiment: Experiment) -> Iterator[Block]:
    yield Paragraph(text=experiment.hypothesis)
    where = f" from {experiment.source}" if experiment.source else ""
    yield Paragraph(text=f"Proposed by {experiment.proposer}{where}; {experiment.domain}.", quiet=True)


def _finding(found: Reported) -> Iterator[Block]:
    verdict, experiment = found.verdict, found.experiment
    if verdict is None:
        yield Finding(word=experiment.status.replace("_", " "), sentence=experiment.reason or "No verdict yet.")
        return

    yield Finding(word=verdict.said, sentence=verdict.sentence)
    if not verdict.final:
        yield Paragraph(text="It is not decided yet: more pairs are to come.", quiet=True)


def _evidence(found: Reported, verdict: Verdict) -> Iterator[Block]:
    picture = draw_forest(effects(found))
    if picture is not None:
        better = "left" if found.experiment.direction == "lower" else "right"
        yield Picture(
            name="forest",
            svg=picture,
            caption=f"Treatment less baseline, in {verdict.metric}, with a 95 % interval; better is {better}. "
            "Shaded: one noise floor.",
        )

    rows = [
        ("effect observed, with its interval", span(verdict)),
        ("effect to expect (shrunk)", difference(verdict, verdict.expected)),
        ("pairs", str(verdict.pairs)),
        ("noise floor (deviation of single runs over seeds)", level(verdict, verdict.margin)),
        ("degrees of freedom it is known from", degrees(verdict.noise_df)),
    ]
    if found.hypothesis is not None:
        item = found.hypothesis
        rows += [
            ("registered as hypothesis", f"{found.position} of campaign {item.campaign}"),
            (
                "e-value that it is better, of what it needs",
                f"{e_value(item.improved)} of {e_value(verdict.needed)}",
            ),
            ("e-value that it is worse", e_value(item.worse)),
            ("e-value that it is equivalent", e_value(item.equivalent)),
            ("claimed in the campaign; over the lab's life", f"{item.claim or 'no'}; {item.lab_claim or 'no'}"),
        ]

    if verdict.guard_effect is not None:
        margin = f"{found.experiment.guard_metric}, margin {found.experiment.guard_margin or 0.0:g}"
        rows.append((f"guard: {margin}", guard_span(verdict)))

    yield Table(columns=("evidence", verdict.metric), rows=rows, numbers=1)


def _sides(found: Reported, verdict: Verdict) -> Iterator[Block]:
    experiment = found.experiment
    yield Heading(text="What was compared")
    yield Table(
        columns=("knob", "acts on", "source", "baseline", "treatment"),
        rows=[
            (
                knob,
                KNOBS[knob].acts_on if knob in KNOBS else "–",
                KNOBS[knob].source if knob in KNOBS else "no longer a knob",
                plain(experiment.baseline.get(knob)),
                plain(value),
            )
            for knob, value in experiment.treatment.items()
        ],
        numbers=2,
    )
    sides = {"baseline": [pair.baseline for pair in found.alike], "treatment": [pair.treatment for pair in found.alike]}
    planned = [tokens_of(config.model_dump()) for config in configs_of(experiment)]  # of post runs, which train nothing
    yield Table(
        columns=(
            f"each run of the {_STAGES[verdict.stage or 'screen']}",
            f"mean {verdict.metric}",
            "parameters",
            "active",
            "FLOPs",
            "training",
            "tokens",
        ),
        rows=[
            (
                side,
                level(verdict, getattr(verdict, f"{side}_mean")),
                count(getattr(verdict, f"{side}_parameters")),
                count(getattr(verdict, f"{side}_active_parameters")),
                count(getattr(verdict, f"{side}_flops")),
                duration(getattr(verdict, f"{side}_seconds")),
                tokens if (mean := _mean(runs, "train_tokens")) is None else count(mean),
            )
            for (side, runs), tokens in zip(sides.items(), planned, strict=True)
        ],
        numbers=6,
    )
    equal = "equal training FLOPs" if experiment.equal_flops else "equal budget"
    yield Paragraph(text=f"All else is {baseline_of(experiment)}, on both sides; {equal}. {experiment.method}")


def _curves(found: Reported) -> Iterator[Block]:
    key = "thin each seed, thick the mean; grey baseline, blue treatment"
    for item in found.curves:
        lines = [Series(name=f"{arm} seed", points=line) for arm, each in item.seeds.items() for line in each]
        lines += [Series(name=arm, points=points) for arm, points in item.mean.items() if points]
        picture = draw_curves(item.metric, lines, last_label="end of training")
        if picture is not None:
            yield Picture(
                name=f"curve-{item.metric}",
                svg=picture,
                caption=f"{item.metric} during training: {key}." + (f" {item.note}." if item.note else ""),
            )


def _pairs(found: Reported) -> Iterator[Block]:
    if not found.pairs:
        return

    experiment, verdict = found.experiment, found.verdict
    compared = [(experiment.metric, verdict.noise if verdict else None)]
    if experiment.guard_metric is not None:
        compared.append((experiment.guard_metric, guard_deviation(verdict) if verdict else None))

    yield Heading(text="Every pair")
    yield Table(
        columns=(
            *("seed", "stage", "remarks"),
            *(name for metric, _ in compared for name in (f"baseline {metric}", "treatment", "difference")),
        ),
        rows=[
            (
                str(pair.seed),
                _stage(found, pair),
                _remarks(pair),
                *(text for metric, noise in compared for text in _scores(pair, metric, noise)),
            )
            for pair in found.pairs
        ],
        numbers=3 * len(compared),
    )


def _scores(pair: Pair, metric: str, noise: float | None) -> tuple[str, ...]:
    both = (plainly(score_of(run, metric), noise) for run in (pair.baseline, pair.treatment))
    return *both, formats.difference(pair.difference(metric), noise)


def _lost(found: Reported) -> Iterator[Block]:
    lost = [run for run in found.runs if run.status in ("pruned", "failed", "cancelled")]
    problems = [run for run in found.probes if run.status == "failed" or run.passed is False]
    if lost or problems:
        yield Heading(text="What did not complete")
        yield Table(
            columns=("run", "kind", "status", "why"),
            rows=[(f"{run.id}, seed {run.seed}", run.kind, run.status, run.error or "–") for run in [*lost, *problems]],
        )


def _method(found: Reported) -> Iterator[Block]:
    yield Heading(text="How it was done")
    yield Paragraph(text=METHODS)
    yield error_control(found.families)
    yield Paragraph(text=f"It cost {cost(found.cost)}; runs shared with other experiments count in full.")
    yield made_with(found.runs, configs_of(found.experiment)[0])
    yield Paragraph(text=f"To repeat it: blueberry reproduce {found.experiment.id}", quiet=True)


def _stage(found: Reported, pair: Pair) -> str:
    share = found.experiment.share_in(pair.stage)
    return _STAGES[pair.stage] if share == 1.0 else f"{_STAGES[pair.stage]} at {part(share)} of the budget"


def _mean(runs: list[Run | None], name: str) -> float | None:
    values = [value for run in runs if (value := score_of(run, name)) is not None]
    return fmean(values) if values else None


def _remarks(pair: Pair) -> str:
    sides = (("baseline", pair.baseline), ("treatment", pair.treatment))
    said = [f"{side} {run.status}" for side, run in sides if run and run.status != "completed"]
    said += [f"{side}: {run.disturbance}" for side, run in sides if run and run.disturbance]
    said += [f"no {side}" for side, run in sides if run is None]
    return "; ".join(said)
