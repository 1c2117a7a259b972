"""A lab of its own, and real servers on it: processes that speak MCP over stdio, driven by the SDK's client.

Starting a server takes about a second, so most tests share two of them, one for each protocol era, on one lab.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import Client, StdioServerParameters
from mcp_types import Tool

from db.experiments import add_experiment
from db.lab import Lab
from db.processes import FileLock
from db.queue import add_run
from db.records import Arm, Experiment, Run
from db.runners import register_runner
from moe.presets import PRESETS

ROOT = Path(__file__).parents[2]
SETTINGS = 'preset = "nano"\n'
ERAS = ("legacy", "2026-07-28")
"""The handshake (2025-11-25), and the stateless revision."""

RUNNER: Mapping[str, Any] = {
    "hostname": "here",
    "device": "cpu",
    "device_name": "a CPU",
    "device_key": "here-cpu",
    "precision": "fp32",
    "torch": "2.9.0",
    "hardware_class": "cpu-2-fp32",
    "memory_bytes": 8 * 2**30,
    "threads": 2,
    "message": "registered by a test",
}

IDEA: Mapping[str, Any] = {
    "title": "Send each token to one expert",
    "hypothesis": "Halving top_k raises val_bpb, because each token meets half the expert parameters.",
    "domain": "moe_architecture",
    "treatment": {"top_k": 1},
}


class Session:
    """A server process and a client that is connected to it."""

    def __init__(self, portal: BlockingPortal, client: Client) -> None:
        self._portal = portal
        self._client = client
        self.version = client.protocol_version

    def tools(self) -> list[Tool]:
        return self._portal.call(self._client.list_tools).tools

    def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """The structured answer of a tool that must succeed."""
        result = self._portal.call(self._client.call_tool, name, arguments)
        assert not result.is_error, result.content
        assert isinstance(result.structured_content, dict)
        return result.structured_content

    def refusal(self, name: str, /, **arguments: Any) -> str:
        """The text of a tool error that must come."""
        result = self._portal.call(self._client.call_tool, name, arguments)
        assert result.is_error, result.structured_content
        assert result.content[0].type == "text"
        return str(result.content[0].text)


@contextmanager
def connect(folder: Path, era: str = "legacy") -> Iterator[Session]:
    """A server of its own on the lab in `folder`."""
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "server", "--lab", str(folder)], cwd=ROOT, env=_environment()
    )
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Client(server, mode=era, read_timeout_seconds=30)) as client,
    ):
        yield Session(portal, client)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("BLUEBERRY_", "OPENROUTER_"))}


@contextmanager
def made_lab(folder: Path) -> Iterator[Lab]:
    """A lab with nano presets and a registered runner. Its mind process is busy elsewhere, so that none is started."""
    folder.mkdir(parents=True)
    (folder / "blueberry.toml").write_text(SETTINGS)
    lab = Lab(folder)
    register_runner(lab.store, dict(RUNNER))
    with FileLock(lab.lock("mind")) as lock:
        assert lock.acquire()
        yield lab

    lab.close()


def put_experiment(lab: Lab, **values: Any) -> Experiment:
    """A row as the suggester would write it."""
    columns = {
        "title": "Lower the learning rate",
        "hypothesis": "A lower learning rate lowers val_bpb.",
        "method": "",
        "domain": "optimization",
        "preset": "nano",
        "baseline": PRESETS["nano"].model_dump(),
        "treatment": {"lr": 0.001},
        "metric": "val_bpb",
        "direction": "lower",
        "proposer": "assistant",
    }
    return add_experiment(lab.store, columns | values)


def put_run(lab: Lab, experiment_id: int, seed: int = 1, *, arm: Arm = "treatment", **columns: Any) -> Run:
    """A run in the queue, by default one that trains."""
    values = {
        "kind": "train",
        "fingerprint": f"{experiment_id:016x}",
        "seed": seed,
        "hardware_class": RUNNER["hardware_class"],
        "code": "c",
        "config": PRESETS["nano"].model_dump(),
        "baseline": None,
        "needs_run_id": None,
        "priority": 0,
        "steps": 40,
    }
    return add_run(lab.store, experiment_id, arm, values | columns).run


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("BLUEBERRY_", "OPENROUTER_")):
            monkeypatch.delenv(name)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab without experiments."""
    with made_lab(tmp_path / "lab") as lab:
        yield lab


@pytest.fixture(scope="session")
def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with made_lab(tmp_path_factory.mktemp("shared") / "lab") as lab:
        yield lab


@pytest.fixture(scope="session")
def sessions(shared_lab: Lab) -> Iterator[dict[str, Session]]:
    """Two servers on one lab at the same time, one for each era."""
    with connect(shared_lab.folder, ERAS[0]) as old, connect(shared_lab.folder, ERAS[1]) as new:
        yield {ERAS[0]: old, ERAS[1]: new}


@pytest.fixture(params=ERAS)
def session(request: pytest.FixtureRequest, sessions: dict[str, Session]) -> Session:
    """Each of the two in turn."""
    return sessions[str(request.param)]


@pytest.fixture
def either(sessions: dict[str, Session]) -> Session:
    """One of them, where the era does not matter."""
    return sessions[ERAS[1]]


class RawServer:
    """A server process driven line by line, so that it can be killed at any instant and its stdout seen whole."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "--lab", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=_environment(),
            start_new_session=True,
        )
        client = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "raw", "version": "0"}}
        self.send({"id": 0, "method": "initialize", "params": client})
        self.receive()
        self.send({"method": "notifications/initialized"})

    def send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        self.process.stdin.flush()

    def begin(self, name: str, /, **arguments: Any) -> None:
        """Sends a call and does not wait for its answer."""
        self.send({"id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}})

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout
        message: dict[str, Any] = json.loads(self.process.stdout.readline())
        return message

    def close(self) -> tuple[int, str]:
        """Closes stdin; returns the exit code and what was left on stdout."""
        out, _ = self.process.communicate(timeout=10)
        return self.process.returncode, out.decode()

    def kill(self) -> None:
        """As chat clients do: the whole process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=10)
