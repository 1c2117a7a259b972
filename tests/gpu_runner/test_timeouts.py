"""Runs that last too long or hang are ended with all of their processes, as cancelled ones are."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.clock import Instant, now
from db.queue import cancel_experiment_runs
from db.settings import Runner
from gpu_runner.watchdog import Watchdog

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stall_seconds = 1.0", "no metric, log line or file for 1 s (runner.stall_seconds): it hung, and was ended"),
        ("max_run_seconds = 1.0", "out of time: it ran for more than 1 s (runner.max_run_seconds)"),
    ],
)
def test_hung_run_is_ended_whole_and_tried_again(bench: Bench, setting: str, said: str) -> None:
    path = bench.lab.folder / "blueberry.toml"
    path.write_text(path.read_text() + setting + "\n")
    bench.register()
    key = bench.enqueue("hang")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "failed", "the run failed")

    assert [(attempt.status, attempt.error) for attempt in bench.attempts(key)] == [("failed", said)] * 2
    run = bench.run(key)
    assert (run.error, run.failures, run.lost) == (said, 2, 0)
    assert run.log_tail is not None
    assert _processes_of(bench.lab.runs_folder) == []
    bench.assert_ended_once(key, "failed")


def test_cancelled_run_takes_those_along_that_tried_to_get_away(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("hang")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: len(_processes_of(bench.lab.runs_folder)) >= 5, "all processes")
    cancel_experiment_runs(bench.store, bench.experiment_id)
    bench.step_until(daemon, lambda: bench.run(key).status == "cancelled", "the run cancelled")
    assert _processes_of(bench.lab.runs_folder) == []
    bench.assert_ended_once(key, "cancelled")


def test_daemon_that_died_while_it_killed_leaves_nothing_stopped(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("wait")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).step, "training")
    os.kill(bench.shim_pid(key), signal.SIGSTOP)
    heir = bench.daemon()  # of the same card
    bench.go()
    bench.step_until(heir, lambda: bench.run(key).status == "completed", "the run done")
    bench.assert_ended_once(key)
    assert bench.statuses(key) == ["completed"]


def test_what_a_run_leaves_behind_ends_with_it(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("litter")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run done")
    assert _processes_of(bench.lab.runs_folder) == []
    bench.assert_ended_once(key)


def test_watchdog_hears_metrics_and_any_new_file_and_nothing_else(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    (run / "sub").mkdir(parents=True)
    data.mkdir()
    settings = Runner(stall_seconds=40.0)
    start = now()
    watchdog = Watchdog(run, data, start)
    passed = 0.0

    def after(seconds: float, *, heard: bool = False) -> str | None:
        nonlocal passed
        said = None
        for _ in range(int(seconds)):
            passed += 1.0
            said = said or watchdog.look(Instant(seconds=start.seconds + passed, boot_id="b"), settings, heard=heard)

        return said

    assert after(39) is None
    for sign in (run / "log.txt", run / "sub" / "score.json", data / "corpus.bin"):
        sign.write_text("x")
        assert after(39) is None

    assert after(39, heard=True) is None
    assert after(39) is None
    assert "it hung" in str(after(15))


def test_suspended_machine_makes_no_run_too_old(tmp_path: Path) -> None:
    start = now()
    watchdog = Watchdog(tmp_path, tmp_path, start)
    settings = Runner(stall_seconds=600.0, max_run_seconds=600.0)
    for hours in (8, 0, -8, 16):  # also backwards, as no clock since boot should jump
        later = Instant(seconds=start.seconds + hours * 3600.0, boot_id=start.boot_id)
        assert watchdog.look(later, settings, heard=False) is None


def test_adopted_run_is_as_old_as_its_shim(tmp_path: Path) -> None:
    at = Instant(seconds=now().seconds + 50.0, boot_id="b")
    watchdog = Watchdog(tmp_path, tmp_path, at, shim=os.getpid())
    assert "it ran for more than" in str(watchdog.look(at, Runner(max_run_seconds=50.0), heard=True))


def _processes_of(runs_folder: Path) -> list[str]:
    """The command lines of all processes that work in one of the run directories."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                here = (entry / "cwd").readlink().is_relative_to(runs_folder)
                if here and ") Z " not in (entry / "stat").read_text():
                    found.append((entry / "cmdline").read_text())
            except OSError:
                continue

    return found
