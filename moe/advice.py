"""What is said of a name or a value that no config has: the nearest knob, what that is, and what it takes."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from typing import Any

from moe.aliases import ALIASES
from moe.knobs import Knob

_GIST = 120
"""Letters of a description in a hint; all of it is in docs/knobs.md."""

_ALIKE = 0.75
"""Names less alike than this are about something else: at .6 `drop_tokens` was taken for `budget_tokens`."""


def unknown_name(name: str, knobs: Mapping[str, Knob]) -> str:
    """Which knob may be meant by `name`, what it is and what it takes; or all names, where none is near."""
    plain = name[:80].lower().replace("-", "_")
    near = difflib.get_close_matches(plain, [*knobs, *ALIASES], n=1, cutoff=_ALIKE)
    if not near:
        return f"unknown knob {name!r}; known: {', '.join(knobs)}"

    knob = knobs[ALIASES.get(near[0], near[0])]
    gist = textwrap.shorten(knob.description, _GIST, placeholder=" …")
    return f"unknown knob {name!r}; did you mean {knob.name!r}? It takes {_taken(knob)}: {gist}"


def wrong_value(name: str, value: Any, problem: str, knobs: Mapping[str, Knob]) -> str:
    """What is wrong with a knob's value, and where that value belongs if it is another knob's."""
    said = f"{name}={value!r}: {problem}"
    owners = [knob.name for knob in knobs.values() if value in knob.choices] if isinstance(value, str) else []
    return f"{said}; {value!r} is a value of {' and '.join(owners)}" if owners else said


def _taken(knob: Knob) -> str:
    if knob.choices:
        return " or ".join(map(str, knob.choices))

    if knob.type == "bool":
        return "true or false"

    return "a name" if knob.low is None or knob.high is None else f"{knob.low:g} to {knob.high:g}"
