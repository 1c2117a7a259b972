"""How the server answers when something takes too long or breaks; and answers that come later."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp_types import CallToolResult, ToolAnnotations
from pydantic import BaseModel

import server.app
from agents.proposals import Suggested
from db.errors import RefusedError
from db.lab import Lab
from db.tasks import finish_task, get_task
from server.app import create_app
from server.tools.status import status
from server.tools.suggest import suggest
from server.views import View
from tests.server.conftest import put_experiment


class Answer(View):
    """What the verbs below answer."""

    next: str


def sleepy(lab: Lab) -> Answer:
    """Takes its time."""
    time.sleep(0.6)
    return Answer(next="late")


def buggy(lab: Lab) -> Answer:
    """Breaks."""
    raise KeyError("a detail that is nobody's business")


def unwilling(lab: Lab) -> Answer:
    """Refuses."""
    raise RefusedError("not today; try tomorrow")


def untruthful(lab: Lab) -> Answer:
    """Returns what it did not promise."""
    return {"nothing": "of it"}  # type: ignore[return-value]


def call(folder: Path, verb: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Any:
    monkeypatch.setattr(server.app, "_TOOLS", [("A verb", verb, ToolAnnotations())])

    async def ask() -> CallToolResult:
        async with Client(create_app(folder)) as client:
            return await client.call_tool(verb.__name__, arguments)

    result = anyio.run(ask)
    text = result.content[0]
    return str(text.text) if result.is_error and text.type == "text" else result.structured_content


def test_the_fence_ends_a_call_and_says_that_the_work_goes_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.app, "CALL_SECONDS", 0.2)
    text = call(lab.folder, sleepy, monkeypatch)
    assert "goes on in the background" in text
    assert "status()" in text


@pytest.mark.parametrize("verb", [buggy, untruthful])
def test_a_bug_is_logged_and_named_as_one(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, verb: Callable[..., BaseModel]
) -> None:
    text = call(lab.folder, verb, monkeypatch)
    assert "internal error" in text
    assert "logs/server.log" in text
    assert "nobody's business" not in text
    assert any(record.exc_info for record in caplog.records if record.name == "server")


def test_a_refusal_reaches_the_model_as_it_is(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(lab.folder, unwilling, monkeypatch) == "not today; try tomorrow"


def test_an_answer_that_takes_longer_is_picked_up_with_the_same_key(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-test")
    monkeypatch.setenv("OPENROUTER_BASE_URL", "http://127.0.0.1:9/")
    handle = suggest(lab, count=1, idempotency_key="slow", patience=0.2)
    assert handle.working is not None
    assert handle.working.kind == "suggest"
    assert f"task_id={handle.working.task_id}" in handle.next
    waiting = status(lab, task_id=handle.working.task_id)
    assert waiting.task is not None
    assert waiting.task.status == "queued"

    experiment = put_experiment(lab)
    done = Suggested(experiments=[experiment], refused=[]).model_dump(mode="json")
    finish_task(lab.store, handle.working.task_id, result=done)
    answer = suggest(lab, count=1, idempotency_key="slow", patience=0.2)
    assert [item.id for item in answer.experiments] == [experiment.id]
    task = status(lab, task_id=handle.working.task_id, wait_seconds=5).task
    assert task is not None
    assert (task.status, task.experiment_ids) == ("done", [experiment.id])


def test_a_failed_answer_is_an_error_with_its_reason(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-test")
    handle = suggest(lab, count=1, idempotency_key="poor", patience=0.0)
    assert handle.working is not None
    finish_task(lab.store, handle.working.task_id, error="the model gave no usable answer; try again")
    with pytest.raises(RefusedError, match="no usable answer"):
        suggest(lab, count=1, idempotency_key="poor", patience=0.0)

    assert get_task(lab.store, handle.working.task_id).status == "failed"
