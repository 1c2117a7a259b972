"""What a report says, read from the rows: one experiment with all its runs, or the whole lab.

Nothing is computed twice: effects, intervals and evidence are those of the stored verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from db.cards import experiment_kwh, lab_kwh
from db.champions import Combination, list_combinations
from db.comparisons import Pair, pairs
from db.curves import curve_note
from db.experiments import get_experiment, latest_verdict
from db.foretelling import Foretold, read_foretold
from db.hypotheses import get_hypothesis
from db.interactions import experiment_usd
from db.lineage import Lineage, read_lineages
from db.queries import CurvePoint, curve, experiment_seconds, probe_runs, tally
from db.records import Claim, Experiment, Hypothesis, Run, Verdict
from db.store import Store

MOST = 200
"""Experiments in the report of a lab; of a larger one, those that say most."""

CURVES = ("train_loss", "val_bpb")
_GRID = 60
_WHOLE = 1000
"""Steps of a curve are per mille of its run, so that runs with other batches lie above each other."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What was registered in a campaign, or in all of the lab's life, and what of it was claimed."""

    name: str
    registered: int
    claims: dict[Claim, int]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One metric of both arms: a line a seed, and the mean over seeds; `note` says where a score is something else."""

    metric: str
    note: str | None
    seeds: dict[str, list[list[CurvePoint]]]
    mean: dict[str, list[CurvePoint]]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Wall-clock seconds of all attempts, energy where it was measured, and what model calls cost."""

    seconds: float
    kwh: float | None
    usd: float


@dataclass(frozen=True, kw_only=True)
class Reported:
    """One experiment, whole."""

    experiment: Experiment
    verdict: Verdict | None
    hypothesis: Hypothesis | None
    position: int | None
    """its place among the hypotheses of its campaign"""
    pairs: list[Pair]
    alike: list[Pair]
    """those that trained for as long as the ones that the verdict rests on: lengths do not mix in a picture"""
    probes: list[Run]
    curves: list[Curves]
    families: list[Family]
    cost: Cost

    @property
    def runs(self) -> list[Run]:
        """All runs that are compared."""
        return [run for pair in self.pairs for run in (pair.baseline, pair.treatment) if run is not None]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One experiment of the lab with its latest verdict."""

    experiment: Experiment
    verdict: Verdict
    hypothesis: Hypothesis | None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that did not complete, and the experiments that asked for it."""

    run_id: int
    status: str
    seed: int
    error: str | None
    experiments: str


@dataclass(frozen=True, kw_only=True)
class ReportedLab:
    """The whole lab. `lines` are those that say most, claims first; `total` how many experiments have a verdict."""

    lines: list[Line]
    total: int
    families: list[Family]
    unclaimed: list[tuple[Hypothesis, str]]
    """registered, decided or not, and never claimed: the hypothesis and its experiment's title"""
    lineages: list[Lineage]
    combinations: list[Combination]
    foretold: list[Foretold]
    ended: list[Ended]
    runs: dict[str, int]
    made_with: list[dict[str, Any]]
    """hardware class, code, evaluator and text of completed training runs, and how many"""
    cost: Cost


def read_experiment(store: Store, experiment_id: int) -> Reported:
    """One experiment.

    Raises:
        NotFoundError: there is none of that id.
    """
    experiment = get_experiment(store, experiment_id)
    hypothesis = get_hypothesis(store, experiment_id)
    found = pairs(store, experiment_id)
    verdict = latest_verdict(store, experiment_id)
    share = verdict.share if verdict else experiment.share_in("screen")
    alike = [pair for pair in found if experiment.share_in(pair.stage) == share]
    campaign = hypothesis.campaign if hypothesis else None
    return Reported(
        experiment=experiment,
        verdict=verdict,
        hypothesis=hypothesis,
        position=None if hypothesis is None else _position(store, hypothesis),
        pairs=found,
        alike=alike,
        probes=probe_runs(store, experiment_id),
        curves=[_curves(store, metric, alike) for metric in CURVES],
        families=families(store, campaign),
        cost=Cost(
            seconds=experiment_seconds(store, experiment_id),
            kwh=experiment_kwh(store, experiment_id),
            usd=experiment_usd(store, experiment_id),
        ),
    )


