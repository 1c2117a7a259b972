"""The one detached process of an attempt: a fork of a warm process (gpu_runner/warm.py) or, started cold by
gpu_runner/child.py, `python -m gpu_runner.shim DIR FD...`.

It runs the steps of the run in DIR one after another as child processes, their output in log.txt, and says in exit.json
how the last of them ended. FD are the descriptors of locks that it hands down to each child: they are free exactly
when the shim and all below it are dead. It outlives the daemon, so that a daemon that was killed can be started again
and adopt what still trains.

On SIGTERM it ends its child, says so in exit.json, and exits. What this does not do: look at results, or open the lab's
database. It imports nothing that takes time: where it is warm, its steps are forks that have torch already.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from db.failpoints import failpoint
from db.logs import shorten
from db.processes import adopt_orphans, kill_children, write_atomically
from gpu_runner.fork import Fork
from gpu_runner.oom_killer import count_oom_kills
from gpu_runner.steps import STEPS, run_step

GRACE_SECONDS = 7
"""From SIGTERM to SIGKILL for the child: a checkpoint of preset t4 takes about 4 s on a slow disk."""

_LOOK_SECONDS = 2.0
"""Between two looks at the run directory."""

_ROOM_SECONDS = 0.5
"""Between two looks whether a full disk has room again."""


class Shim:
    """The steps of one attempt, and the signal that may end them early.

    `own_lock` is that of the shim alone, given where the steps are to be forks of this process.
    """

    def __init__(self, directory: Path, locks: Sequence[int], own_lock: int | None = None) -> None:
        self.directory = directory
        self.locks = locks
        self.own_lock = own_lock
        self.terminated = False
        self.oom_killed = False
        self.child: subprocess.Popen[bytes] | Fork | None = None

    def run(self) -> None:
        """Runs all steps and writes exit.json."""
        failpoint("shim.started")
        (self.directory / "shim.lock").write_text(f"{os.getpid()}\n")
        failpoint("shim.named")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would turn every exit code into 0
        adopt_orphans()
        signal.signal(signal.SIGALRM, self._kill)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._terminate)

        kind = json.loads((self.directory / "config.json").read_bytes())["kind"]
        step, exit_code = "", 0
        for step in STEPS[kind]:
            exit_code = -signal.SIGTERM if self.terminated else self._run_step(step)
            if exit_code != 0:
                break

        for name in ("metrics.jsonl", "log.txt"):
            _sync(self.directory / name)  # exit.json promises that they are whole

        failpoint("shim.synced")
        ended = {
            "step": step,
            "exit_code": exit_code,
            "terminated": self.terminated,
            "oom_killed": self.oom_killed,
        }
        self._leave_word(json.dumps(ended) + "\n")
        failpoint("shim.ended")

    def _leave_word(self, text: str) -> None:
        """Writes exit.json; on a full disk as soon as there is room, so that a result is not lost for a few bytes."""
        while True:
            try:
                write_atomically(self.directory / "exit.json", text)
                return
            except OSError:
                if self.terminated or not self.directory.exists():
                    raise

                time.sleep(_ROOM_SECONDS)

    def _run_step(self, step: str) -> int:
        oom_kills = count_oom_kills()
        self.child = self._start_cold(step) if self.own_lock is None else self._fork(step, self.own_lock)
        failpoint("shim.step_started")
        if self.terminated:  # the signal came while the child was being started
            self._terminate(signal.SIGTERM, None)

        with self._looking_after(self.child):
            exit_code = self.child.wait()

        signal.alarm(0)
        kill_children()  # whatever it left behind: it would hold memory of the card
        failpoint("shim.step_ended")
        self.oom_killed = count_oom_kills() > oom_kills
        return exit_code

    @contextmanager
    def _looking_after(self, child: subprocess.Popen[bytes] | Fork) -> Iterator[None]:
        """Keeps log.txt short, and ends the child when somebody deletes its directory: nobody would learn of its end.

        Only while the child runs: a process that forks should have no threads.
        """
        over, log = threading.Event(), self.directory / "log.txt"

        def look() -> None:
            while not over.wait(_LOOK_SECONDS):
                shorten(log)
                if not self.directory.exists():
                    child.kill()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            shorten(log)

    def _fork(self, step: str, own_lock: int) -> Fork:
        def become() -> int:
            os.close(own_lock)
            return run_step(step, self.directory)

        return Fork(become, f"moe.{step}")

    def _start_cold(self, step: str) -> subprocess.Popen[bytes]:
        with (self.directory / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"moe.{step}", str(self.directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=tuple(self.locks),
                cwd=self.directory,  # python -m looks there first: no folder of the user's can stand in for moe/
            )

    def _terminate(self, _number: int, _frame: FrameType | None) -> None:
        self.terminated = True
        if self.child is not None:
            self.child.terminate()
            signal.alarm(GRACE_SECONDS)

    def _kill(self, _number: int, _frame: FrameType | None) -> None:
        if self.child is not None:
            self.child.kill()


def _sync(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


if __name__ == "__main__":
    Shim(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]]).run()
