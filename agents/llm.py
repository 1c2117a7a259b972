"""A language model's answer in the shape that was asked for, or an error that says what happened.

    answer = ask(lab, agent="reviewer", prompt=..., schema=GivenReview)

Each call is written to the ledger before it is sent, at its worst case, and closed with what it really cost. A
malformed answer is sent back with the error, a passing failure is tried again, both within settings.llm.attempts
calls. Nothing is ever made up in place of an answer.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from agents.openrouter import Message, Reply, send
from db.errors import LabError
from db.interactions import close_interaction, open_interaction, usd_today
from db.lab import Lab

T = TypeVar("T", bound=BaseModel)

_PAUSES = (0.5, 2.0, 5.0, 10.0)
_LONGEST_WAIT = 20.0
"""A provider that asks to wait longer than this is given up; the caller may come back."""

_MOST_PROBLEMS = 1_500


class LLMError(LabError):
    """A call to a language model that brought no usable answer. Says what happened and what to do next."""


class Answer(BaseModel, Generic[T]):
    """What the model said, and the interaction it stands in."""

    model_config = ConfigDict(frozen=True)

    value: T
    interaction_id: int


def has_model(lab: Lab) -> bool:
    """Whether there is a key for a language model."""
    key = lab.openrouter.api_key
    return key is not None and bool(key.get_secret_value().strip())


def ask(
    lab: Lab,
    *,
    agent: str,
    prompt: str,
    schema: type[T],
    experiment_id: int | None = None,
    task_id: int | None = None,
) -> Answer[T]:
    """Asks the lab's model and returns its answer as a `schema`. Never called inside a transaction.

    Raises:
        LLMError: no key, over the day's dollars, refused, unreachable, or malformed after all attempts.
    """
    if not has_model(lab):
        raise LLMError(
            "there is no key for a language model; set OPENROUTER_API_KEY in the environment or in "
            f"{lab.folder / '.env'} (chmod 600), or give a proposal, review or revision of your own"
        )

    settings = lab.settings.llm
    shape: dict[str, Any] | None = schema.model_json_schema()
    messages: list[Message] = [{"role": "user", "content": prompt}]
    problem = ""
    for attempt in range(settings.attempts):
        interaction_id = _open(lab, messages, agent=agent, experiment_id=experiment_id, task_id=task_id)
        started = time.monotonic()
        reply = send(lab.openrouter, settings, messages, shape)
        value, problem = _understand(reply, schema)
        _close(lab, interaction_id, reply, _scrubbed(lab, problem), time.monotonic() - started)
        if value is not None:
            return Answer(value=value, interaction_id=interaction_id)

        wait = reply.wait_seconds if reply.wait_seconds is not None else _PAUSES[min(attempt, len(_PAUSES) - 1)]
        if attempt + 1 == settings.attempts or (reply.problem and reply.retry == "no") or wait > _LONGEST_WAIT:
            break

        if reply.retry == "without schema":
            shape = None  # the schema stands in the prompt too
        elif reply.text:
            messages = [
                *messages[:1],
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": _correction(problem)},
            ]
        else:
            time.sleep(wait)

    raise LLMError(
        f"{agent}: {settings.model} gave no usable answer: {_scrubbed(lab, problem)}; "
        f"nothing was invented in its place. Each call is in the ledger (interaction {interaction_id} is the last)"
    )


def parse(text: str, schema: type[T]) -> T:
    """The first JSON object in a model's answer, tolerating code fences and text around it.

    Raises:
        ValueError: there is none, it is cut off, or it is not a valid `schema`.
    """
    fenced = re.search(r"```(?:json)?\s*(\{.*)", text, re.DOTALL)
    source = fenced.group(1) if fenced else text[text.find("{") :] if "{" in text else ""
    if not source:
        raise ValueError("the answer holds no JSON object")

    try:
        value, _ = json.JSONDecoder().raw_decode(source)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("the answer holds half a character (a lone surrogate)") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the answer is not valid JSON: {error}") from None

    try:
        return schema.model_validate(value)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'the object'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise ValueError("; ".join(problems)[:_MOST_PROBLEMS]) from None


def _understand(reply: Reply, schema: type[T]) -> tuple[T | None, str]:
    if reply.problem is not None or reply.text is None:
        return None, reply.problem or "no answer"

    try:
        return parse(reply.text, schema), ""
    except ValueError as error:
        return None, str(error)


def _correction(problem: str) -> str:
    return (
        f"That answer cannot be used: {problem}\n\nAnswer again with one JSON object that is valid under the schema, "
        "and nothing else."
    )


def _open(lab: Lab, messages: list[Message], **who: Any) -> int:
    settings = lab.settings.llm
    text = messages[0]["content"]
    for message in messages[1:]:
        text += f"\n\n--- {message['role']} ---\n{message['content']}"

    # A token is at least one byte, so no call can cost more than this.
    usd = (len(text.encode("utf-8", "replace")) + settings.max_tokens) * settings.usd_per_million_tokens / 1e6
    with lab.store.transaction():
        spent = usd_today(lab.store)
        if spent + usd > settings.max_usd_per_day:
            raise LLMError(
                f"this call could cost ${usd:.2f}, and ${spent:.2f} of the ${settings.max_usd_per_day:.2f} a day "
                "(llm.max_usd_per_day in blueberry.toml) are spent; raise it, wait for tomorrow (UTC), or give a "
                "proposal, review or revision of your own"
            )

        return open_interaction(lab.store, {**who, "model": settings.model, "prompt": _scrubbed(lab, text), "usd": usd})


def _close(lab: Lab, interaction_id: int, reply: Reply, problem: str, seconds: float) -> None:
    values: dict[str, Any] = {
        "status": "answered" if not problem else "invalid" if reply.text is not None else "failed",
        "answer": None if reply.text is None else _scrubbed(lab, reply.text),
        "error": problem or None,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "latency_seconds": seconds,
    }
    usd = _usd(lab, reply)
    close_interaction(lab.store, interaction_id, values if usd is None else {**values, "usd": usd})


def _usd(lab: Lab, reply: Reply) -> float | None:
    """What the call cost; None leaves it at its worst case, which a call without an answer may have cost."""
    if reply.usd is not None:
        return reply.usd

    if not reply.charged:
        return 0.0

    if reply.prompt_tokens is None or reply.completion_tokens is None:
        return None

    return (reply.prompt_tokens + reply.completion_tokens) * lab.settings.llm.usd_per_million_tokens / 1e6


def _scrubbed(lab: Lab, text: str) -> str:
    key = lab.openrouter.api_key
    secret = key.get_secret_value().strip() if key else ""
    return text.replace(secret, "[key]") if secret else text
