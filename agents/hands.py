"""How the minds reach the hands: registering cards; starting, stopping, pausing the runner daemon. Never by import."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from db.clock import now
from db.errors import RefusedError
from db.events import add_event
from db.lab import Lab
from db.logs import rotate
from db.processes import is_locked, is_process, spawn_module
from db.records import Runner, RunnerMode
from db.runners import get_runner, list_runners, set_mode

_POLL_SECONDS = 0.05

_IN_WORDS: dict[RunnerMode, str] = {
    "open": "alive",
    "paused": "paused: finishes what trains, claims nothing until run(action='resume')",
    "draining": "draining: finishes what trains, then ends; run(action='resume') takes that back",
}


def register(lab: Lab, *, wait_seconds: float = 15.0) -> Runner:
    """The runner that new runs are meant for; the first time, or for another number of processes, a short child process
    looks what card is there.

    Raises:
        RefusedError: the look failed; the message holds what it said.
    """
    runner = target_runner(lab)
    if runner is None or (runner.processes != lab.settings.runner.processes and not alive_runners(lab)):
        look_for_card(lab, wait_seconds=wait_seconds)

    runner = target_runner(lab)
    if runner is None:
        raise RefusedError(f"no runner could be registered; see {lab.log('register')}")

    return runner


def look_for_card(lab: Lab, *, wait_seconds: float = 15.0) -> str:
    """Has a short child process look what card is there and write it down; returns its last words.

    Raises:
        RefusedError: the look failed; the message holds what it said.
    """
    log = lab.log("register")
    rotate(log)
    start = log.stat().st_size if log.exists() else 0
    child = spawn_module("gpu_runner", [str(lab.folder), "--register"], log=log)
    try:
        child.wait(wait_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        raise RefusedError(
            f"looking for a card took more than {wait_seconds:.0f} s and was given up; ask again when the machine is "
            f"less busy, or start the runner, which looks by itself (its log: {log})"
        ) from None

    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "no reason given"
    if child.returncode != 0:
        raise RefusedError(f"no runner could be registered: {said}; see {log}")

    return said


def target_runner(lab: Lab) -> Runner | None:
    """The runner that new runs are meant for: a card before a CPU, then one that has as many processes as the
    configuration says, then the one last heard of."""
    wanted = lab.settings.runner.processes
    runners = list_runners(lab.store)
    return min(runners, key=lambda runner: (runner.device != "cuda", runner.processes != wanted), default=None)


def is_alive(lab: Lab, runner: Runner) -> bool:
    """Whether a daemon drives this runner now: it holds the card's lock as long as it lives.

    A child that a killed daemon had just forked holds the lock too, for the moment until it becomes another program; so
    the process that wrote its number down must be there as well.
    """
    return is_locked(lab.lock(f"runner-{runner.device_key}")) and runner.pid is not None and is_process(runner.pid)


def state_of(lab: Lab, runner: Runner) -> str:
    """How a runner stands, in words that say what to do about it."""
    if not is_alive(lab, runner):
        return "not running" if runner.mode != "paused" else "not running, and paused until run(action='resume')"

    return _IN_WORDS[runner.mode]


def alive_runners(lab: Lab) -> list[Runner]:
    """The runners that a daemon drives now."""
    return [runner for runner in list_runners(lab.store) if runner.status == "running" and is_alive(lab, runner)]


def start_runner(lab: Lab, *, wait_seconds: float = 8.0, owner: Path | None = None) -> Runner:
    """The living daemon, started in a session of its own when there is none, so that it outlives every client.

    A lab that was paused stays so; one that was being drained may claim again.

    Args:
        owner: a lock file; a daemon that is started stops once nobody holds it.

    Raises:
        RefusedError: it did not come up; the message says where its log is.
    """
    if alive := alive_runners(lab):
        return alive[0]

    for runner in list_runners(lab.store):
        if runner.mode == "draining":
            set_mode(lab.store, runner.id, "open")

    owned = [] if owner is None else ["--owner", str(owner)]
    child = spawn_module("gpu_runner", [str(lab.folder), *owned], log=lab.log("runner"))
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        for runner in alive_runners(lab):
            if runner.boot_id == now().boot_id:
                return runner

        if child.poll() not in (None, 0):
            raise RefusedError(f"the runner stopped at once with exit code {child.returncode}; see {lab.log('runner')}")

        time.sleep(_POLL_SECONDS)

    raise RefusedError(f"the runner did not come up within {wait_seconds:.0f} s; see {lab.log('runner')}")


def stop_runners(lab: Lab, *, wait_seconds: float = 12.0) -> int:
    """Asks the lab's daemons to stop; each puts its runs back into the queue. Returns how many cards were driven.

    Raises:
        RefusedError: one has not ended within `wait_seconds`.
    """
    alive = [runner for runner in list_runners(lab.store) if runner.pid and is_alive(lab, runner)]
    _signal(alive, signal.SIGTERM)
    deadline = time.monotonic() + wait_seconds
    while left := [runner for runner in alive if is_alive(lab, runner)]:
        if time.monotonic() > deadline:
            raise RefusedError(
                f"the runner (pid {left[0].pid}) has not ended within {wait_seconds:.0f} s; see {lab.log('runner')}. "
                f"kill -9 {left[0].pid} ends it, and the next one takes up what it left"
            )

        time.sleep(_POLL_SECONDS)

    return len(alive)


def restart_runners(lab: Lab, *, wait_seconds: float = 15.0) -> list[Runner]:
    """Has the lab's daemons start anew, with the code and the configuration of now, while their children train on.

    Raises:
        RefusedError: none is alive, or one has not come back.
    """
    before = alive_runners(lab)
    if not before:
        raise RefusedError("no runner is alive, so there is nothing to restart; run() starts one")

    _signal(before, signal.SIGUSR1)  # gpu_runner/drive.py: start anew in place
    started = {runner.id: runner.started_at for runner in before}
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        after = [runner for runner in alive_runners(lab) if runner.started_at != started.get(runner.id)]
        if started.keys() <= {runner.id for runner in after}:
            return after

        time.sleep(_POLL_SECONDS)

    raise RefusedError(
        f"the runner has not come back within {wait_seconds:.0f} s; what trained goes on. See {lab.log('runner')}, "
        "then run() starts one"
    )


def set_modes(lab: Lab, mode: RunnerMode) -> list[Runner]:
    """Pauses, drains or opens all cards of the lab; returns them. Only living daemons can be drained.

    Raises:
        RefusedError: there are none.
    """
    runners = alive_runners(lab) if mode == "draining" else list_runners(lab.store)
    if not runners:
        raise RefusedError("no runner is alive; run() starts one" if mode == "draining" else "no runner is known yet")

    with lab.store.transaction():
        for runner in runners:
            set_mode(lab.store, runner.id, mode)
            add_event(lab.store, "mode", f"runner {runner.id} ({runner.device_name}) is {mode}")

    return [get_runner(lab.store, runner.id) for runner in runners]


def _signal(runners: Sequence[Runner], number: int) -> None:
    for pid in {runner.pid for runner in runners if runner.pid is not None}:  # one daemon may drive several cards
        with suppress(ProcessLookupError):
            os.kill(pid, number)
