"""`blueberry clean`: what lies in the lab's folder and may go, shown with reasons, and deleted when one agrees.

For people alone: no tool of the chat assistant deletes anything.
"""

from __future__ import annotations

import click
from rich.console import RenderableType
from rich.table import Table

from agents.preflight import base_of
from db.leftovers import Leftover, Text, delete_leftovers, find_leftovers
from db.weights import as_size
from moe.fingerprint import CORPUS_SHA256, STREAMED, split_pin
from server.desk import Desk

_SHOWN = 40


@click.option("--yes", is_flag=True, help="Delete without asking.")
@click.option("--kept-weights", is_flag=True, help="Also weights of baselines and of what improved.")
@click.option("--data", is_flag=True, help="Also tokenized corpora that no open experiment reads.")
def clean(desk: Desk, yes: bool, kept_weights: bool, data: bool) -> None:
    """Show what may go from the lab's disk, and why; then ask, and delete it.

    Never what a run that waits or trains needs, and never a row: results, curves and verdicts stay. Weights that are
    needed again later are trained anew. Your own texts, backups and files of other names are left alone.
    """
    used = {_text(desk)} if data else set()
    remade = {*CORPUS_SHA256, *STREAMED} if data else set()
    found = find_leftovers(desk.lab, kept=kept_weights, remade=remade, used=used)
    total = sum(item.bytes for item in found)
    if not found:
        desk.console.print("there is nothing to delete")
    else:
        desk.console.print(_table(desk, found))
        desk.console.print(f"{len(found)} in all, {as_size(total)}")

    gone = delete_leftovers(desk.lab, found) if found and (yes or _agrees(desk)) else []
    freed = sum(item.bytes for item in gone)
    if found:
        desk.console.print(f"deleted {len(gone)}, {as_size(freed)}" if gone else "nothing was deleted")

    desk.say(
        {
            "found": [_said(desk, item) for item in found],
            "bytes": total,
            "deleted": len(gone),
            "freed_bytes": freed,
        }
    )


def _agrees(desk: Desk) -> bool:
    if desk.as_json:
        return False

    try:
        return click.confirm("delete them?")
    except click.Abort:  # no terminal to answer from
        return False


def _text(desk: Desk) -> Text:
    config = base_of(desk.lab).config
    return Text(corpus=split_pin(config.corpus)[0], tokenizer=config.tokenizer, vocab_size=config.vocab_size)


def _table(desk: Desk, found: list[Leftover]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("what", "where", "why it may go"):
        table.add_column(name)

    table.add_column("size", justify="right")
    for item in found[:_SHOWN]:
        table.add_row(item.kind, str(item.path.relative_to(desk.folder)), item.why, as_size(item.bytes))

    if len(found) > _SHOWN:
        rest = found[_SHOWN:]
        table.add_row(
            "…", f"and {len(rest)} more", "all of them with --json", as_size(sum(item.bytes for item in rest))
        )

    return table


def _said(desk: Desk, item: Leftover) -> dict[str, object]:
    path = str(item.path.relative_to(desk.folder))
    return {"kind": item.kind, "path": path, "why": item.why, "bytes": item.bytes}
