"""What a report is made of: a title and blocks, which server/report/pages.py writes as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Plain text; `quiet` for what is only there to be looked up."""

    text: str
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A verdict: its word, and the sentence that a person may quote."""

    word: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts below `columns`, of which the last `numbers` are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawing of our own; `name` is that of its file beside the Markdown."""

    name: str
    svg: Markup
    caption: str


Block = Heading | Paragraph | Finding | Table | Picture


@dataclass(frozen=True, kw_only=True)
class Document:
    """A report."""

    title: str
    above: str
    """the line above the title: what it is a report of, and when it was written"""
    blocks: list[Block] = field(default_factory=list)
