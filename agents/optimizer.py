"""The classical proposer: Optuna's TPE over the lab's own verdicts, as a library; no study is stored.

A trial is "move this knob to that value", or two of them, and its value the effect on the metric. So the sampler
learns which knob is worth moving and whereto, from as many rows as there are. Deterministic given the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agents.admission import METRIC, NotAdmittedError, check
from agents.domains import Domain
from agents.preflight import Base
from agents.proposals import Proposal
from agents.treatments import changes_of, describe, is_near, is_same_baseline
from db.experiments import final_verdicts, list_experiments
from db.lab import Lab
from db.records import Value
from moe.config import KNOBS

if TYPE_CHECKING:
    import optuna

_ROWS_MOST = 500
_RANDOM_BELOW = 6
"""Verdicts below which TPE only draws at random."""

_ASKS_PER_IDEA = 40
_NOTHING = "none"


class _Row(NamedTuple):
    treatment: dict[str, Value]
    effect: float


def propose(
    lab: Lab, base: Base, domains: Mapping[str, Domain], count: int, *, taken: Sequence[Mapping[str, Value]] = ()
) -> list[Proposal]:
    """Up to `count` new treatments of one or two knobs; fewer when all that it asks for has been tried.

    Args:
        domains: whose knobs may be moved.
        taken: treatments that are about to be suggested.
    """
    if count < 1:
        return []

    import optuna  # half a second: at first use, and only here

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = sorted({name for domain in domains.values() for name in domain.knobs if KNOBS[name].search})
    if not names:
        return []

    rows = _rows(lab, base, names)
    spaces = {name: _space(name, base, rows) for name in names}
    study = _study(names, spaces, rows, seed=_seed(lab))
    found: list[Proposal] = []
    chosen = [dict(item) for item in taken]
    for _ in range(_ASKS_PER_IDEA * count):
        trial = study.ask()
        treatment = _drawn(trial, names, spaces)
        proposal = _proposal(base, domains, treatment, len(rows))
        if proposal is None or any(_is_same(treatment, other) for other in chosen) or not _passes(lab, base, proposal):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue

        chosen.append(treatment)
        found.append(proposal)
        if len(found) == count:
            break

    return found


def _rows(lab: Lab, base: Base, names: list[str]) -> list[_Row]:
    return [
        _Row(experiment.treatment, verdict.effect)
        for experiment, verdict in reversed(final_verdicts(lab.store, limit=_ROWS_MOST))
        if verdict.effect is not None
        and verdict.verdict != "invalid"
        and verdict.metric == METRIC
        and len(experiment.treatment) <= 2
        and experiment.treatment.keys() <= set(names)
        and is_same_baseline(base.config, experiment.baseline)
    ]


def _seed(lab: Lab) -> int:
    newest = list_experiments(lab.store, limit=1)
    return newest[0].id if newest else 0


def _space(name: str, base: Base, rows: list[_Row]) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    knob = KNOBS[name]
    search = knob.search
    assert search is not None
    tried: list[Any] = [row.treatment[name] for row in rows if name in row.treatment]
    if search.choices:
        return CategoricalDistribution(list(dict.fromkeys([*search.choices, *tried])))

    # A trial must lie within its distribution: what was tried widens it, but for "off" on a logarithmic scale.
    reached = [value for value in tried if value > 0 or not search.log]
    low, high = min([search.low, *reached]), max([search.high, *reached])
    if knob.type == "int":
        return IntDistribution(int(low), int(high), log=search.log)

    return FloatDistribution(low, high, log=search.log)


def _study(
    names: list[str], spaces: Mapping[str, optuna.distributions.BaseDistribution], rows: list[_Row], *, seed: int
) -> optuna.Study:
    import optuna

    study = optuna.create_study(
        direction="minimize", sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_BELOW)
    )
    for row in rows:
        knobs = sorted(row.treatment)
        params: dict[str, Any] = {"knob": knobs[0], "also": knobs[1] if len(knobs) > 1 else _NOTHING}
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            "knob": optuna.distributions.CategoricalDistribution(names),
            "also": optuna.distributions.CategoricalDistribution([_NOTHING, *names]),
        }
        for name in knobs:
            if row.treatment[name] or not getattr(spaces[name], "log", False):  # "off" has no place on a log scale
                params[name], distributions[name] = row.treatment[name], spaces[name]

        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=row.effect))

    return study


def _drawn(
    trial: optuna.Trial, names: list[str], spaces: Mapping[str, optuna.distributions.BaseDistribution]
) -> dict[str, Value]:
    first = trial.suggest_categorical("knob", names)
    second = trial.suggest_categorical("also", [_NOTHING, *names])
    knobs = [first] if second in (_NOTHING, first) else [first, second]
    return {name: _value(trial, name, spaces[name]) for name in sorted(knobs)}


def _value(trial: optuna.Trial, name: str, space: optuna.distributions.BaseDistribution) -> Value:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match space:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, space.choices)
        case IntDistribution():
            return trial.suggest_int(name, space.low, space.high, log=space.log)
        case FloatDistribution():
            return float(f"{trial.suggest_float(name, space.low, space.high, log=space.log):.3g}")
        case _:
            raise TypeError(f"{name} has no distribution")


def _is_same(one: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    return one.keys() == other.keys() and all(is_near(name, one[name], other[name]) for name in one)


def _passes(lab: Lab, base: Base, proposal: Proposal) -> bool:
    try:
        check(lab, base, proposal)
    except NotAdmittedError:
        return False

    return True


def _proposal(base: Base, domains: Mapping[str, Domain], treatment: dict[str, Value], rows: int) -> Proposal | None:
    values = {name: value for name, value in treatment.items() if value is not None}
    if any(getattr(base.config, name) == value for name, value in values.items()):
        return None

    changes = changes_of(base.config, values)
    if not any(change.resolvable for change in changes):
        return None

    moves = describe(changes)
    how = f"a random draw, fewer than {_RANDOM_BELOW}" if rows < _RANDOM_BELOW else "its best guess"
    home = next((domain.name for domain in domains.values() if values.keys() <= set(domain.knobs)), next(iter(domains)))
    return Proposal(
        title=f"Optimizer: {moves}"[:200],
        hypothesis=(
            f"The optimizer (TPE over {rows} verdicts on this baseline: {how}) "
            f"expects {METRIC} to improve with {moves}."
        ),
        method=f"Changed: {moves}; everything else as in the baseline.",
        domain=home,
        treatment=values,
        source="Optuna TPE over the lab's own verdicts",
    )
