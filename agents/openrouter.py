"""One call to OpenRouter, whatever comes back: an answer, or a failure in words. Knows no lab and writes nothing.

The client's own retries are off, so that one call is one request and one row of the ledger. The whole call is bounded
in time: OpenRouter sends blanks to keep a slow answer's connection open, which no read time-out would end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from db.settings import Llm, OpenRouter

Message: TypeAlias = dict[str, str]

_MOST_BYTES = 4 * 2**20
_MOST_SAID = 300


class Reply(BaseModel):
    """How one call ended. `charged` is False where the provider cannot have done any work."""

    model_config = ConfigDict(frozen=True)

    text: str | None = None
    problem: str | None = None
    retry: Literal["no", "again", "without schema"] = "no"
    wait_seconds: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usd: float | None = None
    charged: bool = True


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message = _Message()
    finish_reason: str | None = None
    error: Any = None


class _Completion(BaseModel):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


def send(access: OpenRouter, settings: Llm, messages: list[Message], schema: dict[str, Any] | None) -> Reply:
    """Sends the messages and waits for the answer, at most about timeout_seconds."""
    import openai  # half a second: at first use, and only here

    key = access.api_key.get_secret_value().strip() if access.api_key else ""
    site = {"HTTP-Referer": access.site_url or "", "X-Title": access.site_name or ""}
    for name, text in (("API_KEY", key), ("SITE_URL", site["HTTP-Referer"]), ("SITE_NAME", site["X-Title"])):
        if not (text.isascii() and text.isprintable()):
            return Reply(problem=f"OPENROUTER_{name} holds a character that no header may; correct it", charged=False)

    try:
        with (
            openai.OpenAI(
                api_key=key,
                base_url=access.base_url,
                max_retries=0,
                timeout=settings.timeout_seconds,
                default_headers={name: text for name, text in site.items() if text},
            ) as client,
            client.chat.completions.with_streaming_response.create(
                model=settings.model,
                messages=messages,  # type: ignore[arg-type]  # plain dicts of role and content
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                extra_body={} if schema is None else {"response_format": _response_format(schema)},
            ) as response,
        ):
            return _receive(response.iter_bytes(), settings)
    except openai.APITimeoutError:
        return _timed_out(settings)
    except openai.APIStatusError as error:
        return _refused(error.status_code, error.response.headers.get("retry-after"), _said(error.body, error.message))
    except openai.OpenAIError as error:  # APIConnectionError among them
        cause = error.__cause__ or error
        problem = f"{access.base_url} cannot be reached ({cause}); check the network"
        return Reply(problem=problem, retry="again", charged=type(cause).__name__ != "ConnectError")


def _receive(chunks: Iterator[bytes], settings: Llm) -> Reply:
    deadline = time.monotonic() + settings.timeout_seconds
    content = b""
    try:
        for chunk in chunks:
            content += chunk
            if time.monotonic() > deadline:
                return _timed_out(settings)

            if len(content) > _MOST_BYTES:
                return Reply(problem=f"the answer was longer than {_MOST_BYTES} bytes and was given up")
    except Exception as error:  # the transport's own errors; the provider may have done all its work
        return Reply(problem=f"the connection broke in mid-answer ({type(error).__name__})", retry="again")

    return read(content)


def read(content: bytes) -> Reply:
    """The reply in the body of an answer with status 200, which may still be an error or cut off."""
    try:
        completion = _Completion.model_validate(json.loads(content))
    except (ValueError, ValidationError, RecursionError):
        start = content.decode(errors="replace").strip()[:_MOST_SAID]
        return Reply(problem=f"the provider's answer is not a chat completion: {start!r}", retry="again")

    usage = completion.usage or _Usage()
    paid: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "usd": usage.cost,
    }
    if completion.error:
        return Reply(problem=f"the provider answered with an error: {_said(completion.error)}", retry="again", **paid)

    if not completion.choices:
        return Reply(problem="the provider's answer holds no choices", retry="again", **paid)

    choice = completion.choices[0]
    text = (choice.message.content or "").encode("utf-8", "replace").decode()  # no lone surrogates
    if choice.error:
        return Reply(text=text, problem=f"the provider failed: {_said(choice.error)}", retry="again", **paid)

    if choice.finish_reason in (None, "length"):
        return Reply(text=text, problem="the answer was cut off; answer more briefly", retry="again", **paid)

    if not text.strip():
        why = choice.message.refusal or choice.finish_reason
        return Reply(text=text, problem=f"the answer was empty ({why})"[:_MOST_SAID], retry="again", **paid)

    return Reply(text=text, **paid)


def _response_format(schema: dict[str, Any]) -> dict[str, Any]:
    # Not strict: a treatment is an open object, which strict mode forbids. pydantic is strict enough.
    name = str(schema.get("title", "answer"))
    return {"type": "json_schema", "json_schema": {"name": name, "strict": False, "schema": schema}}


def _timed_out(settings: Llm) -> Reply:
    return Reply(
        problem=f"no answer within {settings.timeout_seconds:g} s (llm.timeout_seconds in blueberry.toml)",
        retry="again",
    )


def _refused(status: int, retry_after: str | None, said: str) -> Reply:
    if status in (400, 422) and any(word in said.lower() for word in ("response_format", "schema", "json")):
        return Reply(problem=f"status {status}: {said}", retry="without schema", charged=False)

    advice = {
        401: "the key is not accepted; check OPENROUTER_API_KEY",
        402: "the account has no credit left; add some at https://openrouter.ai/credits",
        403: "the key may not use this model, or the prompt was rejected by moderation",
        404: "the model is not known there; set llm.model in blueberry.toml",
        413: "the prompt is too long for the model",
        429: "too many requests; try again later, or set another llm.model",
    }
    passing = status in (408, 409, 425, 429) or status >= 500
    hint = advice.get(status, "the provider has a problem; try again later" if passing else "the request was refused")
    try:
        wait = float(retry_after) if retry_after is not None else None
    except ValueError:  # a date
        wait = None

    return Reply(
        problem=f"status {status}: {hint} ({said})",
        retry="again" if passing else "no",
        wait_seconds=wait,
        charged=False,
    )


def _said(error: object, otherwise: str = "") -> str:
    if isinstance(error, dict):
        inner = error.get("error", error)
        error = inner.get("message", inner) if isinstance(inner, dict) else inner

    return " ".join(str(error or otherwise or "no reason given").split())[:_MOST_SAID]
