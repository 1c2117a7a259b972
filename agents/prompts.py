"""Prompts are Markdown files in prompts/ with $name variables; a missing variable is an error.

The same text is the brief of an assistant without a key, so it stays within what every chat client shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

BRIEF_MOST = 10_000
"""Characters of a brief."""

_FOLDER = Path(__file__).parent / "prompts"
_CUT = "\n[...]"


def render(name: str, flexible: Mapping[str, str], **fixed: str) -> str:
    """The prompt of that name, filled in, within BRIEF_MOST characters.

    Args:
        flexible: variables that are cut where there is no room for them; the first ones give way last.
        fixed: variables that stay whole, such as the form of the answer.
    """
    template = Template((_FOLDER / f"{name}.md").read_text(encoding="utf-8"))
    room = BRIEF_MOST - len(template.substitute(fixed, **dict.fromkeys(flexible, "")))
    filled = {}
    for index, (variable, text) in enumerate(flexible.items()):
        share = room if index == len(flexible) - 1 else room // 2
        filled[variable] = _cut(text, share)
        room -= len(filled[variable])

    return template.substitute(fixed, **filled)


def _cut(text: str, room: int) -> str:
    if len(text) <= room:
        return text

    kept = text[: max(0, room - len(_CUT))]
    line = kept.rfind("\n")
    return (kept[:line] if line > len(kept) // 2 else kept) + _CUT
