"""Arithmetic on treatments: what a knob's move is, how far it goes, and the value at a given distance.

Distances are parts of a knob's search range, on the scale that the range is searched on: for lr (1e-4 to 3e-2,
logarithmic) a factor of ten is 0.40. So "too small to be resolved" means the same for every knob.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from db.records import Experiment
from moe.config import KNOBS, Config, after_training, apply, scientific
from moe.knobs import Knob, Value
from moe.presets import PRESETS

RESOLUTION = 0.05
"""Moves of a smaller part of the search range are lost in the spread between seeds (a factor of 1.33 for lr)."""

NEAR = 0.02
"""Values closer than this ask the same question (a factor of 1.12 for lr)."""

Direction = Literal["raised", "lowered", "changed"]


class Change(BaseModel):
    """One knob's move away from the baseline; `distance` is None between categories."""

    model_config = ConfigDict(frozen=True)

    knob: str
    before: Value
    after: Value
    direction: Direction
    distance: float | None

    @property
    def resolvable(self) -> bool:
        """Whether the move is large enough to be told apart from a change of seed."""
        return self.distance is None or self.distance >= RESOLUTION

    def __str__(self) -> str:
        return f"{self.knob} {show(self.before)} → {show(self.after)}"


def changes_of(base: Config, treatment: Mapping[str, Value]) -> list[Change]:
    """The moves of a treatment, in alphabetical order of the knobs."""
    return [change_of(name, getattr(base, name), treatment[name]) for name in sorted(treatment)]


def change_of(name: str, before: Value, after: Value) -> Change:
    """One knob's move from one value to another."""
    direction: Direction = "changed"
    if is_ordered(KNOBS[name]):
        direction = "raised" if _number(after) > _number(before) else "lowered"

    return Change(
        knob=name, before=before, after=after, direction=direction, distance=distance_between(name, before, after)
    )


def describe(changes: list[Change]) -> str:
    """All moves in one line."""
    return ", ".join(str(change) for change in changes)


def show(value: Value) -> str:
    """A value as people write it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def is_ordered(knob: Knob) -> bool:
    """Whether the knob's values are numbers, so that it can be raised and lowered."""
    return knob.type in ("int", "float")


def distance_between(name: str, one: Value, other: Value) -> float | None:
    """How far apart two values of a knob are, as a part of its search range; None between categories."""
    knob = KNOBS[name]
    return abs(_position(knob, _number(one)) - _position(knob, _number(other))) if is_ordered(knob) else None


def is_near(name: str, one: Value, other: Value) -> bool:
    """Whether two values of a knob ask the same question."""
    if one == other:
        return True

    distance = distance_between(name, one, other)
    return distance is not None and distance < NEAR


def moved(name: str, value: Value, by: float) -> Value | None:
    """The knob's value at a distance (positive: raised), rounded and within bounds; None where there is no room."""
    knob = KNOBS[name]
    low, high, log = _range(knob)
    position = _position(knob, _number(value)) + by
    if knob.search and knob.search.choices:
        beyond = [choice for choice in knob.search.choices if (_number(choice) - _number(value)) * by > 0]
        return min(beyond, key=lambda choice: abs(_position(knob, _number(choice)) - position), default=None)

    target = math.exp(position * math.log(high / low)) if log else position * (high - low)
    target = min(max(target, low), high)
    rounded: Value = round(target) if knob.type == "int" else float(f"{target:.3g}")
    if (_number(rounded) - _number(value)) * by <= 0:
        return None

    return rounded


def configs_of(experiment: Experiment) -> tuple[Config, Config]:
    """An experiment's baseline and its treated config.

    Raises:
        ConfigError: the experiment was written for other knobs than there are today.
    """
    base = apply(PRESETS[experiment.preset], experiment.baseline)
    return base, apply(base, experiment.treatment)


def is_same_baseline(base: Config, stored: Mapping[str, Any]) -> bool:
    """Whether an experiment's stored baseline is this one, as far as results depend on it."""
    compared = scientific(base) | after_training(base)
    return all(stored[name] == value for name, value in compared.items() if name in stored)


def _range(knob: Knob) -> tuple[float, float, bool]:
    search = knob.search
    if search is None:
        return knob.low or 1.0, knob.high or 1.0, True

    if search.choices:
        numbers = [_number(choice) for choice in search.choices]
        return min(numbers), max(numbers), min(numbers) > 0.0

    return search.low or 0.0, search.high or 1.0, search.log


def _position(knob: Knob, value: float) -> float:
    low, high, log = _range(knob)
    if not log:
        return value / (high - low)

    if value <= 0:  # switched off: half a range below the lowest value worth searching
        return math.log(low) / math.log(high / low) - 0.5

    return math.log(value) / math.log(high / low)


def _number(value: Value) -> float:
    if isinstance(value, int | float):
        return float(value)

    raise TypeError(f"{value!r} is not a number")
