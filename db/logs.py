"""Logs that stay small: those of our processes in logs/, and the log.txt of a run.

A log in logs/ is set aside when it is full: `runner.log` becomes `runner.log.1`, the newest of KEPT. Whoever starts a
process looks (db/processes.py), and a process that lives for weeks looks after its own (OwnLog). Several may write to
one log: each line is one append, and none is lost. A run's log.txt is read as one file, so that one is shortened
instead, its beginning and its end kept.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

LOG_BYTES = 4 * 2**20
KEPT = 3

RUN_LOG_BYTES = 16 * 2**20
"""A run's log that is longer is shortened to _HEAD and _TAIL bytes."""

_HEAD, _TAIL = 64 * 2**10, 2**20


def rotate(path: Path, most: int = LOG_BYTES) -> None:
    """Sets a log aside that has `most` bytes. Where that cannot be done (a read-only disk) it stays as it is."""
    with suppress(OSError), path.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # of two who look at once, the second finds another file under that name
        if log.tell() < most or not _is_same(log.fileno(), path):
            return

        for number in range(KEPT - 1, 0, -1):
            with suppress(FileNotFoundError):
                _aside(path, number).replace(_aside(path, number + 1))

        path.replace(_aside(path, 1))


def list_logs(folder: Path) -> list[Path]:
    """The logs in a lab's logs/ that were set aside."""
    return sorted(path for path in folder.glob("*.log.*") if path.name.rpartition(".")[2].isdigit())


class OwnLog:
    """The output of this process where it goes to a log of its lab; a terminal or a pipe is left alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names = [path, *(_aside(path, number) for number in range(1, KEPT + 1))]  # set aside while it started
        self._outputs = [fd for fd in (1, 2) if any(_is_same(fd, name) for name in names)]

    def step(self, most: int = LOG_BYTES) -> None:
        """Sets the log aside if it is full, and goes on in the new one; also after another process has done so."""
        if not self._outputs:
            return

        rotate(self.path, most)
        if not _is_same(self._outputs[0], self.path):
            with suppress(OSError), self.path.open("ab") as log:
                for fd in self._outputs:
                    os.dup2(log.fileno(), fd)


def shorten(path: Path, most: int = RUN_LOG_BYTES) -> None:
    """Takes the middle out of a log that is longer than `most`, while others may append to it.

    What is written in the microseconds between the reading of its end and the cut is lost, at worst in mid-line.
    """
    with suppress(OSError), path.open("r+b") as log:
        size = log.seek(0, os.SEEK_END)
        if size <= most:
            return

        log.seek(0)
        head = log.read(_HEAD)
        head = head[: head.rfind(b"\n") + 1]
        log.seek(size - _TAIL)
        tail = log.read()
        log.truncate(len(head))
        tail = tail[tail.find(b"\n") + 1 :]
        if not tail.endswith(b"\n"):
            tail += b"\n"  # the rest of that line may have been lost: what comes next is another one
        said = f"[{size - len(head) - len(tail)} bytes were left out here: the log grew beyond {most}]\n"
        with path.open("ab") as end:
            end.write(said.encode() + tail)


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False
