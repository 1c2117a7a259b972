"""Driving the cards of this machine: one Daemon each, all in this process, until a signal or until they are drained.

    SIGTERM, SIGINT   end the children, which leave a checkpoint, put their runs back into the queue, and stop
    SIGHUP            read blueberry.toml anew; a file that cannot be used is told, and what held before stays
    SIGUSR1           start anew in place, with new code: the children train on, and are adopted

A daemon with an owner, such as `blueberry reproduce`, stops as by SIGTERM when that is gone, whatever killed it.

A card that another process drives is left to it. What goes wrong with one card (a full disk, a lost card) is tried
again with growing pauses, and leaves the other cards alone.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from enum import Enum, auto
from pathlib import Path
from typing import NoReturn

from db.clock import Instant, now
from db.errors import LabError, NewerLabError, SettingsError
from db.events import add_event
from db.lab import Lab
from db.logs import OwnLog
from db.processes import FileLock, catch_signals, has_ended, hold_signals, is_locked, list_children
from db.runners import list_runners
from gpu_runner.card import Card
from gpu_runner.child import LOCK_SECONDS
from gpu_runner.daemon import Daemon
from gpu_runner.nvml import Nvml
from moe.fingerprint import code_hash

_LOG = logging.getLogger("gpu_runner")

RELOAD = signal.SIGHUP
RESTART = signal.SIGUSR1
SIGNALS = (signal.SIGTERM, signal.SIGINT, RELOAD, RESTART)

STOP_SECONDS = 9.5
"""Given to a stop; whatever has not ended by then is left for the next daemon to settle."""

_AT_START = ("runner.device ", "runner.threads ", "runner.processes ")
_LONGEST_PAUSE = 30.0
_SHORTEST_PAUSE = 0.01  # so that a wake-up of which nothing comes does not keep a processor busy
_SLICE = 0.25  # a signal does not shorten a sleep, so sleeps are short


class Ending(Enum):
    """Why drive() has returned."""

    DONE = auto()
    """stopped on request, drained, or somebody else drives the cards"""
    GONE = auto()
    """the lab is not there any more"""
    RESTART = auto()
    """the program starts anew; the children train on"""


class Seat:
    """One card, driven: its daemon, with a connection of its own, and when that is to do its next step."""

    def __init__(self, lab: Lab, card: Card, nvml: Nvml) -> None:
        self.lab = Lab(lab.folder)
        self.daemon = Daemon(self.lab, card, nvml, now())
        self.due = 0.0
        self._failures = 0
        self._code = code_hash()  # of the moe/ that this process has imported
        _LOG.info("%s as %s", card.message, card.hardware_class)

    def step(self, at: Instant) -> None:
        """One step if it is due. A lab that is busy, full or read-only is tried again, as long as it takes.

        Raises:
            NewerLabError: this program is too old for the lab, or for the code that the runs were queued for.
        """
        if at.seconds < self.due:
            return

        try:
            self.daemon.step(at)
            self._failures = 0
        except NewerLabError:
            raise
        except (LabError, OSError) as error:
            self._failures += 1
            _LOG.warning("%s", error)
        except Exception as error:
            if code_hash() != self._code:
                raise NewerLabError(f"moe/ was updated under this runner: {error}") from error

            if not self.daemon.attempts.held:
                raise

            self._failures += 1
            _LOG.exception("a step failed; the child trains on, and the step is tried again")

        poll = self.lab.settings.runner.poll_seconds
        self.due = at.seconds + min(_LONGEST_PAUSE, poll * 2.0 ** min(self._failures, 10))

    @property
    def waits_on(self) -> list[int]:
        """Descriptors that wake the daemon before its step is due; none while steps fail, which takes time to pass."""
        return [] if self._failures else self.daemon.waits_on

    def is_gone(self) -> bool:
        """Whether steps fail because the lab was deleted."""
        return self._failures > 0 and not (self.lab.folder / "lab.db").exists()

    def reload(self) -> None:
        """Reads the configuration anew, and says in log and journal what came of it."""
        try:
            changes = self.lab.reload()
            said = f"configuration read anew: {', '.join(changes) or 'nothing has changed'}"
            if any(change.startswith(_AT_START) for change in changes):
                said += "; device, threads and processes hold from the next restart of the runner on"
        except SettingsError as error:
            said = f"configuration not read anew, what held before stays: {error}"

        _LOG.info("%s", said)
        try:
            add_event(self.daemon.store, "reloaded", f"runner {self.daemon.runner.id}: {said}")
        except LabError as error:
            _LOG.warning("%s", error)

    def close(self, message: str) -> None:
        """Notes that nobody drives the card any more."""
        try:
            self.daemon.close(message)
            _LOG.info("%s: %s", self.daemon.card.name, message)
        except LabError as error:
            _LOG.warning("%s: %s, which could not be written down: %s", self.daemon.card.name, message, error)

        self.lab.close()


def drive(lab: Lab, cards: Sequence[Card], nvml: Nvml, *, owner: Path | None = None) -> Ending:
    """Drives the cards that nobody else drives. Does not return where the program starts anew.

    Args:
        owner: a lock file; when nobody holds it, the daemon stops.
    """
    with ExitStack() as stack, catch_signals(*SIGNALS) as signals:
        seats = []
        for card in cards:
            lock = stack.enter_context(FileLock(lab.lock(f"runner-{card.key}")))
            if lock.acquire(LOCK_SECONDS):
                seats.append(Seat(lab, card, nvml))
            else:
                _LOG.info("%s", _who_drives(lab, card))

        try:
            ending = _loop(seats, signals, OwnLog(lab.log("runner")), owner)
        except NewerLabError as error:
            _LOG.warning("%s; starting anew, in case that this installation was updated", error)
            ending = Ending.RESTART

        if ending is Ending.RESTART:
            _start_anew()

        return ending


def _loop(seats: list[Seat], signals: list[int], log: OwnLog, owner: Path | None) -> Ending:
    inherited = list_children()  # of the program that this one took the place of
    while seats:
        orphaned = owner is not None and not is_locked(owner)
        if orphaned:
            _LOG.warning("nobody holds %s any more, so this runner stops as well", owner)

        if orphaned or signal.SIGTERM in signals or signal.SIGINT in signals:
            _stop(seats)
            return Ending.DONE

        if RESTART in signals:
            _LOG.info("starting anew; what trains goes on")
            return Ending.RESTART

        if signals:
            signals.clear()
            for seat in seats:
                seat.reload()

        log.step()
        inherited[:] = [pid for pid in inherited if not has_ended(pid)]
        for seat in list(seats):
            seat.step(now())
            if seat.is_gone():
                _LOG.error("%s is gone; nothing is left to do", seat.lab.folder)
                return Ending.GONE

            if seat.daemon.is_drained():
                seat.close("drained: what trained is done, and nothing more was claimed")
                seats.remove(seat)

        _pause(seats, signals)

    return Ending.DONE


def _start_anew() -> NoReturn:
    """Becomes the new program in place: whoever supervises this process keeps it, and its children stay its children.

    What arrives before that one listens must not end it. The handlers stay until then, because a signal can only be
    held back from this thread, and libraries have others.
    """
    hold_signals(*SIGNALS)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _stop(seats: Sequence[Seat]) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    for seat in seats:
        seat.daemon.begin_stop(now())

    while any(seat.daemon.attempts.held for seat in seats) and time.monotonic() < deadline:
        for seat in seats:
            seat.due = 0.0
            seat.step(now())

        time.sleep(0.02)

    for seat in seats:
        seat.close("stopped")


def _pause(seats: Sequence[Seat], signals: Sequence[int]) -> None:
    """Until a step is due, a signal comes, or a process has ended that one of the daemons waits for."""
    time.sleep(_SHORTEST_PAUSE)
    poll, woken_by = select.poll(), {descriptor: seat for seat in seats for descriptor in seat.waits_on}
    for descriptor in woken_by:
        poll.register(descriptor, select.POLLIN)

    due = min((seat.due for seat in seats), default=0.0)
    while not signals and (left := due - now().seconds) > 0:
        if ready := poll.poll(1000 * min(left, _SLICE)):
            for descriptor, _ in ready:
                woken_by[descriptor].due = 0.0

            return


def _who_drives(lab: Lab, card: Card) -> str:
    for runner in list_runners(lab.store):
        if runner.device_key == card.key and runner.pid is not None:
            return (
                f"a runner (pid {runner.pid}) drives {card.name} already; last heard of at {runner.heartbeat_at}. "
                f"If that is long ago, end it with: kill -9 {runner.pid}"
            )

    return f"another runner drives {card.name} already"
