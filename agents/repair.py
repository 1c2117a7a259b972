"""Repairs of an experiment that follow from facts alone, each said in words. Knows no new ideas."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from agents.duplicates import Neighbour, find_duplicate
from agents.facts import Facts
from agents.hands import target_runner
from agents.preflight import Base, preflight
from agents.proposals import Proposal
from agents.treatments import RESOLUTION, Change, change_of, changes_of, describe, moved, show
from db.lab import Lab
from db.queries import lineage
from db.records import Experiment, Value
from moe.config import KNOBS, ConfigError, apply_treatment

_CLEARLY = 2 * RESOLUTION
"""How far a move that was too small is taken, at least."""


class Repaired(NamedTuple):
    """The repaired proposal and what was changed."""

    proposal: Proposal
    changes: str


class _Step(NamedTuple):
    treatment: dict[str, Value]
    said: str | None = None


def repair(lab: Lab, base: Base, experiment: Experiment, facts: Facts) -> Repaired | None:
    """The experiment with every fault repaired that a rule can repair; None where no rule changes anything."""
    try:
        apply_treatment(base.config, experiment.treatment)
    except ConfigError:  # written for other knobs or another baseline: there is nothing to start from
        return None

    treatment, said = dict(experiment.treatment), []
    for rule in (_within_limits, _large_enough, _untried):
        step = rule(lab, base, experiment, facts, treatment)
        if step.said:
            treatment = step.treatment
            said.append(step.said)

    if facts.missing:
        said.append(f"now says what the hypothesis did not: {', '.join(facts.missing)}")

    if not said or not _is_usable(lab, base, treatment):
        return None

    return Repaired(_restated(base, experiment, treatment, facts, said), "; ".join(said))


def _within_limits(lab: Lab, base: Base, experiment: Experiment, facts: Facts, now: dict[str, Value]) -> _Step:
    limits = lab.settings.gpu_optimization
    fixed, said = dict(now), []
    for name, limit, key in (
        ("num_experts", limits.max_experts, "max_experts"),
        ("seq_len", limits.max_sequence_length, "max_sequence_length"),
    ):
        value = now.get(name)
        if isinstance(value, int) and value > limit and getattr(base.config, name) != limit:
            fixed[name] = limit
            said.append(f"{name} {value} is over the limit; a new experiment at the limit, {limit} ({key})")

    return _Step(fixed, "; ".join(said) or None)


def _large_enough(lab: Lab, base: Base, experiment: Experiment, facts: Facts, now: dict[str, Value]) -> _Step:
    changes = changes_of(base.config, now)
    if any(change.resolvable for change in changes):
        return _Step(now)

    fixed, said = dict(now), []
    for change in changes:
        value = _further(change)
        if value is not None:
            fixed[change.knob] = value
            said.append(
                f"{change.knob} {show(change.after)} is too near to the baseline's {show(change.before)} to be told "
                f"apart from a change of seed; moved on to {show(value)}"
            )

    return _Step(fixed, "; ".join(said) or None)


def _untried(lab: Lab, base: Base, experiment: Experiment, facts: Facts, now: dict[str, Value]) -> _Step:
    ignore = lineage(lab.store, experiment.id)

    def twin_of(treatment: dict[str, Value]) -> Neighbour | None:
        return find_duplicate(
            lab.store,
            base.config,
            treatment,
            experiment.title,
            metric=experiment.metric,
            equal_flops=experiment.equal_flops,
            ignore=ignore,
        )

    twin = twin_of(now)
    if twin is not None:
        why = f"experiment {twin.experiment_id} tried that already"
    elif facts.record.decided and not facts.record.improved:
        why = f"moving it that way has not improved {experiment.metric} in {facts.record.decided} verdicts"
    else:
        return _Step(now)

    for moves in (_mirrored, _doubled, _other_choices):
        for other in moves(base, now):
            if _is_usable(lab, base, other) and twin_of(other) is None:
                return _Step(
                    other,
                    f"{why}; moved to the untried {describe(changes_of(base.config, other))}",
                )

    return _Step(now)


def _further(change: Change) -> Value | None:
    if change.distance is None:
        return None

    distance = max(_CLEARLY, 2 * change.distance)
    value = moved(change.knob, change.before, distance if change.direction == "raised" else -distance)
    if value is None or not change_of(change.knob, change.before, value).resolvable:
        return None

    return value


def _mirrored(base: Base, treatment: dict[str, Value]) -> list[dict[str, Value]]:
    return _moved_by(base, treatment, -1.0)


def _doubled(base: Base, treatment: dict[str, Value]) -> list[dict[str, Value]]:
    return _moved_by(base, treatment, 2.0)


def _moved_by(base: Base, treatment: dict[str, Value], factor: float) -> list[dict[str, Value]]:
    if len(treatment) != 1:
        return []

    change = changes_of(base.config, treatment)[0]
    if change.distance is None:
        return []

    sign = 1.0 if change.direction == "raised" else -1.0
    value = moved(change.knob, change.before, sign * factor * max(change.distance, _CLEARLY))
    return [] if value is None else [{change.knob: value}]


def _other_choices(base: Base, treatment: dict[str, Value]) -> list[dict[str, Value]]:
    if len(treatment) != 1:
        return []

    name = next(iter(treatment))
    search = KNOBS[name].search
    return [
        {name: choice}
        for choice in (search.choices if search else ())
        if choice not in (treatment[name], getattr(base.config, name))
    ]


def _is_usable(lab: Lab, base: Base, treatment: dict[str, Value]) -> bool:
    try:
        return not preflight(lab, apply_treatment(base.config, treatment), target_runner(lab)).problems
    except ConfigError:
        return False


def _restated(
    base: Base, experiment: Experiment, treatment: dict[str, Value], facts: Facts, said: list[str]
) -> Proposal:
    changes = changes_of(base.config, treatment)
    is_moved = treatment != experiment.treatment
    hypothesis = experiment.hypothesis
    if is_moved or set(facts.missing) - {"what would count against it"}:
        hypothesis = f"{_claim(experiment, changes, facts)} First put as: {hypothesis}"

    method = (
        f"Changed: {describe(changes)}; everything else as in the baseline, at equal budget over paired seeds. "
        f"An effect within the noise, or the other way, would count against it. Repaired by rule from experiment "
        f"{experiment.id} ({experiment.title}): {'; '.join(said)}"
    )
    return Proposal(
        title=describe(changes)[:200] if is_moved else experiment.title,
        hypothesis=hypothesis[:2000],
        method=method[:4000],
        domain=experiment.domain,
        focus_area=experiment.focus_area,
        treatment={name: value for name, value in treatment.items() if value is not None},
        source=experiment.source,
    )


def _claim(experiment: Experiment, changes: list[Change], facts: Facts) -> str:
    verbs = {"raised": "raising", "lowered": "lowering", "changed": "setting"}
    moves = " and ".join(
        f"{verbs[change.direction]} {change.knob} from {show(change.before)} to {show(change.after)}"
        for change in changes
    )
    acts = "; ".join(
        f"{change.knob} ({KNOBS[change.knob].description.split(';')[0]}) acts on the {KNOBS[change.knob].acts_on}"
        for change in changes
    )
    turned = [change.direction for change in changes] != [change.direction for change in facts.changes]
    metric, expected = experiment.metric, "improved" if turned else expectation(experiment)
    said = {
        "improved": f"{'lowers' if experiment.direction == 'lower' else 'raises'} {metric}",
        "worse": f"{'raises' if experiment.direction == 'lower' else 'lowers'} {metric}",
        "equivalent": f"leaves {metric} equivalent",
    }
    return f"{moves[0].upper()}{moves[1:]} {said[expected]}, through what is moved: {acts}."


def expectation(experiment: Experiment) -> Literal["improved", "worse", "equivalent"]:
    """What a hypothesis expects of its metric, as far as its words tell; to improve where they do not."""
    text = experiment.hypothesis.lower()
    if re.search(r"\b(equivalent|equal|unchanged|no (effect|change|difference))\b", text):
        return "equivalent"

    worse = r"rais\w*|increas\w*" if experiment.direction == "lower" else r"lower\w*|reduc\w*|decreas\w*"
    if re.search(rf"\b({worse}) (the )?{re.escape(experiment.metric.lower())}|\bworse", text):
        return "worse"

    return "improved"
