"""What an experiment's effect looked like early, beside what it was in the end: on a rung, and along its curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Literal

from db.comparisons import Pair, pairs
from db.curves import completed_curve
from db.records import Experiment
from db.store import Store

NEWEST = 200
"""Experiments with runs at the whole budget that are looked at."""

CURVE_METRIC = "val_bpb"

Curve = Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """One experiment: the mean difference treatment - baseline early, and at the end of the whole budget.

    how: rung, complete runs on a `part` of the budget; curve, the same runs when that part was done.
    """

    experiment_id: int
    title: str
    preset: str
    hardware_class: str
    metric: str
    word: str
    how: Literal["rung", "curve"]
    part: float
    early: float
    whole: float


def read_foretold(store: Store) -> list[Foretold]:
    """Every early effect of the newest experiments whose effect at the whole budget is known, one row a part."""
    rows = store.rows(
        """
        SELECT experiments.*, current_verdicts.said FROM current_verdicts
        JOIN experiments ON experiments.id = current_verdicts.experiment_id
        WHERE current_verdicts.verdict != 'invalid' AND (
            coalesce(experiments.screen_share, 1.0) = 1.0
            OR EXISTS (SELECT 1 FROM hypotheses WHERE hypotheses.experiment_id = experiments.id))
        ORDER BY current_verdicts.id DESC LIMIT ?
        """,
        (NEWEST,),
    )

    @cache
    def curve_of(run_id: int) -> Curve:  # baselines are shared
        return completed_curve(store, run_id)

    return [item for row in rows for item in _of(store, row["said"], Experiment.of(row), curve_of)]


def _of(store: Store, word: str, experiment: Experiment, curve_of: Callable[[int], Curve]) -> Iterator[Foretold]:
    found = [pair for pair in pairs(store, experiment.id) if pair.difference(experiment.metric) is not None]
    whole = [pair for pair in found if experiment.share_in(pair.stage) == 1.0]
    short = [pair for pair in found if experiment.share_in(pair.stage) < 1.0]
    if not whole:
        return

    def row(how: Literal["rung", "curve"], part: float, early: float, end: float) -> Foretold:
        return Foretold(
            experiment_id=experiment.id,
            title=experiment.title,
            preset=experiment.preset,
            hardware_class=experiment.hardware_class or "",
            metric=experiment.metric,
            word=word,
            how=how,
            part=part,
            early=early,
            whole=end,
        )

    if short:
        early, end = (_mean(some, experiment.metric) for some in (short, whole))
        yield row("rung", experiment.share_in("screen"), early, end)

    if experiment.metric == CURVE_METRIC:
        curves = [(pair, gaps) for pair in whole if (gaps := _gaps(pair, curve_of))]
        if curves and len({len(gaps) for _, gaps in curves}) == 1:
            end = _mean([pair for pair, _ in curves], CURVE_METRIC)
            points = len(curves[0][1])
            for k, column in enumerate(zip(*(gaps for _, gaps in curves), strict=True), start=1):
                if k < points:
                    yield row("curve", k / points, fmean(column), end)


def _gaps(pair: Pair, curve_of: Callable[[int], Curve]) -> list[float]:
    """The pair's difference at each point of both curves; empty where one of them does not tell."""
    sides = [run for run in (pair.baseline, pair.treatment) if run is not None and run.kind == "train"]
    curves = [curve_of(run.id) for run in sides]
    if len(curves) != 2 or len(curves[0]) != len(curves[1]):
        return []

    known = [(base, treated) for base, treated in zip(*curves, strict=True) if base is not None and treated is not None]
    return [treated - base for base, treated in known] if len(known) == len(curves[0]) else []


def _mean(found: Sequence[Pair], metric: str) -> float:
    return fmean(gap for pair in found if (gap := pair.difference(metric)) is not None)
