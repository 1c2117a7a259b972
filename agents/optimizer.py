"""The classical proposer: TPE over the lab's own verdicts, used as a library; no study is stored.

It proposes by the metric that blueberry.toml names. From the verdicts by that metric, as many as there are, it learns
which knob is worth moving and whereto, and says on how many; those of screenings on a part of the budget count like
others, since a proposal claims nothing. The same rows give the same proposals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from agents.admission import NotAdmittedError, check, metric_of_lab
from agents.domains import Domain
from agents.preflight import Base
from agents.proposals import Proposal
from agents.treatments import changes_of, describe, is_near, is_same_baseline
from db.experiments import final_verdicts, list_experiments
from db.lab import Lab
from db.records import Value
from moe.config import KNOBS
from moe.metrics import Metric

_ROWS_MOST = 500
_DRAWS_PER_IDEA = 40


def propose(
    lab: Lab, base: Base, domains: Mapping[str, Domain], count: int, *, taken: Sequence[Mapping[str, Value]] = ()
) -> list[Proposal]:
    """Up to `count` new treatments of one or two knobs; fewer when all that it asks for has been tried.

    Args:
        domains: whose knobs may be moved.
        taken: treatments that are about to be suggested.

    Raises:
        NotAdmittedError: the lab's metric is none to judge by.
    """
    metric = metric_of_lab(lab)
    # What is done to trained weights has a metric of its own.
    knobs = {name for domain in domains.values() for name in domain.knobs}
    names = sorted(name for name in knobs if KNOBS[name].search and KNOBS[name].role == "science")
    if count < 1 or not names:
        return []

    from agents import tpe  # optuna takes half a second: at first use, and only here

    rows = [tpe.Row(*pair) for pair in _effects(lab, base, metric) if pair[0].keys() <= set(names)]
    basis = f"TPE over {len(rows)} verdict{'' if len(rows) == 1 else 's'} by {metric.name} on this baseline"
    basis += f": a random draw, fewer than {tpe.RANDOM_BELOW}" if len(rows) < tpe.RANDOM_BELOW else ": its best guess"
    found: list[Proposal] = []
    chosen = [dict(item) for item in taken]
    for treatment in islice(tpe.draws(names, base.config, rows, seed=_seed(lab)), _DRAWS_PER_IDEA * count):
        proposal = _proposal(base, domains, treatment, metric, basis)
        if proposal and not any(_is_same(treatment, other) for other in chosen) and _passes(lab, base, proposal):
            chosen.append(treatment)
            found.append(proposal)

        if len(found) == count:
            break

    return found


def _effects(lab: Lab, base: Base, metric: Metric) -> list[tuple[dict[str, Value], float]]:
    """Treatments, and what they did to the metric; less is better."""
    sign = -1.0 if metric.better == "higher" else 1.0
    return [
        (experiment.treatment, sign * verdict.effect)
        for experiment, verdict in reversed(final_verdicts(lab.store, limit=_ROWS_MOST))
        if verdict.effect is not None
        and verdict.verdict != "invalid"
        and verdict.metric == metric.name
        and not experiment.equal_flops
        and len(experiment.treatment) <= 2
        and is_same_baseline(base.config, experiment.baseline)
    ]


def _seed(lab: Lab) -> int:
    newest = list_experiments(lab.store, limit=1)
    return newest[0].id if newest else 0


def _is_same(one: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    return one.keys() == other.keys() and all(is_near(name, one[name], other[name]) for name in one)


def _passes(lab: Lab, base: Base, proposal: Proposal) -> bool:
    try:
        check(lab, base, proposal)
    except NotAdmittedError:
        return False

    return True


def _proposal(
    base: Base, domains: Mapping[str, Domain], treatment: dict[str, Value], metric: Metric, basis: str
) -> Proposal | None:
    values = {name: value for name, value in treatment.items() if value is not None}
    if any(getattr(base.config, name) == value for name, value in values.items()):
        return None

    changes = changes_of(base.config, values)
    if not all(change.resolvable for change in changes):
        return None

    moves = describe(changes)
    home = next((domain.name for domain in domains.values() if values.keys() <= set(domain.knobs)), next(iter(domains)))
    return Proposal(
        title=f"Optimizer: {moves}"[:200],
        hypothesis=f"The optimizer ({basis}) expects {metric.name} to improve with {moves}.",
        method=f"Changed: {moves}; everything else as in the baseline.",
        domain=home,
        treatment=values,
        metric=metric.name,
        source="Optuna TPE over the lab's own verdicts",
    )
