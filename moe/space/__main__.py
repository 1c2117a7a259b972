"""The table of all knobs, docs/knobs.md: `python -m moe.space > docs/knobs.md`. Torch-free."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator

from pydantic import BaseModel

from moe.config import KNOBS, Config
from moe.knobs import Knob, Value
from moe.presets import PRESETS

HEAD = """\
# The knobs

Every field of a config, written by `python -m moe.space` from its declaration in [moe/space/](../moe/space/).
`blueberry preflight --set num_experts=16` says what a setting costs; [studies/knob_effects.md](studies/knob_effects.md)
has what each was measured to do at the micro preset.

- **Range**: what is accepted, [a, b] with both ends, (a, b] without the first; then, where proposers may search it, the
  part that is usually worth it.
- **nano, micro, t4**: the value in the three presets; one value if all have the same.
- **Acts on**: where a change shows first, and where a test and the probe look for it: the *loss* of the first batches,
  the *gradient* (weights after a few updates), the *schedule* of the run, *evaluation*, *memory* or *speed*.
- **Role**, in brackets where it is not science: *post* is done to trained weights; *budget* and *evaluation* make runs
  comparable, so no treatment may change them; *machine* changes no gradient and is no part of a run's identity.
"""


def pages() -> Iterator[str]:
    """The lines of the page."""
    yield HEAD
    for group in reversed(Config.__bases__):  # in the order of Config's fields
        module = sys.modules[group.__module__]
        name = group.__module__.rpartition(".")[2]
        yield f"## {name.capitalize()}: moe/space/{name}.py"
        yield ""
        yield textwrap.fill(f"{inspect.getdoc(module)} {inspect.getdoc(group)}", width=120)
        yield ""
        yield "| knob | range | nano, micro, t4 | acts on | what it is | source |"
        yield "|---|---|---|---|---|---|"
        yield from (_row(KNOBS[name]) for name in _fields(group))
        yield ""


def _row(knob: Knob) -> str:
    role = "" if knob.role == "science" else f" ({knob.role})"
    needs = "" if knob.needs is None else f". Acts only with `{knob.needs[0]}={knob.needs[1]}`"
    values = [_show(getattr(preset, knob.name)) for preset in PRESETS.values()]
    cells = (
        f"`{knob.name}`",
        _range(knob),
        ", ".join(values if len(set(values)) > 1 else values[:1]),
        f"{knob.acts_on}{role}",
        f"{knob.description}{needs}",
        knob.source,
    )
    return f"| {' | '.join(cells)} |"


def _range(knob: Knob) -> str:
    if knob.choices or knob.type == "bool":
        return ", ".join(map(_show, knob.choices or (True, False)))

    if knob.low is None or knob.high is None:
        return "a name"

    metadata = Config.model_fields[knob.name].metadata
    opening = "(" if any(hasattr(item, "gt") for item in metadata) else "["
    closing = ")" if any(hasattr(item, "lt") for item in metadata) else "]"
    accepted = f"{opening}{_show(knob.low)}, {_show(knob.high)}{closing}"
    if knob.search is None:
        return accepted

    usual = ", ".join(map(_show, knob.search.choices)) or f"{_show(knob.search.low)} to {_show(knob.search.high)}"
    return f"{accepted}; {usual}"


def _show(value: Value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]

    return value if isinstance(value, str) else f"{value:,.10g}"


def _fields(group: type[BaseModel]) -> list[str]:
    return [name for name in Config.model_fields if name in group.__annotations__]


if __name__ == "__main__":
    sys.stdout.write("\n".join(pages()))
