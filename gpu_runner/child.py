"""The processes of one attempt, as the daemon sees them: started with locks they inherit, ended, found again.

Three locks, each held by inherited descriptors and thus free exactly when its last holder is dead:

    DIR/lock        the shim and all below it: the attempt is alive
    DIR/shim.lock   the shim alone; its text is the shim's process id
    locks/slot-...  as DIR/lock, but named for the card, of which there may be several: nobody else trains there as
                    long as it is held

So neither a killed daemon nor a reused process id can make a living attempt look dead, or a dead one alive.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from db.failpoints import failpoint
from db.processes import FileLock, is_locked, spawn_module, write_atomically
from gpu_runner.card import Card
from gpu_runner.launcher import Launcher
from gpu_runner.tree import kill_tree

LOCK_SECONDS = 1.0
"""A look at a lock (is_locked) holds it for an instant; whoever means to keep it waits that out."""

_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)S?(_|$)", re.IGNORECASE)


class Child:
    """The process tree in one run directory. `process` is the shim, where this daemon started it cold."""

    def __init__(
        self, directory: Path, process: subprocess.Popen[bytes] | None = None, *, pid: int | None = None
    ) -> None:
        self.directory = directory
        self.process = process
        self._pid = pid if process is None else process.pid
        self._end: int | None = None

    @classmethod
    def start(
        cls,
        directory: Path,
        request: Mapping[str, Any],
        *,
        slots: Sequence[FileLock],
        confirm: Callable[[], object],
        launcher: Launcher,
    ) -> Child:
        """Prepares a new run directory and starts the shim in it, warm where there is a process that is.

        Args:
            request: config.json.
            slots: the cards, which the processes go on holding.
            confirm: called when the attempt's lock is held, right before anybody gets it; it raises if the attempt
                has been taken over meanwhile. Whoever takes over looks at the lock afterwards.

        Raises:
            FileExistsError: there is such a folder, left by another life of the lab.
        """
        directory.mkdir(parents=True)
        failpoint("start.made")
        with FileLock(directory / "lock") as tree, FileLock(directory / "shim.lock") as shim:
            if not (tree.acquire(LOCK_SECONDS) and shim.acquire(LOCK_SECONDS)):
                raise FileExistsError(f"{directory} is in use by another process")

            failpoint("start.locked")
            write_atomically(directory / "config.json", json.dumps(request, indent=2, allow_nan=False) + "\n")
            handed_down = (tree.fd, *(slot.fd for slot in slots))
            with launcher.blank() as blank:
                confirm()
                failpoint("start.confirmed")
                if blank is not None and blank.become_shim(directory, (*handed_down, shim.fd)):
                    failpoint("start.given")
                    return cls(directory, pid=blank.pid)

            process = spawn_module(
                "gpu_runner.shim",
                [str(directory), *map(str, handed_down)],
                log=directory / "log.txt",
                keep_fds=(*handed_down, shim.fd),
                cwd=directory,
                environment=launcher.environment,
            )
            failpoint("start.spawned")
            return cls(directory, process)

    @property
    def pid(self) -> int | None:
        """The shim's process id, which is also its session's; None in the instant before it has said so."""
        if self._pid is None:
            with suppress(OSError, ValueError):
                self._pid = int((self.directory / "shim.lock").read_text())

        return self._pid

    @property
    def end(self) -> int | None:
        """A descriptor that becomes readable when the shim ends, to be woken by; None where that cannot be had."""
        if self._end is None and self.pid is not None:
            with suppress(OSError):  # it has ended, or Linux is older than 5.3
                self._end = os.pidfd_open(self.pid)

        return self._end

    def close(self) -> None:
        """Looks no more; the processes stay as they are."""
        if self._end is not None:
            os.close(self._end)
            self._end = None

    def is_alive(self) -> bool:
        """Whether any process of the attempt lives."""
        if self.process is not None:
            self.process.poll()  # or the dead shim stays a zombie

        return is_locked(self.directory / "lock")

    def has_shim(self) -> bool:
        """Whether the shim lives. Without one there will be no exit.json."""
        return is_locked(self.directory / "shim.lock")

    def wake(self) -> None:
        """Lets the shim go on, in case that a daemon died in kill(), which stops it first."""
        self._tell_shim(signal.SIGCONT)

    def terminate(self) -> None:
        """Asks the shim to end its child and itself, which takes at most shim.GRACE_SECONDS."""
        self._tell_shim(signal.SIGTERM)

    def kill(self) -> None:
        """Ends every process of the attempt at once, wherever it has gone."""
        if self.is_alive():
            kill_tree(self.directory / "lock", self.pid)

    def _tell_shim(self, number: int) -> None:
        if self.pid is not None and self.has_shim():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def child_environment(card: Card) -> Mapping[str, str]:
    """What a child may see of our environment: no secrets, and no cards but its own."""
    environment = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(card.uuids)} if card.device == "cuda" else {})
