"""A fresh lab without a key, and a scripted language model: a real server that speaks OpenRouter's shape.

model.says({"novelty": 7})            # the next answer; a string goes out as it is
model.fails(429, "slow down", headers={"Retry-After": "0"})
model.prompts                         # what the model was asked, newest last
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from db.experiments import add_verdict, get_experiment, move_experiment
from db.lab import Lab
from db.records import Runner
from db.runners import register_runner

KEY = "sk-or-v1-0123456789abcdef"


@dataclass(kw_only=True)
class Scripted:
    """One answer: its body, and how it is sent."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    blanks: int = 0
    cut: bool = False
    meanwhile: Callable[[], None] | None = None


@dataclass(kw_only=True)
class Asked:
    """One request as the server saw it; names of headers in lower case."""

    headers: dict[str, str]
    body: dict[str, Any]


class ScriptedModel:
    """Gives the answers it was told to, in order, and remembers what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Asked] = []
        self._script: list[Scripted] = []

    @property
    def prompts(self) -> list[str]:
        """The last message of each request."""
        return [str(request.body["messages"][-1]["content"]) for request in self.requests]

    def says(
        self,
        content: object,
        *,
        finish_reason: str | None = "stop",
        cost: float | None = 0.0123,
        tokens: tuple[int, int] | None = (900, 80),
        **how: Any,
    ) -> None:
        """Scripts an answer; anything but a string is sent as JSON text."""
        text = content if isinstance(content, str) else json.dumps(content)
        usage = None if tokens is None else {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "cost": cost}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        self.sends({"id": "gen-1", "model": "scripted", "choices": [choice], "usage": usage}, **how)

    def fails(self, status: int, message: str, **how: Any) -> None:
        """Scripts an error in OpenRouter's shape."""
        self.sends({"error": {"code": status, "message": message}}, status=status, **how)

    def sends(self, body: object, **how: Any) -> None:
        """Scripts a whole body."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._script.append(Scripted(body=raw, **how))

    def next(self) -> Scripted:
        """The answer whose turn it is."""
        if not self._script:
            return Scripted(body=b'{"error": {"message": "nothing was scripted"}}', status=418)

        return self._script.pop(0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: ScriptedModel

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length))
        assert self.path == "/api/v1/chat/completions"
        self.model.requests.append(
            Asked(headers={name.lower(): value for name, value in self.headers.items()}, body=body)
        )
        answer = self.model.next()
        if answer.meanwhile:
            answer.meanwhile()

        time.sleep(answer.delay)
        try:
            self._send(answer)
        except OSError:  # the client has hung up, as some tests want
            self.close_connection = True

    def _send(self, answer: Scripted) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)

        self.send_header("Content-Length", str(len(answer.body) + answer.blanks))
        self.end_headers()
        for _ in range(answer.blanks):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)

        if answer.cut:
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration and no key from outside."""
    for name in [*os.environ]:
        if name.startswith(("BLUEBERRY_", "OPENROUTER_", "OPENAI_")):
            monkeypatch.delenv(name)


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Callable[[str], Lab]]:
    """Opens the lab with this blueberry.toml; again for a changed one."""
    labs: list[Lab] = []

    def open_lab(toml: str = "") -> Lab:
        folder = tmp_path / "lab"
        folder.mkdir(exist_ok=True)
        (folder / "blueberry.toml").write_text(toml)
        labs.append(Lab(folder))
        return labs[-1]

    yield open_lab
    for lab in labs:
        lab.close()


@pytest.fixture
def lab(configured: Callable[[str], Lab]) -> Lab:
    """A fresh lab with the default configuration."""
    return configured("")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedModel]:
    """A scripted language model, to which the key in the environment leads."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    scripted = ScriptedModel(f"http://127.0.0.1:{server.server_port}/api/v1")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"model": scripted})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    monkeypatch.setenv("OPENROUTER_BASE_URL", scripted.url)
    monkeypatch.setenv("OPENROUTER_SITE_URL", "https://example.org/lab")
    monkeypatch.setenv("OPENROUTER_SITE_NAME", "A lab")
    yield scripted
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def conclude() -> Callable[..., None]:
    """Writes a final verdict, as if an experiment had run."""

    def write(lab: Lab, experiment_id: int, word: str = "improved", effect: float = -0.05) -> None:
        experiment = get_experiment(lab.store, experiment_id)
        with lab.store.transaction():
            move_experiment(lab.store, experiment_id, "concluded", allowed=(experiment.status,))
            add_verdict(
                lab.store,
                {
                    "experiment_id": experiment_id,
                    "verdict": word,
                    "final": True,
                    "sentence": f"{experiment.title}: {word}",
                    "method": "written by a test",
                    "metric": experiment.metric,
                    "pairs": 2,
                    "seeds": [1, 2],
                    "effect": effect,
                    "cost_seconds": 1.0,
                },
            )

    return write


@pytest.fixture
def register() -> Callable[[Lab], Runner]:
    """Makes a CPU known to a lab."""

    def known(lab: Lab) -> Runner:
        return register_runner(
            lab.store,
            {
                "hostname": "here",
                "device": "cpu",
                "device_name": "a CPU",
                "device_key": "cpu",
                "precision": "fp32",
                "torch": "2.13",
                "hardware_class": "cpu a CPU fp32 torch 2.13",
                "memory_bytes": 8 * 2**30,
                "threads": 2,
                "message": "training on the CPU",
            },
        )

    return known


@pytest.fixture
def runner(lab: Lab, register: Callable[[Lab], Runner]) -> Runner:
    """A CPU that the lab knows."""
    return register(lab)
