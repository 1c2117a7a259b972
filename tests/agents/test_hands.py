"""Which daemon is alive (the lock of its card and its own process tell together), and which card runs are meant for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from agents.hands import is_alive, register, target_runner
from agents.planner import enqueue
from db.lab import Lab
from db.processes import FileLock
from db.records import Runner
from db.runners import register_runner
from tests.agents.test_research import approved


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


def test_runs_are_meant_for_the_number_of_processes_in_the_configuration(configured: Callable[[str], Lab]) -> None:
    alone = configured("[runner]\nprocesses = 1\n")
    card: dict[str, object] = {
        "hostname": "here",
        "device": "cuda",
        "device_name": "Tesla T4",
        "precision": "fp16",
        "torch": "2.13",
    }
    card |= {"memory_bytes": 15 * 2**30, "threads": 1, "message": "training on Tesla T4"}
    for key, count, kind in (("GPU-a", 1, "T4"), ("GPU-a+1", 2, "T4, 2 processes")):
        columns = card | {"device_key": key, "cards": count, "processes": count, "hardware_class": kind}
        register_runner(alone.store, columns)

    one, two = target_runner(alone), target_runner(configured("[runner]\nprocesses = 2\n"))
    assert one is not None
    assert two is not None
    assert (one.device_key, two.device_key) == ("GPU-a", "GPU-a+1")


def test_another_number_of_processes_is_looked_for_before_anything_is_queued(
    configured: Callable[[str], Lab],
) -> None:
    assert register(configured('[runner]\ndevice = "cpu"\n')).processes == 1
    lab = configured('[runner]\ndevice = "cpu"\nprocesses = 2\n')
    runner = register(lab)
    assert (runner.id, runner.processes, runner.cards) == (1, 2, 1)
    assert runner.hardware_class.endswith(", 2 processes")
    [plan] = enqueue(lab, [approved(lab, {"lr": 0.02}).id]).plans
    assert plan.hardware_class == runner.hardware_class
    assert "dealt out to 2 processes in micro-batches of 4 sequences; the gradients are the same" in plan.notes
