"""Prompts are Markdown files in prompts/ with $name variables; a missing variable is an error."""

from __future__ import annotations

from pathlib import Path
from string import Template

_FOLDER = Path(__file__).parent / "prompts"


def render(name: str, **variables: str) -> str:
    """The prompt of that name, filled in."""
    return Template((_FOLDER / f"{name}.md").read_text(encoding="utf-8")).substitute(variables)
