"""All processes of an attempt, also those that have left its session or ignore signals, found in /proc and killed.

A process belongs to an attempt if it holds the attempt's lock, is in the session of the shim, or descends from one that
does. The shim adopts whatever loses its parent below it, so while it lives nobody can step out of that line; without
it, a process that has left the session, closed the lock and lost its parent cannot be told from anybody else's.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_DYING_SECONDS = 0.3
"""For processes to end that were killed; whoever takes longer is found again by the daemon's next step."""


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    session: int


def kill_tree(lock: Path, leader: int | None) -> None:
    """SIGKILLs every process of the attempt whose lock file and shim those are.

    The shim goes last, stopped until then: whoever is forked meanwhile, and loses its parent, is still found below it.
    """
    found = find_tree(lock, leader)
    if leader in found:
        _signal({leader}, signal.SIGSTOP)

    deadline = time.monotonic() + _DYING_SECONDS
    while (others := found - {leader}) and time.monotonic() < deadline:
        _signal(others, signal.SIGKILL)
        time.sleep(0.005)
        found = find_tree(lock, leader)

    _signal(found, signal.SIGKILL)


def find_tree(lock: Path, leader: int | None) -> set[int]:
    """The process ids of an attempt's living processes, never our own."""
    processes = _list_processes()
    found = {process.pid for process in processes if _holds(process.pid, lock)}
    # The number of a dead shim may be somebody else's by now; while one of the session holds the lock, it is not.
    if any(process.session == leader for process in processes if process.pid in found):
        found |= {process.pid for process in processes if process.session == leader}

    grown = True
    while grown:
        below = {process.pid for process in processes if process.parent in found}
        grown = not below <= found
        found |= below

    return found - {os.getpid()}


def _signal(pids: Collection[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _list_processes() -> list[_Process]:
    processes = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError, ValueError, IndexError):  # it has just ended
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if fields[0] not in ("Z", "X"):
                    processes.append(_Process(int(name), parent=int(fields[1]), session=int(fields[3])))

    return processes


def _holds(pid: int, lock: Path) -> bool:
    """Whether a process holds the exclusive lock; one that merely has the file open, to look, does not."""
    with suppress(OSError):  # it has just ended, or is another user's
        wanted = lock.stat()
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                    told = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
                    if any("FLOCK" in line and "WRITE" in line for line in told.splitlines()):
                        return True

    return False
