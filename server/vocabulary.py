"""The names of all knobs that a treatment may change, for a proposer's eyes: nobody should have to guess them."""

from __future__ import annotations

from moe.config import KNOBS, Config


def knobs_by_name() -> str:
    """A line for each group of knobs, with the choices of those that have some; bounds come with a refusal."""
    lines = ["Knobs of a treatment (a wrong one is answered with the nearest, its bounds and what it is):"]
    for group in reversed(Config.__bases__):  # in the order of Config's fields
        own = [KNOBS[name] for name in group.__annotations__ if KNOBS[name].role in ("science", "post")]
        names = [f"{knob.name} ({'|'.join(map(str, knob.choices))})" if knob.choices else knob.name for knob in own]
        lines.append(f"- {group.__module__.rpartition('.')[2]}: {', '.join(names)}")

    return "\n".join(lines)
