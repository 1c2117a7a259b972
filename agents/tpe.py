"""Optuna's TPE over treatments of one or two knobs. Imports optuna, so agents/optimizer.py imports this at first use.

A trial is "move this knob to that value", perhaps with a second one, and its value the effect on the metric. The
baseline is a trial of every knob, at its own value and with no effect, so that a knob whose moves all made things
worse is known to be worse than leaving it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from moe.config import KNOBS, Config
from moe.knobs import Value

RANDOM_BELOW = 6
"""Rows below which a draw is random."""

_NOTHING = "nothing"

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Row(NamedTuple):
    """A treatment of one or two knobs, and what it did to the metric (lower is better)."""

    treatment: Mapping[str, Value]
    effect: float


def draws(names: Sequence[str], base: Config, rows: Sequence[Row], *, seed: int) -> Iterator[dict[str, Value]]:
    """Treatments worth trying, without end, each unlike those before it; the same ones for the same rows and seed.

    A second knob is moved only together with one that has improved the metric by itself: two unknown moves at once
    cannot be told apart.
    """
    spaces = {name: _space(name, base, rows) for name in names}
    winners = sorted({next(iter(row.treatment)) for row in rows if len(row.treatment) == 1 and row.effect < 0})
    sampler = (
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)
        if len(rows) >= RANDOM_BELOW
        else optuna.samplers.RandomSampler(seed=seed)
    )
    study = optuna.create_study(direction="minimize", sampler=sampler)
    known = [Row({name: getattr(base, name)}, 0.0) for name in names] + list(rows)
    study.add_trials([past for row in known if (past := _trial(row, spaces, winners))])
    while True:  # what was asked for stays open, and open trials are avoided
        trial = study.ask()
        first = trial.suggest_categorical("knob", list(spaces))
        second = trial.suggest_categorical("also", [_NOTHING, *winners])
        knobs = [first] if second in (_NOTHING, first) else [first, second]
        yield {name: _draw(trial, name, spaces[name]) for name in sorted(knobs)}


def _trial(row: Row, spaces: Mapping[str, BaseDistribution], winners: list[str]) -> optuna.trial.FrozenTrial | None:
    knobs = sorted(row.treatment, key=lambda name: name in winners)  # the second one is a winner, if any is
    also = knobs[1] if len(knobs) > 1 else _NOTHING
    if also not in (_NOTHING, *winners):
        return None

    params: dict[str, Any] = {"knob": knobs[0], "also": also}
    distributions: dict[str, BaseDistribution] = {
        "knob": CategoricalDistribution(list(spaces)),
        "also": CategoricalDistribution([_NOTHING, *winners]),
    }
    for name in knobs:
        if row.treatment[name] or not getattr(spaces[name], "log", False):  # "off" has no place on a log scale
            params[name], distributions[name] = row.treatment[name], spaces[name]

    return optuna.trial.create_trial(params=params, distributions=distributions, value=row.effect)


def _space(name: str, base: Config, rows: Sequence[Row]) -> BaseDistribution:
    knob = KNOBS[name]
    search = knob.search
    if search is None:
        raise ValueError(f"{name} has no search range")

    # A trial must lie within its distribution, so what was tried widens it.
    tried: list[Any] = [getattr(base, name), *(row.treatment[name] for row in rows if name in row.treatment)]
    if search.choices:
        return CategoricalDistribution(list(dict.fromkeys([*search.choices, *tried])))

    reached = [value for value in tried if value > 0 or not search.log]
    low, high = min([search.low, *reached]), max([search.high, *reached])
    if knob.type == "int":
        return IntDistribution(int(low), int(high), log=search.log)

    return FloatDistribution(low, high, log=search.log)


def _draw(trial: optuna.Trial, name: str, space: BaseDistribution) -> Value:
    match space:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, space.choices)
        case IntDistribution():
            return trial.suggest_int(name, space.low, space.high, log=space.log)
        case FloatDistribution():
            return float(f"{trial.suggest_float(name, space.low, space.high, log=space.log):.3g}")
        case _:
            raise TypeError(f"{name} has a distribution of unknown kind")
