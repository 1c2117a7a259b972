"""What the three pages of our own show: the front page, an experiment, a run. Each is read in one snapshot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from db import comparisons, queries
from db.cards import experiment_kwh, run_kwh
from db.curves import curve_note
from db.draw import Series, common_reach, draw_curves, draw_interval, widest
from db.experiments import get_experiment, latest_verdict, list_insights
from db.formats import span
from db.interactions import experiment_usd
from db.lineage import Lineage, read_lineages
from db.notebook.canned import VERDICTS
from db.queue import get_run
from db.records import Attempt, Event, Experiment, ExperimentStatus, Insight, Review, Run, Value, Verdict
from db.store import Store, snapshot

MOST_VERDICTS = 25
NEWEST = 30
"""Champions that are drawn."""

CURVES = ("train_loss", "val_bpb")
_MISSING = "not set"


@dataclass(frozen=True, kw_only=True)
class Known:
    """One row of the verdict table."""

    experiment_id: int
    title: str
    treatment: dict[str, Value]
    verdict: str
    effect: float | None
    low: float | None
    high: float | None
    noise: float | None
    metric: str
    pairs: int
    share: float
    final: bool
    sentence: str
    picture: Markup | None


@dataclass(frozen=True, kw_only=True)
class Front:
    """The front page."""

    overview: queries.Overview
    known: list[Known]
    lineages: list[Lineage]
    insights: list[Insight]
    open: list[Experiment]
    events: list[Event]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One knob that the treatment changes."""

    knob: str
    baseline: Value
    treatment: Value


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """Both arms at one seed, trained for a share of the budget; `difference` is treatment minus baseline, once both are
    scored."""

    seed: int
    share: float
    baseline: Run | None
    treatment: Run | None
    difference: float | None
    pictures: list[Markup]
    curve_note: str | None


@dataclass(frozen=True, kw_only=True)
class ExperimentPage:
    """One experiment, whole."""

    experiment: Experiment
    changes: list[Change]
    verdict: Verdict | None
    picture: Markup | None
    reviews: list[Review]
    seeds: list[SeedResult]
    probes: list[Run]
    ancestors: list[Experiment]
    successors: list[Experiment]
    insights: list[Insight]
    events: list[Event]
    cost_seconds: float
    cost_kwh: float | None
    cost_usd: float


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """One run: where it stands, its curves, its attempts, and who asked for it."""

    run: Run
    used_by: list[dict[str, Any]]
    pictures: list[Markup]
    curve_note: str | None
    attempts: list[Attempt]
    kwh: float | None
    differs: list[Change]


def read_front(path: Path) -> Front:
    """The front page of the lab in this file."""
    with snapshot(path) as store:
        rows = store.rows(f"{VERDICTS} LIMIT ?", (MOST_VERDICTS,))
        reach = common_reach([widest(row["effect"], row["low"], row["high"]) for row in rows])
        return Front(
            overview=queries.overview(store),
            known=[_known(row, reach) for row in rows],
            lineages=read_lineages(store, newest=NEWEST),
            insights=list_insights(store, limit=8),
            open=_open_experiments(store, limit=12),
            events=_events(store, "ORDER BY id DESC LIMIT 12"),
        )


def read_experiment(path: Path, experiment_id: int) -> ExperimentPage:
    """The page of an experiment, which must exist."""
    with snapshot(path) as store:
        experiment = get_experiment(store, experiment_id)
        verdict = latest_verdict(store, experiment_id)
        return ExperimentPage(
            experiment=experiment,
            changes=[
                Change(knob=knob, baseline=experiment.baseline.get(knob, _MISSING), treatment=value)
                for knob, value in experiment.treatment.items()
            ],
            verdict=verdict,
            picture=_verdict_picture(verdict),
            reviews=[
                Review.of(row)
                for row in store.rows("SELECT * FROM reviews WHERE experiment_id = ? ORDER BY id", (experiment_id,))
            ],
            seeds=[_seed_result(store, experiment, pair) for pair in comparisons.pairs(store, experiment_id)],
            probes=queries.probe_runs(store, experiment_id),
            ancestors=[
                get_experiment(store, key) for key in queries.lineage(store, experiment_id) if key != experiment_id
            ],
            successors=_experiments(store, "WHERE parent_id = ? ORDER BY id", experiment_id),
            insights=_insights_of(store, experiment_id),
            events=_events(
                store,
                """
                WHERE experiment_id = :id
                   OR run_id IN (SELECT run_id FROM experiment_runs WHERE experiment_id = :id)
                ORDER BY id LIMIT 200
                """,
                {"id": experiment_id},
            ),
            cost_seconds=queries.experiment_seconds(store, experiment_id),
            cost_kwh=experiment_kwh(store, experiment_id),
            cost_usd=experiment_usd(store, experiment_id),
        )


