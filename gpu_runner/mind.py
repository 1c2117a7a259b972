"""Waking the mind process, which judges what the runs have said: `python -m agents LAB`, in a session of its own.

Any number may be started, since the mind holds a lock; what it does is no concern of the runner.
"""

from __future__ import annotations

import subprocess

from db.failpoints import failpoint
from db.lab import Lab
from db.processes import spawn_module


class MindWaker:
    """Starts a mind process when one is `due`, and not while the last one that it started still runs.

    That one may have looked just before a run ended, so another is started after it.
    """

    def __init__(self, lab: Lab, *, due: bool) -> None:
        self.due = due
        self._lab = lab
        self.process: subprocess.Popen[bytes] | None = None

    def step(self) -> None:
        """Starts the mind if it is time."""
        if self.process is not None and self.process.poll() is None:
            return

        if self.due:
            self.process = spawn_module("agents", [str(self._lab.folder)], log=self._lab.log("mind"))
            failpoint("mind.woken")
            self.due = False
