"""The MCP server: the verbs as tools, each with typed, bounded arguments and a structured answer within 25 seconds.

This module alone knows the SDK. What the verbs do is in server/tools/, as plain functions that raise LabError; here
they are run in threads, and what they raise is put into words for the model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.to_thread
from mcp.server import MCPServer
from mcp.server.mcpserver.context import Context
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.types import Image
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, ValidationError

from db.errors import LabError
from db.lab import Lab
from server.arguments import explain
from server.tools.enqueue import enqueue
from server.tools.improve import improve
from server.tools.report import report
from server.tools.review import review
from server.tools.run import run
from server.tools.status import status
from server.tools.suggest import suggest
from server.views import Illustrated
from server.vocabulary import knobs_by_name

CALL_SECONDS = 24.0
"""Clients cut calls at about 60 s, some sooner; no verb should come near this fence."""

INSTRUCTIONS = """\
Blueberry is a research lab for Mixture-of-Experts language-model training on one GPU (or a CPU). You are its
researcher: you ask questions as experiments, a separate runner daemon trains, and verdicts come from paired runs.

The flow: suggest -> review -> (improve -> review) -> enqueue -> run -> status.
- An experiment compares a treatment (config overrides such as {"top_k": 1}) with the lab's baseline at equal budget, on
  val_bpb (bits per byte on held-out text, lower is better), over several seeds.
- A review of 7 or more approves; below it an experiment needs work, and `improve` makes a new one in its place.
- You may give your own proposals, reviews and revisions; otherwise the lab's agents make them. Answers hold a `brief`
  when your own would help.
- `run` returns at once; training goes on without you. `status(wait_seconds=20)` waits for the next change; pass
  since_event=event_id of its last answer to go on. Verdicts appear even if you leave.
- An answer with `working` is not finished: it goes on in the background; status(task_id) shows it. Calls with an
  idempotency_key can be repeated safely: the same key is the same call.
- `report` writes an experiment, or the whole lab, down for people, and shows its plots.
- Experiments, runs, tasks and campaigns have integer ids of their own. Every answer ends with `next`.
Report effects with their interval and number of seeds, and never claim more than the verdict says.
"""

_LOG = logging.getLogger("server")

_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=True)
_STEERS = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)
_READS = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)
_WRITES = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False)

_OURS = frozenset({"lab", "patience"})
"""Parameters of the verbs that are no arguments of the tools."""

_TOOLS: list[tuple[str, Callable[..., BaseModel], ToolAnnotations]] = [
    ("Suggest experiments", suggest, _ADDS),
    ("Review experiments", review, _ADDS),
    ("Improve experiments", improve, _ADDS),
    ("Queue experiments", enqueue, _ADDS),
    ("Start or stop the runner", run, _STEERS),
    ("Look at the lab", status, _READS),
    ("Write a report", report, _WRITES),
]


def create_app(folder: Path) -> MCPServer:
    """The server of the lab in `folder`.

    The lab is opened for every call: so its configuration is always the one on disk, a broken one reaches the model
    as an error of that call rather than as a server that does not start, and no state lives in this process.
    """
    return MCPServer(
        "blueberry",
        title="Blueberry research lab",
        version="0.1.0",
        instructions=INSTRUCTIONS,
        tools=[_tool(folder, title, verb, annotations) for title, verb, annotations in _TOOLS],
        log_level="WARNING",
        subscriptions=False,
    )


class StrictTool(Tool):
    """A tool that refuses arguments it does not know, ends in time, and puts every failure into words."""

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        """Runs the tool; whatever goes wrong is a ToolError, the one kind whose text reaches the model."""
        try:
            with anyio.fail_after(CALL_SECONDS):
                return await super().run(arguments, context, convert_result=convert_result)
        except TimeoutError:
            raise ToolError(
                f"{self.name} has not answered within {CALL_SECONDS:.0f} s and goes on in the background; look with "
                "status(), or repeat the call with the same idempotency_key"
            ) from None
        except ToolError as error:
            raise ToolError(self._in_words(error)) from error

    def _in_words(self, error: ToolError) -> str:
        cause = error.__cause__
        if isinstance(cause, LabError):
            return str(cause)

        if isinstance(cause, ValidationError) and not isinstance(error, UnexpectedToolError):
            return explain(cause, self.fn_metadata.arg_model)

        _LOG.error("%s failed", self.name, exc_info=cause or error)
        return (
            f"{self.name} met an internal error ({type(cause or error).__name__}), which is a bug in Blueberry and "
            "not in your call; the lab is intact. The traceback is in logs/server.log of the lab; `blueberry doctor`, "
            "in a terminal, looks for a cause"
        )


def _tool(folder: Path, title: str, verb: Callable[..., BaseModel], annotations: ToolAnnotations) -> Tool:
    async def call(**arguments: Any) -> BaseModel | CallToolResult:
        # Abandoned on cancellation: each write of a verb is a transaction, so its thread may finish alone.
        answer = await anyio.to_thread.run_sync(partial(_in_lab, folder, verb, arguments), abandon_on_cancel=True)
        return _with_images(answer) if isinstance(answer, Illustrated) else answer

    signature = inspect.signature(verb, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name not in _OURS]
    cast("Any", call).__signature__ = signature.replace(parameters=own)
    tool = StrictTool.from_function(
        call, name=verb.__name__, title=title, description=_description(verb), annotations=annotations
    )
    model = tool.fn_metadata.arg_model
    model.model_config["extra"] = "forbid"  # the SDK drops unknown arguments silently otherwise
    model.model_rebuild(force=True)
    tool.parameters = model.model_json_schema(by_alias=True)
    return tool


def _description(verb: Callable[..., BaseModel]) -> str:
    text = inspect.getdoc(verb) or ""
    return f"{text}\n\n{knobs_by_name()}" if verb is suggest else text


def _with_images(answer: Illustrated) -> CallToolResult:
    return CallToolResult(
        content=[
            TextContent(type="text", text=answer.model_dump_json(indent=2)),
            *(Image(path=path).to_image_content() for path in answer.images),
        ],
        structured_content=answer.model_dump(mode="json"),
    )


def _in_lab(folder: Path, verb: Callable[..., BaseModel], arguments: dict[str, Any]) -> BaseModel:
    lab = Lab(folder)
    try:
        return verb(lab, **arguments)
    finally:
        lab.close()
