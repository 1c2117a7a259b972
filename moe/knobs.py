"""The words in which moe/config.py declares its fields: what each acts on, who may change it, how it is searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ActsOn = Literal["loss", "gradient", "schedule", "evaluation", "memory", "speed"]
Role = Literal["science", "post", "budget", "evaluation", "machine"]
Value = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Acts:
    """What a field acts on, who may change it, where it comes from, and how it is searched.

    `needs` is another field's name and value without which this one does nothing.
    """

    on: ActsOn
    source: str
    role: Role = "science"
    search: Search | None = None
    needs: tuple[str, Value] | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """The part of a knob's range worth searching; `choices` for categories, otherwise low..high."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One field of Config, described for proposers, tools and people."""

    name: str
    type: Literal["bool", "int", "float", "str"]
    description: str
    acts_on: ActsOn
    role: Role
    source: str
    low: float | None
    high: float | None
    choices: tuple[Value, ...]
    search: Search | None
    needs: tuple[str, Value] | None
