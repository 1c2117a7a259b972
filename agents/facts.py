"""What can be known of an experiment before it runs: cost, limits, past work, probes, what the literature says.

Facts are computed, stored with each review, and read by the rubric, the improver, and whoever reviews with them.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

from agents.admission import usual_metric
from agents.domains import Intervention, load_domains
from agents.duplicates import Neighbour, neighbours
from agents.hands import target_runner
from agents.preflight import Preflight, preflight
from agents.treatments import Change, changes_of, configs_of, distance_between, is_same_baseline
from db.experiments import final_verdicts, latest_review, list_insights
from db.lab import Lab
from db.queries import lineage, probe_runs
from db.records import Experiment
from moe.config import Config, ConfigError, apply_treatment

_SAME_MOVE = 0.2
"""An intervention of the catalog whose values are this near is taken to be the same idea (lr: a factor of 3)."""

_ALSO_CALLED = {"lr": "learning rate", "router_z_weight": "z loss", "normalize_gates": "gates"}

_DIRECTIONS = r"\b(lower|reduc|decreas|improv|rais|increas|wors|equivalent|equal|unchanged|no effect|no change)"
_MECHANISMS = r"\b(because|since|so that|due to|as a result|by \w+ing|guards?|leads? to|allows?|leaves?|through)\b"
_REFUTATIONS = r"count(s|ed)? against|refut|falsif|disprov|would contradict|outside the noise|beyond the noise"


class Prior(BaseModel):
    """What the catalog expects of the same move, and the literature that it has that from."""

    model_config = ConfigDict(frozen=True)

    title: str
    expect: str
    size: str | None
    probability: float
    source: str


class TrackRecord(BaseModel):
    """What this lab's final verdicts say of the same knobs moved the same ways, judged by the same metric."""

    model_config = ConfigDict(frozen=True)

    experiment_ids: list[int]
    improved: int
    decided: int
    largest_effect: float | None


class Probe(BaseModel):
    """What a probe said."""

    model_config = ConfigDict(frozen=True)

    run_id: int
    status: str
    passed: bool | None
    error: str | None


class Facts(BaseModel):
    """The facts of one experiment. `problems` forbid approval; `missing` is what the hypothesis leaves unsaid."""

    model_config = ConfigDict(frozen=True)

    changes: list[Change]
    treatment: Preflight | None
    baseline: Preflight | None
    cost_ratio: float | None
    problems: list[str]
    nearest: list[Neighbour]
    probes: list[Probe]
    prior: Prior | None
    record: TrackRecord
    insights: list[str]
    missing: list[str]

    @property
    def is_resolvable(self) -> bool:
        """Whether at least one knob moves far enough to be told apart from a change of seed."""
        return any(change.resolvable for change in self.changes)

    @property
    def is_vague(self) -> bool:
        """Whether no result could answer the hypothesis: no direction, or neither knob nor metric."""
        return "the direction" in self.missing or {"the knob", "the metric"} <= set(self.missing)


def gather(lab: Lab, experiment: Experiment) -> Facts:
    """The facts of an experiment as they are now."""
    store = lab.store
    try:
        base, _ = configs_of(experiment)
        config = apply_treatment(base, experiment.treatment)
    except ConfigError as error:
        return _unusable(experiment, str(error))

    changes = changes_of(base, experiment.treatment)
    runner = target_runner(lab)
    treated, untreated = preflight(lab, config, runner), preflight(lab, base, runner)
    own = lineage(store, experiment.id)
    probes = [
        Probe(run_id=run.id, status=run.status, passed=run.passed, error=run.error)
        for run in probe_runs(store, experiment.id)
    ]
    failed = [f"probe run {probe.run_id} did not pass: {probe.error}" for probe in probes if probe.passed is False]
    return Facts(
        changes=changes,
        treatment=treated,
        baseline=untreated,
        cost_ratio=_cost_ratio(treated, untreated),
        problems=treated.problems + failed,
        nearest=neighbours(
            store, base, experiment.treatment, f"{experiment.title} {experiment.hypothesis}", ignore=own
        ),
        probes=probes,
        prior=prior_of(lab, base, changes) if experiment.metric == usual_metric(experiment.treatment) else None,
        record=_record(lab, base, changes, experiment.metric, own),
        insights=[item.statement for item in list_insights(store, limit=200) if item.knob in experiment.treatment][:8],
        missing=_missing(experiment),
    )


