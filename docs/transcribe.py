"""Writes docs/transcript.md: a real MCP client talks to the server over stdio, from a question to a verdict.

    .venv/bin/python docs/transcribe.py

Starts `python -m server` on a new lab of preset nano, as a chat client would, and writes down each call and its answer,
long texts and lists cut. The first half is spoken in the 2025-11-25 protocol, the rest, by a second client after the
first has left, in the 2026-07-28 one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import anyio
from mcp import Client, StdioServerParameters

ROOT = Path(__file__).parents[1]
_TEXT, _ITEMS = 400, 4

_INTRODUCTION = """\
# A session, as it went over the wire

Written by `docs/transcribe.py` from a real run on a CPU: every call an MCP client made and the structured answer that
it got, long texts and lists cut (…). Nobody edited it.
"""


class Transcript:
    """A client whose calls are written down."""

    def __init__(self, client: Client, lines: list[str]) -> None:
        self._client = client
        self._lines = lines

    async def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """Calls a tool; its structured answer."""
        result = await self._client.call_tool(name, arguments)
        answer: Any = result.structured_content
        if result.is_error:
            answer = {"error": getattr(result.content[0], "text", "")}

        shown = json.dumps(_cut(answer), indent=1, ensure_ascii=False)
        given = json.dumps(arguments, ensure_ascii=False)
        self._lines.append(f"\n## {name}\n\n```json\n{given}\n```\n\nanswers\n\n```json\n{shown}\n```\n")
        return answer if isinstance(answer, dict) else {}


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _TEXT else value[:_TEXT] + "…"

    if isinstance(value, list):
        return [_cut(item) for item in value[:_ITEMS]] + (["…"] if len(value) > _ITEMS else [])

    if isinstance(value, dict):
        return {name: _cut(item) for name, item in value.items()}

    return value


async def _talk(folder: Path) -> list[str]:
    server = StdioServerParameters(command=sys.executable, args=["-m", "server", "--lab", str(folder)], cwd=ROOT)
    lines = [_INTRODUCTION]
    async with Client(server, mode="legacy") as client:
        lines.append(f"\nThe first client speaks {client.protocol_version}.\n")
        chat = Transcript(client, lines)
        await chat.call("status")
        await chat.call("suggest", proposals=[{"title": "One expert a token", "treatment": {"topk": 1}}])
        idea = {
            "title": "A tenth of the learning rate",
            "hypothesis": "At this budget a lower lr leaves the model undertrained, so val_bpb rises.",
            "domain": "optimization",
            "treatment": {"lr": 0.001},
        }
        made = await chat.call("suggest", proposals=[idea], idempotency_key="my first idea")
        key = made["experiments"][0]["id"]
        await chat.call("review", experiment_id=key)
        scores = {"novelty": 7, "feasibility": 10, "impact": 8, "clarity": 9, "efficiency": 9}
        await chat.call("review", experiment_id=key, review={**scores, "feedback": "Cheap, and it must show."})
        await chat.call("enqueue", experiment_ids=[key])
        await chat.call("run")

    async with Client(server, mode="2026-07-28") as client:
        lines.append(f"\nIt has gone, and its server with it. Another comes, and speaks {client.protocol_version}.\n")
        chat = Transcript(client, lines)
        seen = await chat.call("status", wait_seconds=10)
        while await _status_of(client, key) not in ("concluded", "failed"):
            await client.call_tool("status", {"wait_seconds": 20, "since_event": seen["event_id"]})

        await chat.call("status", experiment_id=key)
        await chat.call("run", action="stop")

    return lines


async def _status_of(client: Client, experiment_id: int) -> str:
    result = await client.call_tool("status", {"experiment_id": experiment_id})
    answer: Any = result.structured_content
    return str(answer["experiment"]["status"])


def main() -> None:
    """Writes the transcript."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Path(folder) / "lab"
        lab.mkdir()
        (lab / "blueberry.toml").write_text('preset = "nano"\n')
        lines = anyio.run(_talk, lab)
        text = "".join(lines).replace(str(lab), "~/.blueberry")

    (ROOT / "docs" / "transcript.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
