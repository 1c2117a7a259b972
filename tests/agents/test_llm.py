"""The language model's door, against a real server that misbehaves in every way that OpenRouter has been seen to."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel, Field

from agents.llm import LLMError, ask, has_model, parse
from db.interactions import usd_today
from db.lab import Lab
from db.store import Store

if TYPE_CHECKING:
    from tests.agents.conftest import ScriptedModel

KEY = "sk-or-v1-0123456789abcdef"
QUICK = {"Retry-After": "0"}


class Colour(BaseModel):
    """What the tests ask for."""

    name: str
    share: float = Field(ge=0.0, le=1.0)


GOOD = {"name": "blue", "share": 0.5}


def paint(lab: Lab) -> Colour:
    return ask(lab, agent="painter", prompt="Which colour?", schema=Colour).value


def rows(lab: Lab) -> list[dict[str, Any]]:
    return lab.store.rows("SELECT * FROM interactions ORDER BY id")


def test_an_answer_is_validated_and_its_call_recorded_whole(lab: Lab, model: ScriptedModel) -> None:
    model.says(GOOD)
    answer = ask(lab, agent="painter", prompt="Which colour?", schema=Colour)
    assert answer.value == Colour(name="blue", share=0.5)
    row = rows(lab)[0]
    assert row.pop("latency_seconds") > 0
    assert row.pop("created_at") <= row.pop("answered_at")
    assert row == {
        "id": answer.interaction_id,
        "task_id": None,
        "experiment_id": None,
        "agent": "painter",
        "model": "anthropic/claude-sonnet-4.5",
        "prompt": "Which colour?",
        "answer": json.dumps(GOOD),
        "status": "answered",
        "error": None,
        "prompt_tokens": 900,
        "completion_tokens": 80,
        "usd": 0.0123,
    }


def test_the_request_names_key_site_model_and_schema(lab: Lab, model: ScriptedModel) -> None:
    model.says(GOOD)
    paint(lab)
    request = model.requests[0]
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["http-referer"] == "https://example.org/lab"
    assert request.headers["x-title"] == "A lab"
    assert request.body["model"] == lab.settings.llm.model
    assert request.body["max_tokens"] == lab.settings.llm.max_tokens
    assert request.body["response_format"]["json_schema"]["schema"] == Colour.model_json_schema()


def test_a_call_is_written_at_its_worst_case_before_it_is_sent(lab: Lab, model: ScriptedModel) -> None:
    seen: list[dict[str, Any]] = []

    def look() -> None:
        store = Store(lab.folder / "lab.db", read_only=True)
        seen.extend(store.rows("SELECT status, usd, answered_at FROM interactions"))
        store.close()

    lab.store.data_version()  # the database exists
    model.says(GOOD, meanwhile=look)
    paint(lab)
    worst = (len("Which colour?") + lab.settings.llm.max_tokens) * lab.settings.llm.usd_per_million_tokens / 1e6
    assert seen == [{"status": "sent", "usd": pytest.approx(worst), "answered_at": None}]


def test_without_a_price_the_configured_one_times_the_tokens_is_charged(lab: Lab, model: ScriptedModel) -> None:
    model.says(GOOD, cost=None)
    paint(lab)
    assert usd_today(lab.store) == pytest.approx(980 * 15 / 1e6)


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"name": "blue", "share": 0.5}\n```',
        'Here you are:\n```\n{"name": "blue", "share": 0.5}\n```\nAnything else? {"name": 1}',
        '{"name": "blue", "share": 0.5} I hope that this helps {',
        'Sure! {"name": "blue", "share": "0.5"}',
    ],
)
def test_fences_and_text_around_the_object_are_tolerated(text: str) -> None:
    assert parse(text, Colour) == Colour(name="blue", share=0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON object"),
        ("blue", "no JSON object"),
        ('{"name": "blue", "sha', "not valid JSON"),
        ('{"name": "blue"}', "share: Field required"),
        ('{"name": "blue", "share": 7}', "share: Input should be less than or equal to 1"),
        ('{"name": "blue", "share": NaN}', "share"),
        ('{"name": "\\ud800", "share": 0.5}', "half a character"),
        ("{" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
    ],
)
def test_a_malformed_answer_is_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text, Colour)


def test_a_wrong_answer_is_sent_back_with_the_error(lab: Lab, model: ScriptedModel) -> None:
    model.says({"name": "blue", "share": 7})
    model.says(GOOD)
    assert paint(lab).share == 0.5
    first, second = rows(lab)
    assert (first["status"], second["status"]) == ("invalid", "answered")
    assert "less than or equal to 1" in first["error"]
    assert "less than or equal to 1" in model.prompts[1]
    assert [message["role"] for message in model.requests[1].body["messages"]] == ["user", "assistant", "user"]
    assert '"share": 7' in second["prompt"]


def test_a_model_that_never_answers_in_form_is_an_error_after_all_attempts(lab: Lab, model: ScriptedModel) -> None:
    for _ in range(3):
        model.says('{"name": "blue", "sh')

    with pytest.raises(LLMError, match="no usable answer: the answer is not valid JSON"):
        paint(lab)

    assert [row["status"] for row in rows(lab)] == ["invalid"] * 3
    assert len(model.requests) == 3


@pytest.mark.parametrize("finish_reason", [None, "length"])
def test_a_cut_off_answer_is_not_taken_even_if_it_can_be_read(
    lab: Lab, model: ScriptedModel, finish_reason: str | None
) -> None:
    model.says(GOOD, finish_reason=finish_reason)
    model.says({"name": "red", "share": 0.1})
    assert paint(lab).name == "red"
    assert "cut off" in rows(lab)[0]["error"]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_failure_is_tried_again(lab: Lab, model: ScriptedModel, status: int) -> None:
    model.fails(status, "slow down", headers=QUICK)
    model.says(GOOD)
    assert paint(lab).name == "blue"
    failed, answered = rows(lab)
    assert (failed["status"], failed["usd"], answered["status"]) == ("failed", 0.0, "answered")
    assert "slow down" in failed["error"]


def test_a_failure_without_a_hint_waits_a_little(lab: Lab, model: ScriptedModel) -> None:
    model.fails(500, "oops")
    model.says(GOOD)
    started = time.monotonic()
    paint(lab)
    assert time.monotonic() - started >= 0.5


def test_a_long_retry_after_is_not_waited_out(lab: Lab, model: ScriptedModel) -> None:
    model.fails(429, "come back tomorrow", headers={"Retry-After": "3600"})
    with pytest.raises(LLMError, match="too many requests; try again later"):
        paint(lab)

    assert len(model.requests) == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "check OPENROUTER_API_KEY"), (402, "add some"), (403, "may not use"), (404, "set llm.model")],
)
def test_a_lasting_refusal_is_not_repeated_and_says_what_to_do(
    lab: Lab, model: ScriptedModel, status: int, said: str
) -> None:
    model.fails(status, "no")
    with pytest.raises(LLMError, match=said):
        paint(lab)

    assert len(model.requests) == 1


def test_the_key_is_in_no_error_and_in_no_row(lab: Lab, model: ScriptedModel) -> None:
    model.fails(401, f"Incorrect API key provided: {KEY}")
    with pytest.raises(LLMError) as caught:
        ask(lab, agent="painter", prompt=f"My key is {KEY}", schema=Colour)

    assert "Incorrect API key provided: [key]" in str(caught.value)
    model.says(f"Your key is {KEY}")
    model.says({"name": KEY, "share": 0.5})
    ask(lab, agent="painter", prompt="Which colour?", schema=Colour)
    assert KEY not in str(rows(lab))
    assert KEY not in str(lab.store.rows("SELECT * FROM events"))
    assert KEY not in repr(lab.openrouter)


def test_an_error_body_with_status_200_is_an_error(lab: Lab, model: ScriptedModel) -> None:
    model.sends({"error": {"code": 502, "message": "Provider returned error"}}, headers=QUICK)
    model.says(GOOD)
    assert paint(lab).name == "blue"
    assert "Provider returned error" in rows(lab)[0]["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>gateway</html>", "not a chat completion"),
        (b'{"choices": [{"mess', "not a chat completion"),
        (b"", "not a chat completion"),
        (b"[]", "not a chat completion"),
        (b'{"choices": [], "usage": {"cost": NaN}}', "not a chat completion"),
        (b'{"id": "x"}', "no choices"),
        (b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}', "empty"),
        (b'{"choices": [{"message": {}, "error": {"message": "overloaded"}}]}', "overloaded"),
    ],
)
def test_a_malformed_body_is_an_error(
    configured: Callable[[str], Lab], model: ScriptedModel, body: bytes, said: str
) -> None:
    lab = configured("[llm]\nattempts = 1\n")
    model.sends(body)
    with pytest.raises(LLMError, match=said):
        paint(lab)


def test_a_connection_that_breaks_in_mid_answer_is_charged_at_its_worst_case(
    configured: Callable[[str], Lab], model: ScriptedModel
) -> None:
    lab = configured("[llm]\nattempts = 1\n")
    model.says(GOOD, cut=True)
    with pytest.raises(LLMError, match="broke in mid-answer"):
        paint(lab)

    assert rows(lab)[0]["usd"] > 0.1


def test_a_stalled_answer_is_given_up_and_charged_at_its_worst_case(
    configured: Callable[[str], Lab], model: ScriptedModel
) -> None:
    lab = configured("[llm]\nattempts = 1\ntimeout_seconds = 0.2\n")
    model.says(GOOD, delay=0.6)
    with pytest.raises(LLMError, match=r"no answer within 0\.2 s"):
        paint(lab)

    row = rows(lab)[0]
    assert row["status"] == "failed"
    assert row["usd"] > 0.1


def test_blanks_that_keep_the_connection_open_do_not_extend_the_time(
    configured: Callable[[str], Lab], model: ScriptedModel
) -> None:
    lab = configured("[llm]\nattempts = 1\ntimeout_seconds = 0.3\n")
    model.says(GOOD, blanks=100_000)  # longer than a test may take
    with pytest.raises(LLMError, match="no answer within"):
        paint(lab)


def test_a_server_that_is_not_there_costs_nothing(
    configured: Callable[[str], Lab], model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENROUTER_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}/api/v1")

    lab = configured("[llm]\nattempts = 1\n")
    with pytest.raises(LLMError, match="cannot be reached"):
        paint(lab)

    assert usd_today(lab.store) == 0.0


def test_a_provider_that_knows_no_schemas_is_asked_without(lab: Lab, model: ScriptedModel) -> None:
    model.fails(400, "response_format json_schema is not supported by this model")
    model.says(GOOD)
    assert paint(lab).name == "blue"
    assert "response_format" not in model.requests[1].body


def test_the_days_dollars_are_a_hard_cap(configured: Callable[[str], Lab], model: ScriptedModel) -> None:
    lab = configured("[llm]\nmax_usd_per_day = 0.2\n")
    model.says(GOOD, cost=0.15)
    paint(lab)
    with pytest.raises(LLMError, match=r"\$0\.15 of the \$0\.20 a day \(llm\.max_usd_per_day"):
        paint(lab)

    assert len(model.requests) == 1
    assert len(rows(lab)) == 1


def test_a_cap_of_zero_forbids_calls(configured: Callable[[str], Lab], model: ScriptedModel) -> None:
    with pytest.raises(LLMError, match="max_usd_per_day"):
        paint(configured("[llm]\nmax_usd_per_day = 0\n"))

    assert model.requests == []


def test_without_a_key_there_is_no_model_and_the_error_says_how_to_get_one(lab: Lab) -> None:
    assert not has_model(lab)
    with pytest.raises(LLMError, match="set OPENROUTER_API_KEY"):
        paint(lab)

    assert rows(lab) == []


def test_a_blank_key_is_no_key(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "  ")
    assert not has_model(lab)


@pytest.mark.parametrize(
    ("name", "value"), [("API_KEY", "sk-\u2013dash"), ("API_KEY", "sk-two\nlines"), ("SITE_NAME", "Caf\u00e9")]
)
def test_a_text_that_no_header_can_hold_is_an_error_in_words(
    lab: Lab, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"OPENROUTER_{name}", value)
    with pytest.raises(LLMError, match=f"OPENROUTER_{name} holds a character that no header may") as caught:
        paint(lab)

    assert value not in str(caught.value)
    assert model.requests == []


def test_a_key_with_a_line_end_after_it_works(lab: Lab, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", f" {KEY}\n")
    model.says(GOOD)
    paint(lab)
    assert model.requests[0].headers["authorization"] == f"Bearer {KEY}"