def latest_facts(lab: Lab, experiment: Experiment) -> Facts:
    """The facts stored with the latest review; gathered now where there is none."""
    review = latest_review(lab.store, experiment.id)
    return Facts.model_validate(review.facts) if review else gather(lab, experiment)


def prior_of(lab: Lab, base: Config, changes: list[Change]) -> Prior | None:
    """The intervention of the catalog that moves the same knobs the same ways, about as far."""
    for domain in load_domains(lab).values():
        for item in domain.interventions:
            treatment = item.resolve(base)
            if treatment is not None and _same_moves(changes, changes_of(base, treatment)):
                return _prior(item)

    return None


def _prior(item: Intervention) -> Prior:
    return Prior(title=item.title, expect=item.expect, size=item.size, probability=item.prior, source=item.source)


def _same_moves(one: list[Change], other: list[Change]) -> bool:
    if [(item.knob, item.direction) for item in one] != [(item.knob, item.direction) for item in other]:
        return False

    return all(
        mine.after == theirs.after
        if mine.distance is None
        else (distance_between(mine.knob, mine.after, theirs.after) or 0.0) <= _SAME_MOVE
        for mine, theirs in zip(one, other, strict=True)
    )


def _record(lab: Lab, base: Config, changes: list[Change], metric: str, own: list[int]) -> TrackRecord:
    wanted = [(change.knob, change.direction) for change in changes]
    found = [
        (experiment.id, verdict)
        for experiment, verdict in final_verdicts(lab.store)
        if experiment.treatment.keys() == {change.knob for change in changes}
        and verdict.metric == metric
        and experiment.id not in own
        and is_same_baseline(base, experiment.baseline)
        and [(item.knob, item.direction) for item in changes_of(base, experiment.treatment)] == wanted
    ]
    effects = [abs(verdict.effect) for _, verdict in found if verdict.effect is not None and verdict.share == 1.0]
    return TrackRecord(
        experiment_ids=[key for key, _ in found],
        improved=sum(verdict.verdict == "improved" for _, verdict in found),
        decided=sum(verdict.said in ("improved", "worse", "equivalent", "not promising") for _, verdict in found),
        largest_effect=max(effects, default=None),
    )


def _cost_ratio(treated: Preflight, untreated: Preflight) -> float:
    if treated.seconds is not None and untreated.seconds:
        return treated.seconds / untreated.seconds

    return treated.flops_per_token / untreated.flops_per_token


def _missing(experiment: Experiment) -> list[str]:
    words = re.sub(r"[_\W]+", " ", f" {experiment.title} {experiment.hypothesis} ".lower())
    said = {
        "the knob": all(_is_named(knob, words) for knob in experiment.treatment),
        "the metric": _is_named(experiment.metric, words),
        "the direction": re.search(_DIRECTIONS, experiment.hypothesis.lower()) is not None,
        "the mechanism": re.search(_MECHANISMS, experiment.hypothesis.lower()) is not None,
        "what would count against it": re.search(_REFUTATIONS, f"{experiment.hypothesis} {experiment.method}".lower())
        is not None,
    }
    return [name for name, is_said in said.items() if not is_said]


def _is_named(name: str, words: str) -> bool:
    return any(f" {form} " in words for form in (name.replace("_", " ").lower(), _ALSO_CALLED.get(name)))


def _unusable(experiment: Experiment, problem: str) -> Facts:
    return Facts(
        changes=[],
        treatment=None,
        baseline=None,
        cost_ratio=None,
        problems=[problem],
        nearest=[],
        probes=[],
        prior=None,
        record=TrackRecord(experiment_ids=[], improved=0, decided=0, largest_effect=None),
        insights=[],
        missing=_missing(experiment),
    )