def read_lab(store: Store) -> ReportedLab:
    """Everything that has a verdict, and what became of the rest."""
    rows = store.rows(
        """
        SELECT experiment_id FROM current_verdicts
        ORDER BY verdict IN ('improved', 'improved but not causal', 'worse', 'equivalent') DESC,
                 stage = 'confirm' DESC, id DESC LIMIT ?
        """,
        (MOST,),
    )
    keys = [row["experiment_id"] for row in rows]
    verdicts = [(key, latest_verdict(store, key)) for key in keys]
    return ReportedLab(
        lines=[
            Line(experiment=get_experiment(store, key), verdict=verdict, hypothesis=get_hypothesis(store, key))
            for key, verdict in verdicts
            if verdict
        ],
        total=int(store.value("SELECT count(*) FROM current_verdicts")),
        families=families(store, None),
        unclaimed=[
            (Hypothesis.of(row), row["title"])
            for row in store.rows(
                """
                SELECT hypotheses.*, experiments.title FROM hypotheses
                JOIN experiments ON experiments.id = hypotheses.experiment_id
                WHERE hypotheses.claim IS NULL ORDER BY hypotheses.improved DESC LIMIT ?
                """,
                (MOST,),
            )
        ],
        lineages=read_lineages(store, newest=MOST),
        combinations=list_combinations(store),
        foretold=read_foretold(store),
        ended=_ended(store),
        runs=tally(store, "runs"),
        made_with=store.rows(
            """
            SELECT hardware_class, code, json_extract(score, '$.evaluator') AS evaluator,
                   substr(json_extract(score, '$.corpus_sha256'), 1, 16) AS text, count(*) AS runs
            FROM runs WHERE kind = 'train' AND status = 'completed' GROUP BY 1, 2, 3, 4 ORDER BY runs DESC LIMIT 12
            """
        ),
        cost=Cost(
            seconds=float(
                store.value(
                    """
                    SELECT coalesce(sum((julianday(attempts.ended_at) - julianday(attempts.started_at)) * 86400.0
                                        * runners.cards), 0.0)
                    FROM attempts JOIN runners ON runners.id = attempts.runner_id WHERE attempts.ended_at IS NOT NULL
                    """
                )
            ),
            kwh=lab_kwh(store),
            usd=float(store.value("SELECT coalesce(sum(usd), 0.0) FROM interactions")),
        ),
    )


def families(store: Store, campaign: str | None) -> list[Family]:
    """The campaign, or without one every campaign, and last the lab's whole life."""
    rows = store.rows(
        """
        SELECT campaign AS name, count(*) AS registered, sum(claim IS 'improved') AS improved,
               sum(claim IS 'worse') AS worse, sum(claim IS 'equivalent') AS equivalent
        FROM hypotheses WHERE :campaign IS NULL OR campaign = :campaign GROUP BY campaign ORDER BY min(id)
        """,
        {"campaign": campaign},
    )
    rows += store.rows(
        """
        SELECT '' AS name, count(*) AS registered, count(CASE lab_claim WHEN 'improved' THEN 1 END) AS improved,
               count(CASE lab_claim WHEN 'worse' THEN 1 END) AS worse,
               count(CASE lab_claim WHEN 'equivalent' THEN 1 END) AS equivalent
        FROM hypotheses
        """
    )
    words: tuple[Claim, ...] = ("improved", "worse", "equivalent")
    return [
        Family(name=row["name"], registered=row["registered"], claims={word: row[word] for word in words})
        for row in rows
    ]


def mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """The mean of several curves where all of them are known, linear between their points."""
    known = [[(point.step, point.value) for point in line if point.value is not None] for line in curves]
    if not known or not all(known):
        return []

    first, last = max(line[0][0] for line in known), min(line[-1][0] for line in known)
    grid = [first + (last - first) * k / _GRID for k in range(_GRID + 1)] if last > first else [float(first)]
    if sum(map(len, known)) <= 12 * len(known):  # few points: a line that is straight between them
        grid = sorted({float(step) for line in known for step, _ in line if first <= step <= last})

    return [CurvePoint(step=round(at), value=fmean(_between(line, at) for line in known)) for at in grid]


def _between(line: Sequence[tuple[int, float]], at: float) -> float:
    for (before, low), (after, high) in pairwise(line):
        if before <= at <= after:
            return low + (high - low) * ((at - before) / (after - before) if after > before else 0.0)

    return line[0][1] if at <= line[0][0] else line[-1][1]


def _curves(store: Store, metric: str, found: Sequence[Pair]) -> Curves:
    arms = {
        "baseline": [pair.baseline for pair in found],
        "treatment": [pair.treatment for pair in found],
    }
    seeds = {arm: [line for run in runs if run and (line := _line(store, run, metric))] for arm, runs in arms.items()}
    ended = [run for pair in found for run in (pair.baseline, pair.treatment) if run is not None]
    notes = [note for run in ended if (note := curve_note(store, run))] if metric == "val_bpb" else []
    return Curves(
        metric=metric,
        note=notes[0] if notes else None,
        seeds=seeds,
        mean={arm: mean_curve(lines) for arm, lines in seeds.items()},
    )


def _line(store: Store, run: Run, metric: str) -> list[CurvePoint]:
    points = curve(store, run.id, metric)
    end = run.steps or max((point.step for point in points), default=1)
    return [CurvePoint(step=round(_WHOLE * point.step / max(end, 1)), value=point.value) for point in points]


def _position(store: Store, hypothesis: Hypothesis) -> int:
    return int(
        store.value(
            "SELECT count(*) FROM hypotheses WHERE campaign = ? AND id <= ?", (hypothesis.campaign, hypothesis.id)
        )
    )


def _ended(store: Store) -> list[Ended]:
    rows = store.rows(
        """
        SELECT runs.id AS run_id, runs.status, runs.seed, runs.error,
               (SELECT group_concat(experiment_id, ', ') FROM experiment_runs WHERE run_id = runs.id) AS experiments
        FROM runs WHERE runs.status IN ('pruned', 'failed') ORDER BY runs.id DESC LIMIT 60
        """
    )
    return [Ended(**row | {"experiments": row["experiments"] or ""}) for row in rows]
