"""A process that is ready to become a run's: `python -m gpu_runner.warm FD`, started by gpu_runner/launcher.py.

It imports torch and the trainer, says so, and waits; each request makes it fork a blank process. That gets a run
directory and its locks from the daemon over a socket of its own, and goes on as the shim of that (gpu_runner/shim.py),
whose steps are forks in turn. So one import serves all runs, and yet every step is a process of its own that has seen
no other run.

FD is a socket to the daemon. As soon as nobody is at its other end this process ends, and so does a blank one that has
not been given a run; until then neither has a lock. When moe/ has changed on disk it serves no more.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from functools import partial
from pathlib import Path

from db.failpoints import failpoint
from gpu_runner.fork import Fork, reap_forks
from gpu_runner.shim import Shim
from gpu_runner.steps import warm_up
from moe.fingerprint import code_hash

READY = b"ready"

_LONGEST_PATH = 4096
_MOST_LOCKS = 66
"""Of the attempt, of the shim, and one a card, of which there are as many as processes (db/settings.py)."""


def main(arguments: list[str]) -> int:
    """Returns the exit code when the daemon has gone or the code has changed."""
    daemon = socket.socket(fileno=int(arguments[0]))
    code = code_hash()
    warm_up()
    gc.collect()
    gc.freeze()  # what all forks share is not looked through, and thereby copied, in each of them
    reap_forks()
    failpoint("warm.ready")
    if _has_cuda():
        sys.stderr.write("importing the trainer has initialized CUDA, which does not survive a fork\n")
        return 1

    if code_hash() != code or not _say(daemon, READY):
        return 0

    while True:
        request, descriptors = _hear(daemon, len(READY), 1)
        if not request or code_hash() != code:
            return 0

        link = socket.socket(fileno=descriptors[0])
        Fork(partial(_serve, link, daemon), "gpu_runner.shim")
        link.close()
        failpoint("warm.forked")


def _serve(link: socket.socket, daemon: socket.socket) -> int:
    """The life of a fork: tells its number, gets its run, does it."""
    daemon.close()
    os.setsid()
    failpoint("blank.started")
    if not _say(link, str(os.getpid()).encode()):
        return 0

    path, descriptors = _hear(link, _LONGEST_PATH, _MOST_LOCKS)
    link.close()
    if not path:
        return 0

    failpoint("blank.given")
    directory = Path(os.fsdecode(path))
    log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    os.chdir(directory)  # as a process that was started cold has it
    *locks, own = descriptors
    for lock in locks:
        os.set_inheritable(lock, True)

    os.set_inheritable(own, False)
    Shim(directory, locks, own_lock=own).run()
    return 0


def _hear(source: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """A message with its descriptors; an empty one when nobody is there any more."""
    try:
        message, descriptors, _, _ = socket.recv_fds(source, size, most)
        return message, descriptors
    except ConnectionResetError:  # whoever was there was killed before it had heard us
        return b"", []


def _has_cuda() -> bool:
    """Whether this process holds the device that CUDA, unlike NVML, opens when it is initialized."""
    open_files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return "/dev/nvidia-uvm" in open_files


def _say(to: socket.socket, message: bytes) -> bool:
    try:
        to.send(message)
        return True
    except (BrokenPipeError, ConnectionResetError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
