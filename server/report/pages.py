"""A report as Markdown, with its pictures as files beside it, and as one HTML file that needs nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from markupsafe import Markup, escape

from db.draw import STYLES
from server.report.document import Block, Document, Finding, Heading, Paragraph, Picture, Table

OWN = Path(__file__).with_name("report.css")


def as_markdown(document: Document) -> str:
    """The Markdown; pictures are links to NAME.svg beside it."""
    parts = [f"*{_plain(document.above)}*", f"# {_plain(document.title)}"]
    return "\n\n".join([*parts, *map(_markdown_of, document.blocks)]) + "\n"


def as_html(document: Document) -> str:
    """One page: styles and pictures are in it, scripts are not, and it loads nothing."""
    body = Markup("\n").join(map(_html_of, document.blocks))
    return Markup(
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>{title}</title>\n<style>\n{style}</style>\n"
        '<main>\n<p class="above">{above}</p>\n<h1>{title}</h1>\n{body}\n</main>\n</html>\n'
    ).format(title=document.title, above=document.above, style=Markup(STYLES.read_text() + OWN.read_text()), body=body)


def as_svg(picture: Picture) -> str:
    """The picture as a file of its own, with the styles that it needs."""
    start = '<svg xmlns="http://www.w3.org/2000/svg"'
    alone = str(picture.svg).replace("<svg", start, 1)
    end = alone.index(">") + 1
    return f"{alone[:end]}<style>{STYLES.read_text()}</style>{alone[end:]}\n"


def _markdown_of(block: Block) -> str:
    match block:
        case Heading():
            return f"## {_plain(block.text)}"
        case Paragraph():
            return _plain(block.text)
        case Finding():
            return f"> **{_plain(block.word)}.** {_plain(block.sentence)}"
        case Picture():
            return f"![{_plain(block.caption)}]({block.name}.svg)\n\n*{_plain(block.caption)}*"
        case Table():
            left = len(block.columns) - block.numbers
            rule = [":--" if place < left else "--:" for place in range(len(block.columns))]
            return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (block.columns, rule, *block.rows))


def _html_of(block: Block) -> Markup:
    match block:
        case Heading():
            return Markup("<h2>{}</h2>").format(block.text)
        case Paragraph():
            return Markup('<p class="{}">{}</p>').format("quiet" if block.quiet else "text", block.text)
        case Finding():
            kind = block.word.replace(" ", "-")
            return Markup('<div class="finding finding-{}"><b>{}</b><p>{}</p></div>').format(
                kind, block.word, block.sentence
            )
        case Picture():
            return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(block.svg, block.caption)
        case Table():
            return _table(block)


def _table(block: Table) -> Markup:
    left = len(block.columns) - block.numbers

    def row(cells: list[Markup]) -> Markup:
        return Markup("<tr>{}</tr>").format(Markup("").join(cells))

    def cell(tag: str, place: int, text: str) -> Markup:
        return Markup("<{0}{1}>{2}</{0}>").format(
            Markup(tag), Markup(' class="num"' if place >= left else ""), escape(text)
        )

    head = row([cell("th", place, text) for place, text in enumerate(block.columns)])
    body = [row([cell("td", place, text) for place, text in enumerate(texts)]) for texts in block.rows]
    return Markup('<div class="wide"><table><thead>{}</thead><tbody>{}</tbody></table></div>').format(
        head, Markup("\n").join(body)
    )


def _plain(text: str) -> str:
    """What people and models wrote, as text that Markdown does not take for its own."""
    return re.sub(r"(?=[\\`*<>|]|\b_\b|(?<!\w)_|_(?!\w)|(?<=\])\(|^#)", r"\\", " ".join(text.split()))


def _cell(text: str) -> str:
    return text if text in (":--", "--:") else _plain(text)
