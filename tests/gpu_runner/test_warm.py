"""Runs that start from a warm process: the same results, no wait, and nothing left when any of its parts is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from db.clock import Instant, now
from db.processes import FileLock, is_locked, is_process
from gpu_runner import launcher as launcher_module
from gpu_runner.child import Child
from gpu_runner.launcher import IDLE_SECONDS, Launcher
from moe.config import apply
from moe.data import prepare
from moe.presets import PRESETS
from tests.gpu_runner.conftest import ROOT, STANDIN

if TYPE_CHECKING:
    from gpu_runner.daemon import Daemon
    from tests.gpu_runner.conftest import Bench

TIMED = {"act": "wait", "budget_seconds": 600.0}

FORKS = """
import os, signal, sys, time
from gpu_runner.fork import Fork

def fail():
    raise ValueError("said")

def wait():
    time.sleep(600)

signal.signal(signal.SIGTERM, lambda *_: print("the parent's handler"))
codes = [Fork(lambda: 3, "three").wait(), Fork(fail, "fail").wait(), Fork(lambda: sys.exit(4), "four").wait()]
for end in (Fork.terminate, Fork.kill):
    fork = Fork(wait, "wait")
    end(fork)
    codes.append(fork.wait())
    end(fork)

print(codes)
"""


def test_next_run_is_served_by_a_process_that_was_warm_before_the_last_one_ended(bench: Bench) -> None:
    bench.register()
    first, second = bench.enqueue(), bench.enqueue("wait")
    daemon = bench.daemon()
    daemon.step(now())
    assert bench.statuses(first) == ["live"]
    warm = _warm_pid(daemon)
    bench.step_until(daemon, lambda: bench.run(second).step, "the second run trains")
    assert _parent(bench.shim_pid(second)) == warm == _warm_pid(daemon)
    assert bench.run(first).status == "completed"

    bench.go()
    bench.step_until(daemon, lambda: bench.run(second).status == "completed", "the second run done")
    for key in (first, second):
        bench.assert_ended_once(key)


def test_nothing_is_warmed_while_a_run_is_timed(bench: Bench) -> None:
    bench.register()
    timed, after = bench.enqueue(config=TIMED), bench.enqueue("wait")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(timed).step, "training")
    os.kill(_warm_pid(daemon), signal.SIGKILL)
    daemon.launcher.close()
    for later in range(1, 20):  # with every beat it may look for work
        daemon.step(_later(float(later)))

    assert not is_process(_warm_pid(daemon))
    (bench.directory(timed) / "train.json").touch()  # training has ended, and scoring is not timed
    daemon.step(_later(30.0))
    assert is_process(_warm_pid(daemon))
    assert bench.statuses(timed) == ["live"]
    bench.go()
    bench.step_until(daemon, lambda: bench.run(after).status == "completed", "the next run done")


def test_warm_process_is_replaced_while_a_run_is_not_timed(bench: Bench) -> None:
    bench.register()
    key, after = bench.enqueue("wait"), bench.enqueue()
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).step, "training")
    former = _warm_pid(daemon)
    daemon.launcher.close()
    bench.step_until(daemon, lambda: daemon.launcher.waits_on is None and is_process(_warm_pid(daemon)), "another")
    assert _warm_pid(daemon) != former
    assert bench.statuses(key) == ["live"]
    bench.go()
    bench.step_until(daemon, lambda: bench.run(after).status == "completed", "the next run done")


@pytest.mark.parametrize("trains", [True, False])
def test_killed_daemon_leaves_no_warm_process(bench: Bench, trains: bool) -> None:
    key = bench.enqueue("wait")
    daemon = bench.start()
    bench.until_training(key)
    warm = _parent(bench.shim_pid(key))
    if not trains:
        bench.go()
        bench.until_status(key, "completed")
        assert is_process(warm)

    daemon.kill()
    daemon.wait()
    bench.until(lambda: not is_process(warm), "the warm process has ended")
    if trains:
        assert is_locked(bench.directory(key) / "lock")
        bench.go()
        bench.start()
        bench.until_status(key, "completed")

    bench.assert_ended_once(key)
    assert bench.statuses(key) == ["completed"]


def test_killed_warm_process_costs_nothing_but_its_warmth(bench: Bench) -> None:
    first, second = bench.enqueue("wait"), bench.enqueue()
    bench.start()
    bench.until_training(first)
    warm, child = _parent(bench.shim_pid(first)), bench.child_pid(first)
    os.kill(warm, signal.SIGKILL)
    bench.until_training(first, step=(bench.run(first).step or 0) + 20)
    assert bench.child_pid(first) == child
    bench.go()
    for key in (first, second):
        bench.until_status(key, "completed")
        bench.assert_ended_once(key)
        assert bench.statuses(key) == ["completed"]

    assert "the warm process has ended" in bench.lab.log("runner").read_text()


def test_stopped_warm_process_is_given_up(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue()
    daemon = bench.daemon()
    warm = _warm_pid(daemon)
    os.kill(warm, signal.SIGSTOP)
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run done")
    assert not is_process(warm)
    bench.assert_ended_once(key)
    assert bench.statuses(key) == ["completed"]


def test_blank_process_ends_with_a_start_that_fails(bench: Bench) -> None:
    daemon = bench.daemon()
    directory = bench.lab.runs_folder / "1-1"
    seen: list[int] = []

    def confirm() -> None:
        seen.extend(_children(_warm_pid(daemon)))
        raise RuntimeError("taken over")

    with FileLock(bench.lab.lock("slot")) as slot, pytest.raises(RuntimeError, match="taken over"):
        Child.start(directory, {}, slots=[slot], confirm=confirm, launcher=daemon.launcher)

    assert len(seen) == 1
    bench.until(lambda: not is_process(seen[0]), "the blank process has ended")
    assert not is_locked(directory / "lock")


def test_idle_warm_process_gives_its_memory_back(bench: Bench) -> None:
    daemon = bench.daemon()
    warm = _warm_pid(daemon)
    daemon.step(_later(IDLE_SECONDS / 2))
    assert is_process(warm)
    daemon.step(_later(IDLE_SECONDS * 2))
    assert not is_process(warm)


def test_without_memory_to_spare_runs_start_cold(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "LEAST_MEMORY", 2**60)
    bench.register()
    key = bench.enqueue()
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run done")
    assert daemon.launcher.process is None
    bench.assert_ended_once(key)


def test_process_that_cannot_import_is_not_waited_for(bench: Bench, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (broken / "moe").mkdir(parents=True)
    (broken / "moe" / "__init__.py").write_text("raise ImportError('no torch')\n")
    launcher = Launcher(os.environ | {"PYTHONPATH": f"{broken}{os.pathsep}{ROOT}"}, bench.lab.log("runner"))

    def is_settled() -> bool:
        launcher.step(now(), in_use=False)
        return launcher.is_settled(now(), quiet=False)

    bench.until(is_settled, "no more waiting")
    with launcher.blank() as blank:
        assert blank is None

    said = bench.lab.log("runner").read_text()
    assert "ImportError: no torch" in said


def test_changed_code_is_imported_anew(bench: Bench, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    standin = copy / STANDIN.relative_to(ROOT)
    shutil.copytree(STANDIN, standin, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "moe", copy / "moe", ignore=shutil.ignore_patterns("__pycache__"))
    variables = {"PYTHONPATH": f"{standin}{os.pathsep}{ROOT}"}

    def code() -> str:
        command = [sys.executable, "-P", "-c", "from moe.fingerprint import code_hash; print(code_hash())"]
        return subprocess.check_output(command, env=os.environ | variables, text=True).strip()

    first = bench.enqueue(code=code())
    bench.start(variables=variables)
    bench.until_status(first, "completed")
    (copy / "moe" / "health.py").write_text("VERSION = 2\n")
    second = bench.enqueue(code=code())
    bench.until_status(second, "completed")
    assert "moe/ has changed; its modules are imported anew" in bench.lab.log("runner").read_text()


def test_warm_run_has_the_results_of_a_cold_one(bench: Bench) -> None:
    # On a busy machine two threads that spin for each other would take a minute.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    launcher = Launcher(environment, bench.lab.log("runner"))
    short = apply(PRESETS["nano"], {"budget_tokens": 8 * 512, "eval_tokens": 2048, "progress_evals": 1})
    request = {"kind": "train", "config": short.model_dump(), "baseline": None, "seed": 5, "device": "cpu"}
    request |= {"threads": 2, "data_dir": str(bench.lab.data_folder), "split": "val", "resume": None}
    request |= {"checkpoint": None}
    prepare(short, bench.lab.data_folder)  # or the first of them would have that in its peak memory
    cold = _do(bench, "1-1", request, launcher)

    def is_settled() -> bool:
        launcher.step(now(), in_use=False)
        return launcher.is_settled(now(), quiet=False)

    bench.until(is_settled, "a warm process")
    warm = _do(bench, "2-1", request, launcher)
    launcher.close()
    assert (warm["weights"], warm["score"]) == (cold["weights"], cold["score"])
    for step in warm["points"].keys() & cold["points"].keys():  # there may be more of them on a slow machine
        assert warm["points"][step] == cold["points"][step]

    assert warm["peak_memory_bytes"] == pytest.approx(cold["peak_memory_bytes"], rel=0.05)


def test_fork_ends_as_a_program_would() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", FORKS], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "[3, 1, 4, -15, -9]\n"
    assert done.stderr.splitlines()[-1] == "ValueError: said"


def _do(bench: Bench, name: str, request: dict[str, Any], launcher: Launcher) -> dict[str, Any]:
    """What a run leaves that is a function of its request, and its peak memory."""
    directory = bench.lab.runs_folder / name
    with FileLock(bench.lab.lock("slot")) as slot:
        assert slot.acquire()
        child = Child.start(directory, request, slots=[slot], confirm=lambda: None, launcher=launcher)

    bench.until(lambda: not child.is_alive(), "the end of the run")
    exited = json.loads((directory / "exit.json").read_bytes())
    assert (exited["step"], exited["exit_code"]) == ("evaluate", 0)
    points = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        point["values"].pop("tokens_per_second")
        points[point["step"]] = point["values"]

    score = json.loads((directory / "score.json").read_bytes())
    score.pop("train_seconds")
    peak = score.pop("peak_memory_bytes")
    weights = (directory / "checkpoint.pt").read_bytes()
    return {"weights": weights, "points": points, "score": score, "peak_memory_bytes": peak}


def _warm_pid(daemon: Daemon) -> int:
    assert daemon.launcher.process is not None
    return daemon.launcher.process.pid


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _later(seconds: float) -> Instant:
    at = now()
    return Instant(seconds=at.seconds + seconds, boot_id=at.boot_id)
