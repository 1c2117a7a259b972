"""Going on as another program without starting one: a fork has imported already what its parent has.

It begins in milliseconds, where `python -m` takes seconds that are nearly all torch's. To be as good as new it needs a
parent that has computed nothing with torch, so that there are no threads of OpenMP; that has not touched CUDA; and
whose threads hold no lock that a child would want (numpy's stop for a fork, and the shim's only looks after its log).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_LONGEST_NAME = 15  # of a process, to Linux


class Fork:
    """A child process, with what subprocess.Popen calls the same."""

    def __init__(self, main: Callable[[], int], name: str) -> None:
        """Starts a child that does `main`, taking signals as a new process does, and exits with what it returns.

        Args:
            name: for top and ps; the command line that they show is the parent's.
        """
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or the child would write it once more

        self._ended = False
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # no handler of ours runs in the child
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _go_on(main, name, mask)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def wait(self) -> int:
        """Its exit code, when it has ended; -N for signal N."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, so its number is still its own
        self._ended = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        """SIGTERM, if it has not ended."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, if it has not ended."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if not self._ended:
            os.kill(self.pid, number)


def reap_forks() -> None:
    """Lets children go that have ended, from now on and as they do, without learning how. For who never waits."""

    def reap(*_: object) -> None:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    signal.signal(signal.SIGCHLD, reap)  # to ignore the signal would do as well, but forks would inherit that


def _go_on(main: Callable[[], int], name: str, mask: Collection[int]) -> NoReturn:
    code = 1
    try:
        Path("/proc/self/comm").write_text(name[:_LONGEST_NAME])
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()

        os._exit(code)  # what the parent registered for its own exit is not for the child
