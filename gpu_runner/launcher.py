"""How the processes of a run come to be: at once, from a process that is warm (gpu_runner/warm.py), or cold.

Importing torch takes seconds, in which the card would wait at every step of every run. So the daemon has one process do
that in good time. Where there is none (too little memory, it failed, moe/ has changed) a run starts cold: later, but
the same to the last bit.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from db.clock import Instant
from db.processes import spawn_module
from gpu_runner.warm import READY
from moe.fingerprint import code_hash

_LOG = logging.getLogger(__name__)

WARM_SECONDS = 60.0
"""For the imports: 2 s here, perhaps 20 from a slow disk. Runs wait for them, so there is an end to it."""

ANSWER_SECONDS = 2.0
"""For a fork, which takes 10 ms. A process that was stopped does not keep the daemon from its other work for long."""

RETRY_SECONDS = 60.0
"""After a failure, runs start cold for so long."""

IDLE_SECONDS = 600.0
"""Without a run, after which the memory is given back."""

LEAST_MEMORY = 2**30
"""Bytes that the system must have to spare. A warm process has 0.2 GB that are its own only while nothing runs, since
its forks share them; but a system that has less than this to spare is about to kill something."""


class Blank:
    """A process that waits to be given a run."""

    def __init__(self, pid: int, link: socket.socket) -> None:
        self.pid = pid
        self._link = link

    def become_shim(self, directory: Path, locks: Sequence[int]) -> bool:
        """Makes it the shim of the attempt in `directory`; whether it took it.

        Args:
            locks: descriptors of those that the whole tree holds, and as the last one the shim's own.
        """
        try:
            socket.send_fds(self._link, [os.fsencode(directory)], locks)
            return True
        except OSError as error:
            _LOG.warning("process %d took no run: %s", self.pid, error)
            return False


class Launcher:
    """The warm process of one card's daemon, there from the first queued run until long after the last."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        """Starts nothing.

        Args:
            environment: of all processes of runs, warm or cold.
            log: for what a process says that has no run yet.
        """
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self._log = log
        self._connection: socket.socket | None = None
        self._ready = False
        self._code = ""
        self._give_up_at = self._retry_at = self._used_at = 0.0

    @property
    def waits_on(self) -> int | None:
        """A descriptor that becomes readable when step() has something to hear."""
        return None if self._ready or self._connection is None else self._connection.fileno()

    def step(self, now: Instant, *, in_use: bool) -> None:
        """Hears whether the process is warm by now, and ends it when it was of no use for long."""
        if in_use:
            self._used_at = now.seconds

        if self._connection is None:
            return

        if not self._ready:
            with suppress(BlockingIOError):
                self._ready = self._connection.recv(len(READY), socket.MSG_DONTWAIT) == READY
                if not self._ready:
                    self._give_up("the process that imports torch has ended", now)
                    return

            if not self._ready and now.seconds > self._give_up_at:
                self._give_up(f"importing torch took more than {WARM_SECONDS:.0f} s", now)
        elif self.process is not None and self.process.poll() is not None:
            _LOG.warning("the warm process has ended")
            self.close()
        elif now.seconds > self._used_at + IDLE_SECONDS:
            self.close()

    def is_settled(self, now: Instant, *, quiet: bool) -> bool:
        """Whether the next run may start now, warm or cold; if not, a process is about to be warm.

        Args:
            quiet: nothing may be warmed now, because a run is measured.
        """
        if self._connection is not None and code_hash() != self._code:
            _LOG.info("moe/ has changed; its modules are imported anew")
            self.close()

        if self._connection is None and not quiet and now.seconds >= self._retry_at:
            spare = available_memory()
            if spare is None or spare >= LEAST_MEMORY:
                self._start(now)
            else:
                self._retry_at = now.seconds + RETRY_SECONDS
                _LOG.info("runs start cold: the system has only %.1f GiB of memory to spare", spare / 2**30)

        return self._ready or self._connection is None

    @contextmanager
    def blank(self) -> Iterator[Blank | None]:
        """A process that ends with this context unless it was given a run; None where a run must start cold."""
        link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with link:
            with far:
                asked = self._ready and self._ask(far)

            pid = _hear_pid(link) if asked else None
            if pid is None and self._ready:
                _LOG.warning("the next run starts cold: the warm process does not answer")
                self.close()

            yield None if pid is None else Blank(pid, link)

    def close(self) -> None:
        """Ends the process. Those that are runs by now stay."""
        if self._connection is not None and self.process is not None:
            self._connection.close()
            self.process.kill()
            self.process.wait()

        self._connection, self._ready = None, False

    def _start(self, now: Instant) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            self.process = spawn_module(
                "gpu_runner.warm",
                [str(far.fileno())],
                log=self._log,
                keep_fds=(far.fileno(),),
                environment=self.environment,
            )

        self._connection, self._ready, self._code = near, False, code_hash()
        self._used_at, self._give_up_at = now.seconds, now.seconds + WARM_SECONDS

    def _ask(self, far: socket.socket) -> bool:
        assert self._connection is not None
        try:
            socket.send_fds(self._connection, [READY], [far.fileno()])
            return True
        except OSError:
            return False

    def _give_up(self, reason: str, now: Instant) -> None:
        _LOG.warning("runs start cold for %.0f s: %s", RETRY_SECONDS, reason)
        self._retry_at = now.seconds + RETRY_SECONDS
        self.close()


def available_memory() -> int | None:
    """Bytes that the system has to spare, None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None

    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _hear_pid(link: socket.socket) -> int | None:
    link.settimeout(ANSWER_SECONDS)
    try:
        return int(link.recv(32) or 0) or None
    except OSError:
        return None
    finally:
        link.settimeout(None)
