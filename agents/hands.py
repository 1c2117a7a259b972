"""How the minds reach the hands: registering a card, waking and stopping the runner daemon. Never by import."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

from db.clock import now
from db.errors import RefusedError
from db.lab import Lab
from db.processes import is_locked, is_process, spawn_module
from db.records import Runner
from db.runners import list_runners

_POLL_SECONDS = 0.05


def register(lab: Lab, *, wait_seconds: float = 10.0) -> Runner:
    """The runner that new runs are meant for; the first time, a short child process looks what card is there.

    Raises:
        RefusedError: the look failed; the message holds what it said.
    """
    if target_runner(lab) is None:
        look_for_card(lab, wait_seconds=wait_seconds)

    runner = target_runner(lab)
    if runner is None:
        raise RefusedError(f"no runner could be registered; see {lab.log('register')}")

    return runner


def look_for_card(lab: Lab, *, wait_seconds: float = 10.0) -> str:
    """Has a short child process look what card is there and write it down; returns its last words.

    Raises:
        RefusedError: the look failed; the message holds what it said.
    """
    log = lab.log("register")
    start = log.stat().st_size if log.exists() else 0
    child = spawn_module("gpu_runner", [str(lab.folder), "--register"], log=log)
    try:
        child.wait(wait_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        raise RefusedError(
            f"looking for a card took more than {wait_seconds:.0f} s and was given up; see {log}"
        ) from None

    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "no reason given"
    if child.returncode != 0:
        raise RefusedError(f"no runner could be registered: {said}; see {log}")

    return said


def target_runner(lab: Lab) -> Runner | None:
    """The runner that new runs are meant for: a card before a CPU, then the one last heard of."""
    return min(list_runners(lab.store), key=lambda runner: runner.device != "cuda", default=None)


def is_alive(lab: Lab, runner: Runner) -> bool:
    """Whether a daemon drives this runner now: it holds the card's lock as long as it lives.

    A child that a killed daemon had just forked holds the lock too, for the moment until it becomes another program; so
    the process that wrote its number down must be there as well.
    """
    return is_locked(lab.lock(f"runner-{runner.device_key}")) and runner.pid is not None and is_process(runner.pid)


def start_runner(lab: Lab, *, wait_seconds: float = 8.0) -> Runner:
    """The living daemon, started in a session of its own when there is none, so that it outlives every client.

    Raises:
        RefusedError: it did not come up; the message says where its log is.
    """
    for runner in list_runners(lab.store):
        if runner.status == "running" and is_alive(lab, runner):
            return runner

    child = spawn_module("gpu_runner", [str(lab.folder)], log=lab.log("runner"))
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        for runner in list_runners(lab.store):
            if runner.status == "running" and runner.boot_id == now().boot_id and is_alive(lab, runner):
                return runner

        if child.poll() not in (None, 0):
            raise RefusedError(f"the runner stopped at once with exit code {child.returncode}; see {lab.log('runner')}")

        time.sleep(_POLL_SECONDS)

    raise RefusedError(f"the runner did not come up within {wait_seconds:.0f} s; see {lab.log('runner')}")


def stop_runners(lab: Lab, *, wait_seconds: float = 12.0) -> int:
    """Asks the lab's daemons to stop; each puts its run back into the queue. Returns how many were alive."""
    alive = [runner for runner in list_runners(lab.store) if runner.pid and is_alive(lab, runner)]
    for runner in alive:
        with suppress(ProcessLookupError):
            os.kill(runner.pid or 0, signal.SIGTERM)

    deadline = time.monotonic() + wait_seconds
    while any(is_alive(lab, runner) for runner in alive) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)

    return len(alive)
