"""Checking what a caller gave to a verb, by the verb's own annotations, and saying in words what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, validate_call

from db.errors import LabError

_Answer = TypeVar("_Answer")

_MOST = 5
_BRANCHES = frozenset({"bool", "int", "float", "str", "constrained-str"})


class ArgumentsError(LabError):
    """Arguments that a verb cannot take; names each. Raised by call()."""


def call(verb: Callable[..., _Answer], *arguments: Any, **options: Any) -> _Answer:
    """Calls a verb with its arguments checked, as the MCP server does for a client.

    Raises:
        ArgumentsError: an argument is out of bounds or of the wrong type.
    """
    try:
        return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(verb)(*arguments, **options)
    except ValidationError as error:
        if error.title != verb.__name__:
            raise  # not of the arguments: a bug of ours

        raise ArgumentsError(explain(error)) from None


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """What is wrong with a call's arguments, one clause an argument; for an unknown one the names that `model` has."""
    problems: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False, include_context=False):
        # Where a value may be of several types, pydantic names each that it tried.
        place = [str(part) for part in detail["loc"] if part not in _BRANCHES]
        name = ".".join(place)[:80]
        if detail["type"] == "extra_forbidden":
            said = _unknown(name, place, model)
        elif detail["type"] == "missing":
            said = f"{name} is missing"
        else:
            said = f"{name}: " * bool(name) + detail["msg"].removeprefix("Value error, ")

        problems.setdefault(name, []).append(said)

    clauses = [_one_of(said) for said in problems.values()]
    rest = len(clauses) - _MOST
    return "; ".join(clauses[:_MOST]) + (f"; and {rest} more" if rest > 0 else "")


def _one_of(said: list[str]) -> str:
    first, *others = dict.fromkeys(said)
    return " or ".join([first, *(other.rpartition("Input should be ")[2] for other in others)])


def _unknown(name: str, place: list[str], model: type[BaseModel] | None) -> str:
    known = list(_model_at(model, place[:-1]).model_fields) if model else []
    near = difflib.get_close_matches(place[-1][:80], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown argument {name!r}; {hint}known: {', '.join(known)}"


def _model_at(model: type[BaseModel], place: list[str]) -> type[BaseModel]:
    for part in place:
        if (field := model.model_fields.get(part)) is not None:
            model = next(_models_in(field.annotation), model)

    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation

    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)
