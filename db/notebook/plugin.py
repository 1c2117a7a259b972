"""The Datasette plugin of a lab: pages, queries, and how a cell is written. Registered by serving.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from pluggy import HookimplMarker

from db.draw import STYLES
from db.formats import FILTERS, badge, chips
from db.notebook.canned import QUERIES
from db.notebook.pages import read_experiment, read_front, read_run

DATABASE = "lab"
CONFIGS = frozenset({"baseline", "config", "score", "facts", "arguments", "result"})
LOGS = frozenset({"log_tail", "prompt", "answer", "error"})
STATES = frozenset({"status", "verdict", "decision"})
LINKS = {"experiment_id": "experiments", "run_id": "runs", "insight_id": "insights"}
PAGES: dict[str, Callable[[Path, int], object]] = {"experiments": read_experiment, "runs": read_run}

hookimpl = HookimplMarker("datasette")


@hookimpl
def canned_queries(datasette: Any, database: str) -> dict[str, dict[str, object]]:
    """The questions of canned.py."""
    return QUERIES if database == DATABASE else {}


@hookimpl
def prepare_jinja2_environment(env: Environment) -> None:
    """The filters that templates write numbers with, and the styles of what db/ draws."""
    env.filters.update(FILTERS)
    env.globals["picture_styles"] = Markup(STYLES.read_text(encoding="utf-8"))


@hookimpl
def extra_template_vars(
    table: str | None, view_name: str, request: Any, datasette: Any
) -> Callable[[], Awaitable[dict[str, object]]]:
    """What the pages of our own show, read in a thread."""

    async def read() -> dict[str, object]:
        path = Path(datasette.get_database(DATABASE).path)
        shown: dict[str, object] = {"lab_folder": str(path.parent)}
        if view_name == "index":
            shown["front"] = await asyncio.to_thread(read_front, path)
        elif view_name == "row" and table in PAGES:
            shown["page"] = await asyncio.to_thread(PAGES[table], path, int(request.url_vars["pks"]))

        return shown

    return read


@hookimpl
def render_cell(row: Any, value: Any, column: str, table: str | None, datasette: Any) -> Markup | None:
    """A cell as a person reads it; the exports (JSON, CSV) keep the stored value."""
    if isinstance(value, str):
        key = "id" if table == "experiments" else "experiment_id"
        if column == "title" and key in row.keys() and isinstance(row[key], int):  # noqa: SIM118  # a sqlite3.Row
            return _link(datasette, "experiments", row[key], value)

        if column in STATES:
            return badge(value)

        if column == "treatment" and value.startswith("{"):
            return chips(json.loads(value))

        if column in CONFIGS and value.startswith(("{", "[")):
            content = json.loads(value)
            return _folded(f"{len(content)} values", json.dumps(content, indent=2, ensure_ascii=False))

        if column in LOGS and ("\n" in value or len(value) > 160):
            return _folded(value.strip().rpartition("\n")[2][:160], value)

        if column == "at" or column.endswith("_at"):
            return Markup('<time title="{}">{}</time>').format(value, value[:19].replace("T", " "))

    if isinstance(value, float):
        return Markup('<span title="{}">{}</span>').format(repr(value), f"{value:.5g}")

    if table not in PAGES and column in LINKS and isinstance(value, int):
        return _link(datasette, LINKS[column], value, str(value))

    return None


def _folded(summary: str, text: str) -> Markup:
    return Markup("<details><summary>{}</summary><pre>{}</pre></details>").format(summary, text)


def _link(datasette: Any, table: str, key: int, text: str) -> Markup:
    return Markup('<a href="{}">{}</a>').format(datasette.urls.row(DATABASE, table, str(key)), text)
