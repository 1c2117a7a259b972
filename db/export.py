"""The whole lab as text that other programs read: JSON Lines, or one CSV file a table. No secrets are in the store;
as a second fence, the lab's API key is replaced wherever it would appear.
"""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from db.errors import RefusedError
from db.store import Store

_HIDDEN = ("experiments_fts%", "sqlite_%", "_sqlite_%")


def export_lab(store: Store, output: Path, *, secret: str | None = None) -> dict[str, int]:
    """Writes every table, read in one transaction; returns the rows written of each.

    Args:
        output: a file that ends in `.jsonl` (lines `{"table": ..., "row": {...}}`), or a folder for CSV files.
        secret: text that must not leave the lab.

    Raises:
        RefusedError: the output cannot be written; nothing is left of it.
    """
    try:
        if output.suffix in (".jsonl", ".ndjson"):
            return _write_json_lines(store, output, secret)

        if output.suffix:
            raise RefusedError(
                f"cannot export to {output.name}: use a file ending in .jsonl, or a folder for CSV files"
            )

        return _write_csv(store, output, secret)
    except OSError as error:
        raise RefusedError(f"cannot write {output}: {error.strerror}; nothing was exported") from None


def _write_json_lines(store: Store, output: Path, secret: str | None) -> dict[str, int]:
    counts: dict[str, int] = {}
    temporary = output.with_name(f".{output.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file, store.transaction():
            for table in _tables(store):
                counts[table] = 0
                for row in _rows(store, table):
                    file.write(_scrub(json.dumps({"table": table, "row": row}, ensure_ascii=False), secret) + "\n")
                    counts[table] += 1

        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)

    return counts


def _write_csv(store: Store, folder: Path, secret: str | None) -> dict[str, int]:
    counts: dict[str, int] = {}
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[Path, Path] = {}
    try:
        with store.transaction():
            for table in _tables(store):
                counts[table] = 0
                target = folder / f"{table}.csv"
                if target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, f"{target.name} in it is a folder")

                parts[target] = folder / f".{table}.csv.part"
                with parts[target].open("w", encoding="utf-8", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerow([row["name"] for row in store.rows(f"PRAGMA table_info({table})")])
                    for row in _rows(store, table):
                        writer.writerow([_scrub(v, secret) if isinstance(v, str) else v for v in row.values()])
                        counts[table] += 1

        for target, part in parts.items():  # only when all of them are whole
            part.replace(target)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)

        if is_new and not any(folder.iterdir()):
            folder.rmdir()

    return counts


def _tables(store: Store) -> list[str]:
    hidden = " AND ".join("name NOT LIKE ?" for _ in _HIDDEN)
    rows = store.rows(f"SELECT name FROM sqlite_master WHERE type = 'table' AND {hidden} ORDER BY name", _HIDDEN)
    return [row["name"] for row in rows]


def _rows(store: Store, table: str) -> Iterator[dict[str, Any]]:
    return iter(store.database.query(f"SELECT * FROM {table}"))


def _scrub(text: str, secret: str | None) -> str:
    return text.replace(secret, "[secret]") if secret else text
