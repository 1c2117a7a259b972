"""What leaves the lab whole: `blueberry export`, as text that other programs read, and `blueberry backup`."""

from __future__ import annotations

from pathlib import Path

import click

from db.backup import back_up
from db.export import export_lab
from server.desk import Desk


@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("blueberry-export.jsonl"),
    show_default=True,
    help="A file ending in .jsonl, or a folder for CSV files.",
)
def export(desk: Desk, output: Path) -> None:
    """Write the whole lab as JSON Lines or CSV, without secrets."""
    key = desk.lab.openrouter.api_key
    counts = export_lab(desk.lab.store, output, secret=key.get_secret_value() if key else None)
    rows = sum(counts.values())
    desk.console.print(f"wrote {rows} rows of {len(counts)} tables to {output}")
    desk.say({"output": str(output), "rows": counts})


@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="A file, or a folder for one named by the time (UTC); LAB/backups/ by default.",
)
@click.option("--force", is_flag=True, help="Replace a file of that name.")
def backup(desk: Desk, output: Path | None, force: bool) -> None:
    """Copy the database, while everything works on.

    The copy is checked. No key is in it: .env is not part of it, nor are blueberry.toml, runs/ and data/. To restore
    it, stop the runner and close the chat clients, move it to lab.db, and delete lab.db-wal and lab.db-shm.
    """
    made = back_up(desk.folder, output, force=force)
    desk.console.print(f"wrote {made.path} ({made.bytes / 2**20:.1f} MiB), and checked it", markup=False)
    desk.console.print("no key is in it: .env is not part of it, nor are blueberry.toml, runs/ and data/")
    desk.console.print(made.restore, markup=False)
    desk.say({"output": str(made.path), "bytes": made.bytes, "restore": made.restore})