def read_run(path: Path, run_id: int) -> RunPage:
    """The page of a run, which must exist."""
    with snapshot(path) as store:
        run = get_run(store, run_id)
        names = queries.metric_names(store, run_id)
        pictures = [
            draw_curves(name, [Series(name="run", points=queries.curve(store, run_id, name))])
            for name in sorted(names, key=lambda name: (name not in CURVES, name))
            if name != "val_tokens"  # said in words
        ]
        return RunPage(
            run=run,
            used_by=store.rows(
                """
                SELECT experiments.id, experiments.title, experiments.status, experiment_runs.arm
                FROM experiment_runs JOIN experiments ON experiments.id = experiment_runs.experiment_id
                WHERE experiment_runs.run_id = ? ORDER BY experiments.id
                """,
                (run_id,),
            ),
            pictures=[picture for picture in pictures if picture is not None],
            curve_note=curve_note(store, run),
            attempts=[
                Attempt.of(row)
                for row in store.rows("SELECT * FROM attempts WHERE run_id = ? ORDER BY id DESC LIMIT 20", (run_id,))
            ],
            kwh=run_kwh(store, run_id),
            differs=[
                Change(knob=name, baseline=(run.baseline or {}).get(name, _MISSING), treatment=value)
                for name, value in run.config.items()
                if run.baseline is not None and run.baseline.get(name, _MISSING) != value
            ],
        )


def _known(row: dict[str, Any], reach: float) -> Known:
    found = row["effect"], row["low"], row["high"]
    picture = draw_interval(*found, reach=reach, word=row["verdict"], text=span(*found, row["noise"]))
    names = Known.__dataclass_fields__.keys() - {"treatment", "picture"}
    return Known(**{name: row[name] for name in names}, treatment=json.loads(row["treatment"]), picture=picture)


def _verdict_picture(verdict: Verdict | None) -> Markup | None:
    if verdict is None:
        return None

    found = verdict.effect, verdict.low, verdict.high
    text = span(*found, verdict.noise)
    return draw_interval(*found, reach=widest(*found), word=verdict.said, text=text, width=420)


def _seed_result(store: Store, experiment: Experiment, pair: comparisons.Pair) -> SeedResult:
    arms = {"baseline": pair.baseline, "treatment": pair.treatment}
    pictures = [
        draw_curves(
            metric,
            [Series(name=arm, points=queries.curve(store, run.id, metric)) for arm, run in arms.items() if run],
        )
        for metric in CURVES
    ]
    return SeedResult(
        seed=pair.seed,
        share=experiment.share_in(pair.stage),
        baseline=pair.baseline,
        treatment=pair.treatment,
        difference=pair.difference(experiment.metric),
        pictures=[picture for picture in pictures if picture is not None],
        curve_note=None if pair.treatment is None else curve_note(store, pair.treatment),
    )


def _experiments(store: Store, clause: str, *values: int) -> list[Experiment]:
    return [Experiment.of(row) for row in store.rows(f"SELECT * FROM experiments {clause}", values)]


def _open_experiments(store: Store, *, limit: int) -> list[Experiment]:
    # The first of each status are few; to sort all that are open would read every one of them.
    first = "SELECT * FROM (SELECT id FROM experiments WHERE status = ? ORDER BY priority DESC, id LIMIT ?)"
    words: list[ExperimentStatus] = ["running", "queued", "approved", "needs_work", "suggested"]
    rows = store.rows(
        f"""
        SELECT * FROM experiments WHERE id IN ({" UNION ALL ".join(first for _ in words)})
        ORDER BY status = 'running' DESC, status = 'queued' DESC, priority DESC, id LIMIT ?
        """,
        [*(value for word in words for value in (word, limit)), limit],
    )
    return [Experiment.of(row) for row in rows]


def _events(store: Store, clause: str, values: dict[str, int] | None = None) -> list[Event]:
    return [Event.of(row) for row in store.rows(f"SELECT * FROM events {clause}", values or {})]


def _insights_of(store: Store, experiment_id: int) -> list[Insight]:
    rows = store.rows(
        """
        SELECT DISTINCT insights.* FROM insights JOIN insight_verdicts ON insight_verdicts.insight_id = insights.id
        JOIN verdicts ON verdicts.id = insight_verdicts.verdict_id WHERE verdicts.experiment_id = ?
        """,
        (experiment_id,),
    )
    return [Insight.of(row) for row in rows]
