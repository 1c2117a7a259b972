"""Locks, signals and spawning: the one module that knows how our processes hold on to each other.

A lock is an flock on an open file. The descriptor can be inherited, so that a lock held by a process tree is free
exactly when the whole tree is dead, whatever killed it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from db.failpoints import failpoint
from db.logs import rotate

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

_CHILDREN: list[subprocess.Popen[bytes]] = []
"""What spawn_module() started. Nobody waits for a process that is to outlive us; here the dead ones are reaped."""


class FileLock:
    """An exclusive lock on a file, held until close() and by every process that inherited its descriptor."""

    def __init__(self, path: Path) -> None:
        """Opens (and makes) the file without locking it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self, timeout: float = 0.0) -> bool:
        """Whether the lock was taken within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False

                time.sleep(0.02)

    def release(self) -> None:
        """Frees the lock for everyone who holds the descriptor; the file stays open."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Closes this process's descriptor. Processes that inherited it go on holding the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_locked(path: Path) -> bool:
    """Whether any process holds the lock on `path`; False when there is no such file."""
    if not path.exists():
        return False

    with FileLock(path) as lock:
        try:
            fcntl.flock(lock.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
            return False
        except BlockingIOError:
            return True


def is_process(pid: int) -> bool:
    """Whether a process of that number lives here; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False

    return state not in ("Z", "X")


def started_at(pid: int) -> float | None:
    """When a process was started, in seconds since boot; None when there is none of that number."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None

    return ticks / os.sysconf("SC_CLK_TCK")


def list_children() -> list[int]:
    """The child processes that this process has, the ended ones too; after an exec, those of the program before."""
    try:
        text = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    except OSError:
        return []

    return [int(pid) for pid in text.split()]


def has_ended(child: int) -> bool:
    """Whether a child process has ended, which is then no zombie any more; only for what no Popen object stands for."""
    try:
        return os.waitpid(child, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return True


def adopt_orphans() -> None:
    """From now on a process below this one whose parent dies becomes a child of this one, not of init (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_children() -> None:
    """SIGKILLs all child processes, and theirs as they become ours. Nobody else may wait for them."""
    while children := list_children():
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def spawn_module(
    module: str,
    arguments: Sequence[str],
    *,
    log: Path,
    keep_fds: Sequence[int] = (),
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `python -m module arguments` in a session of its own, its output appended to `log`, or a new one if full.

    A session of its own, because chat clients kill the whole process group of a server. Only `keep_fds` are inherited.
    The child finds our packages where this process found them, also from a clone that is not installed and in
    another working directory. Without `environment` it gets this process's.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    rotate(log)
    environment = dict(os.environ if environment is None else environment)
    root = str(Path(__file__).parents[1])
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *([] if root in paths else [root])])
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]
    with log.open("ab") as out:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],  # -P: no folder of the caller's can stand in for ours
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=tuple(keep_fds),
            start_new_session=True,
            cwd=cwd,
            env=environment,
        )

    _CHILDREN.append(child)
    return child


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it or nothing: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())

    failpoint("write.synced")
    temporary.replace(path)
    failpoint("write.renamed")
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Has the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def catch_signals(*numbers: int) -> Iterator[list[int]]:
    """Within it, these signals append their number to the list instead of what they do by default."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda got, _frame: received.append(got)) for number in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def hold_signals(*numbers: int) -> None:
    """From now on these signals wait, also through exec, until catch_signals() listens to them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
