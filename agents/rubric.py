"""A review without a language model: five scores, each computed from the facts, each with its reason in writing.

It knows cost, limits, past work and the literature; it does not understand a new idea, and says so by scoring what
it cannot know in the middle.
"""

from __future__ import annotations

from typing import NamedTuple

from agents.facts import Facts
from agents.proposals import GivenReview
from agents.treatments import RESOLUTION, describe

_NOVELTY = {
    "equal": 1.0,
    "near": 2.0,
    "same direction": 6.5,
    "shares a knob": 8.0,
    "opposite direction": 7.5,
    "similar words": 9.0,
}
_IMPACT = {"large": 8.0, "moderate": 7.0, "small": 6.0, None: 5.0}

_UNKNOWN_IMPACT = 4.0
_CLARITY = {
    "the knob": 2.5,
    "the metric": 2.0,
    "the direction": 2.5,
    "the mechanism": 3.0,
    "what would count against it": 2.0,
}
_PRIOR_WEIGHT = 2.0
"""The catalog's probability counts as much as this many verdicts of the lab's own."""


class Criterion(NamedTuple):
    """One score and why."""

    score: float
    reason: str


def assess(facts: Facts) -> GivenReview:
    """The review that the facts alone support."""
    criteria = {
        "novelty": _novelty(facts),
        "feasibility": _feasibility(facts),
        "impact": _impact(facts),
        "clarity": _clarity(facts),
        "efficiency": _efficiency(facts),
    }
    return GivenReview(
        **{name: criterion.score for name, criterion in criteria.items()},
        feedback="\n".join(f"{name} {item.score:.1f}: {item.reason}" for name, item in criteria.items())[:4000],
        success_probability=_probability(facts),
    )


def _novelty(facts: Facts) -> Criterion:
    if not facts.nearest:
        return Criterion(9.0, "nothing like it has been tried on this baseline")

    nearest = facts.nearest[0]
    if nearest.relation == "similar words":
        return Criterion(
            _NOVELTY[nearest.relation],
            "no past work moves the same knobs; "
            f"experiment {nearest.experiment_id} ({nearest.title}) is nearest in words",
        )

    said = f"verdict {nearest.verdict}" if nearest.verdict else nearest.status
    return Criterion(
        _NOVELTY[nearest.relation],
        f"the nearest past work is experiment {nearest.experiment_id} ({nearest.title}; {said}): {nearest.relation}",
    )


def _feasibility(facts: Facts) -> Criterion:
    if facts.problems or facts.treatment is None:
        return Criterion(1.0, "; ".join(facts.problems) or "the config cannot be built")

    cost = facts.treatment
    if cost.memory_available_bytes is None:
        return Criterion(8.0, "within every limit; no runner has registered yet, so memory is unchecked")

    used = cost.memory_bytes / cost.memory_available_bytes
    return Criterion(
        9.0 if used <= 0.9 else 7.0,
        f"within every limit; takes {used:.0%} of the memory allowed, with a micro-batch of {cost.micro_batch_size}",
    )


def _impact(facts: Facts) -> Criterion:
    if facts.changes and not facts.is_resolvable:
        return Criterion(
            2.0,
            f"{describe(facts.changes)} moves less than {RESOLUTION:.0%} of the range worth searching: "
            "too small to be told apart from a change of seed",
        )

    record = facts.record
    if record.decided:
        ids = ", ".join(map(str, record.experiment_ids[:5]))
        score = 7.0 if record.improved else 3.0
        return Criterion(score, f"the same move improved the metric in {record.improved} of {record.decided} ({ids})")

    if facts.prior:
        size = f" ({facts.prior.size})" if facts.prior.size else ""
        return Criterion(
            _IMPACT[facts.prior.size], f"the catalog expects {facts.prior.expect}{size}, after {facts.prior.source}"
        )

    return Criterion(_UNKNOWN_IMPACT, "neither the catalog nor the lab's verdicts say anything of this move")


def _clarity(facts: Facts) -> Criterion:
    score = 10.0 - sum(_CLARITY[item] for item in facts.missing)
    if len(facts.changes) > 3:
        score -= 2.0

    if facts.missing:
        return Criterion(max(1.0, score), f"the hypothesis does not say {', '.join(facts.missing)}")

    crowd = " but many knobs move at once, so their effects cannot be told apart" if len(facts.changes) > 3 else ""
    return Criterion(min(score, 9.0), f"names knob, metric, direction and mechanism{crowd}")


def _efficiency(facts: Facts) -> Criterion:
    if facts.changes and not facts.is_resolvable:
        return Criterion(2.0, "GPU time spent on a difference that cannot be seen teaches nothing")

    if facts.is_vague:
        return Criterion(2.0, "GPU time spent on a question that no result could answer teaches nothing")

    ratio = facts.cost_ratio
    if ratio is None:
        return Criterion(1.0, "the cost cannot be computed")

    if "the mechanism" in facts.missing and facts.prior is None:
        return Criterion(6.0, "with no mechanism to test, a result is one point on a curve and explains nothing")

    score = 8.5 if ratio <= 0.9 else 8.0 if ratio <= 1.1 else 6.5 if ratio <= 1.6 else 5.0 if ratio <= 2.5 else 3.0
    return Criterion(score, f"a run costs {ratio:.2f} times the baseline's")


def _probability(facts: Facts) -> float | None:
    record, prior = facts.record, facts.prior
    weight = _PRIOR_WEIGHT if prior else 0.0
    if weight + record.decided == 0:
        return None

    return ((prior.probability * weight if prior else 0.0) + record.improved) / (weight + record.decided)
