"""Which daemon is alive: the lock of its card and its own process tell together."""

from __future__ import annotations

import os
import subprocess
import sys

from agents.hands import is_alive
from db.lab import Lab
from db.processes import FileLock
from db.records import Runner


def test_a_daemon_is_alive_while_it_holds_the_lock_and_runs(lab: Lab, runner: Runner) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours, theirs = (runner.model_copy(update={"pid": pid}) for pid in (os.getpid(), ended.pid))
    assert not is_alive(lab, ours)
    with FileLock(lab.lock(f"runner-{runner.device_key}")) as lock:
        assert lock.acquire()
        assert is_alive(lab, ours)
        assert not is_alive(lab, theirs)  # as when a child that it had just forked outlives it by a moment
        assert not is_alive(lab, runner.model_copy(update={"pid": None}))

    assert not is_alive(lab, ours)
