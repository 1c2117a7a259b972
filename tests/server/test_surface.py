"""The public face of the server is a file, tools.json, changed on purpose. To write it anew after such a change:

python tests/server/test_surface.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio

from moe.config import KNOBS
from server.app import create_app

SNAPSHOT = Path(__file__).with_name("tools.json")
ROOT = Path(__file__).parents[2]

HEAVY = ("torch", "optuna", "openai", "datasette", "matplotlib", "scipy")


def surface() -> list[dict[str, Any]]:
    tools = anyio.run(create_app(Path("nowhere")).list_tools)
    return [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]


def test_tools_are_those_of_the_snapshot() -> None:
    expected = json.loads(SNAPSHOT.read_text())
    assert surface() == expected, "changed on purpose? python tests/server/test_surface.py"


def test_every_argument_is_described_and_every_text_and_number_bounded() -> None:
    for tool in surface():
        assert len(tool["description"]) > 200, tool["name"]
        assert tool["inputSchema"]["additionalProperties"] is False
        assert tool["outputSchema"]["properties"]["next"]
        for name, schema in tool["inputSchema"]["properties"].items():
            assert schema.get("description") or "$ref" in json.dumps(schema), (tool["name"], name)
            for part in [schema, *schema.get("anyOf", [])]:
                if part.get("type") in ("integer", "number"):
                    assert "minimum" in part, (tool["name"], name)

                if part.get("type") == "string" and "enum" not in part:
                    assert "maxLength" in part, (tool["name"], name)

                if part.get("type") == "array":
                    assert "maxItems" in part, (tool["name"], name)


def test_suggest_names_every_knob_that_a_treatment_may_change_and_no_client_cuts_it() -> None:
    described = next(tool["description"] for tool in surface() if tool["name"] == "suggest")
    for name, knob in KNOBS.items():
        assert (re.search(rf"\b{name}\b", described) is not None) == (knob.role in ("science", "post")), name

    assert all(len(tool["description"]) < 2000 for tool in surface())  # Claude Code shows the first 2 KB


def test_the_tools_fit_into_a_conversation() -> None:
    shown = [{name: tool[name] for name in ("name", "description", "inputSchema")} for tool in surface()]
    assert len(json.dumps(shown)) < 24_000


def test_a_starting_server_loads_nothing_heavy() -> None:
    script = (
        "import sys; from pathlib import Path; import server.__main__; server.app.create_app(Path('nowhere'));"
        f"sys.exit(' '.join(name for name in {HEAVY} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_the_client_configuration_at_the_root_names_this_server() -> None:
    [[name, entry]] = json.loads((ROOT / "mcp.json").read_text())["mcpServers"].items()
    assert name == "blueberry"
    assert entry == {"command": ".venv/bin/python", "args": ["-m", "server"], "env": {"BLUEBERRY_LAB": ".demo-lab"}}


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(surface(), indent=1, ensure_ascii=False) + "\n")
