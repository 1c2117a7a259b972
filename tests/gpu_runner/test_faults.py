"""Processes are killed, stopped and doubled in mid-run: every run still ends once, with all of its metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.clock import Instant, now
from db.errors import FencedError, LabUnusableError
from db.processes import FileLock, is_locked
from db.queue import claim_run, ingest
from gpu_runner.child import Child

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench


_STANDIN, _ROOT = Path(__file__).parent / "standin", Path(__file__).parents[2]
_PATHS = os.environ | {"PYTHONPATH": f"{_STANDIN}{os.pathsep}{_ROOT}"}


@pytest.mark.parametrize("victim", ["training child", "shim", "daemon", "all"])
def test_killed_in_mid_run(bench: Bench, victim: str) -> None:
    key = bench.enqueue("wait")
    daemon = bench.start()
    bench.until_training(key)
    shim, child, first = bench.shim_pid(key), bench.child_pid(key), bench.attempts(key)[0]
    if "daemon" in victim or victim == "all":
        daemon.kill()
        daemon.wait()

    if "shim" in victim or victim == "all":
        os.kill(shim, signal.SIGKILL)

    if "child" in victim or victim == "all":
        os.kill(child, signal.SIGKILL)

    if daemon.returncode is not None:
        bench.start()

    if victim == "daemon":
        step = bench.run(key).step or 0
        bench.until_training(key, step=step + 20)  # the same child trains on
        assert bench.shim_pid(key) == shim
    else:
        bench.until(lambda: len(bench.attempts(key)) == 2, "a second attempt")
        bench.until_training(key)

    bench.go()
    bench.until_status(key, "completed")
    bench.assert_ended_once(key)
    if victim == "daemon":
        assert [attempt.id for attempt in bench.attempts(key)] == [first.id]
    else:
        assert bench.statuses(key) == ["lost", "completed"]
        assert (bench.run(key).failures, bench.run(key).lost) == (0, 1)


def test_what_ended_while_no_daemon_lived_is_settled_by_the_next(bench: Bench) -> None:
    key = bench.enqueue("wait")
    daemon = bench.start()
    bench.until_training(key)
    daemon.kill()
    daemon.wait()
    bench.go()
    bench.until(lambda: not is_locked(bench.directory(key) / "lock"), "the child's end")
    bench.start()
    bench.until_status(key, "completed")
    bench.assert_ended_once(key)
    assert bench.statuses(key) == ["completed"]


def test_stopped_daemon_is_fenced_after_its_lease(bench: Bench) -> None:
    key = bench.enqueue("wait")
    first = bench.start()
    bench.until_training(key)
    first.send_signal(signal.SIGSTOP)
    owner = bench.attempts(key)[0].runner_id
    bench.start(key="cpu-b")
    bench.until(lambda: bench.attempts(key)[0].runner_id != owner, "another daemon takes over")

    first.send_signal(signal.SIGCONT)
    log = bench.lab.log("runner")
    bench.until(lambda: "let go of attempt" in log.read_text(), "the first daemon lets go")
    bench.until_training(key, step=(bench.run(key).step or 0) + 10)

    # The first card is still occupied by the adopted child; so its daemon must not start another there.
    bench.go()
    bench.until_status(key, "completed")
    bench.assert_ended_once(key)
    assert bench.statuses(key) == ["completed"]
    assert first.poll() is None


def test_place_on_the_card_is_taken_as_long_as_its_child_lives(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("wait")
    daemon, other = bench.daemon(), bench.daemon("cpu-b")
    daemon.step(now())
    assert bench.statuses(key) == ["live"]
    other.attempts.stopping = True  # it only adopts
    other.step(_later(2.0))
    next_key = bench.enqueue()
    daemon.step(_later(2.0))
    assert (list(daemon.attempts.held), len(other.attempts.held)) == ([], 1)
    assert bench.run(next_key).status == "queued"

    bench.go()
    bench.step_until(other, lambda: bench.run(key).status == "completed", "the first run done")
    bench.step_until(daemon, lambda: bench.run(next_key).status == "completed", "the next run done")
    bench.assert_ended_once(next_key)


def test_daemon_that_was_suspended_right_after_claiming_starts_nothing(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue()
    suspended, other = bench.daemon(), bench.daemon("cpu-b")
    claim = claim_run(bench.store, suspended.runner, now(), lease_seconds=1.0)
    assert claim is not None
    other.attempts.stopping = True
    other.step(_later(2.0))
    assert bench.statuses(key) == ["cancelled"]

    def confirm() -> bool:
        return ingest(bench.store, claim.attempt, [], 0, now(), lease_seconds=1.0)

    directory = bench.lab.runs_folder / claim.attempt.directory
    with FileLock(bench.lab.lock("slot")) as slot, pytest.raises(FencedError):
        Child.start(directory, {}, slots=[slot], confirm=confirm, launcher=suspended.launcher)

    assert not (directory / "log.txt").exists()


@pytest.mark.parametrize("has_result", [True, False])
def test_attempt_of_an_earlier_boot(bench: Bench, has_result: bool) -> None:
    bench.register()
    key = bench.enqueue()
    daemon = bench.daemon()
    before = Instant(seconds=1e9, boot_id="before")
    claim = claim_run(bench.store, daemon.runner, before, lease_seconds=30.0)
    assert claim is not None
    directory = bench.lab.runs_folder / claim.attempt.directory
    directory.mkdir()
    if has_result:
        (directory / "exit.json").write_text('{"step": "evaluate", "exit_code": 0, "terminated": false}')
        (directory / "score.json").write_text('{"val_bpb": 1.5}')

    daemon.attempts.stopping = True
    daemon.step(now())
    run = bench.run(key)
    assert (run.status, run.error) == (("completed", None) if has_result else ("queued", "its runner was stopped"))


def test_folder_of_an_earlier_life_is_never_taken_for_a_result(bench: Bench) -> None:
    # After a restored backup the database may hand out a token whose folder exists already.
    bench.register()
    key = bench.enqueue()
    stale = bench.lab.runs_folder / f"{key}-1"
    stale.mkdir()
    (stale / "exit.json").write_text('{"step": "evaluate", "exit_code": 0, "terminated": false}')
    (stale / "score.json").write_text('{"val_bpb": 0.1}')
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run done")
    assert bench.statuses(key) == ["lost", "completed"]
    bench.assert_ended_once(key)


def test_two_daemons_share_a_lab_and_never_a_run(bench: Bench) -> None:
    keys = [bench.enqueue() for _ in range(6)]
    bench.start()
    bench.start(key="cpu-b")
    for key in keys:
        bench.until_status(key, "completed")

    for key in keys:
        bench.assert_ended_once(key)
        assert len(bench.attempts(key)) == 1


def test_second_daemon_of_a_card_says_so_and_leaves(bench: Bench) -> None:
    first = bench.start()
    bench.until(lambda: bench.store.value("SELECT status FROM runners") == "running", "a first daemon")
    second = bench.start()
    assert second.wait(60) == 0
    assert f"a runner (pid {first.pid}) drives" in bench.lab.log("runner").read_text()
    assert first.poll() is None


@pytest.mark.parametrize(("fault", "sign"), [("locked", "stayed locked"), ("full", "is full")])
def test_unusable_database_is_waited_out_while_the_child_trains(bench: Bench, fault: str, sign: str) -> None:
    bench.register()
    key = bench.enqueue("wait")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).step, "training")
    database = daemon.store.database.conn
    database.execute("PRAGMA busy_timeout = 50")
    if fault == "full":
        database.execute(f"PRAGMA max_page_count = {bench.store.value('PRAGMA page_count')}")
    else:
        bench.store.database.conn.execute("BEGIN IMMEDIATE")

    with pytest.raises(LabUnusableError, match=sign):
        bench.step_until(daemon, lambda: False, "a failing step")

    assert is_locked(bench.directory(key) / "lock")
    if fault == "full":
        database.execute("PRAGMA max_page_count = 1000000")
    else:
        bench.store.database.conn.execute("ROLLBACK")

    bench.go()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run done")
    bench.assert_ended_once(key)


def test_daemon_leaves_when_its_lab_is_gone(bench: Bench) -> None:
    daemon = bench.start()
    bench.until(lambda: bench.store.value("SELECT status FROM runners") == "running", "a daemon")
    for path in bench.lab.folder.glob("lab.db*"):
        path.unlink()

    assert daemon.wait(60) == 1
    assert "is gone" in bench.lab.log("runner").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("[runner", "is not valid TOML"),
        ("[runner]\nspeed = 3", "unknown key 'runner.speed'"),
        ("[runner]\ndevice = 'cuda'", "runner.device is cuda, but no NVIDIA card can be used"),
    ],
)
def test_unusable_configuration_ends_the_daemon_with_its_reason(bench: Bench, settings: str, said: str) -> None:
    (bench.lab.folder / "blueberry.toml").write_text(settings)
    daemon = bench.start(variables={"CUDA_VISIBLE_DEVICES": ""})
    assert daemon.wait(60) == 1
    log = bench.lab.log("runner").read_text()
    assert said in log
    assert "Traceback" not in log


def test_ignored_child_signal_does_not_falsify_exit_codes(bench: Bench, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").write_text('{"kind": "train", "config": {"act": "crash"}}')
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = subprocess.Popen([sys.executable, "-m", "gpu_runner.shim", str(directory)], env=_PATHS)
        bench.until(lambda: (directory / "exit.json").exists(), "exit.json")
    finally:
        signal.signal(signal.SIGCHLD, previous)

    process.wait()
    assert (directory / "exit.json").read_text() == (
        '{"step": "train", "exit_code": 3, "terminated": false, "oom_killed": false}\n'
    )


def test_suspended_machine_loses_nothing(bench: Bench) -> None:
    bench.register()
    keys = [bench.enqueue("wait"), bench.enqueue("wait")]
    daemons = [bench.daemon(), bench.daemon("cpu-b")]
    for daemon in daemons:
        daemon.step(now())

    before = [bench.attempts(key) for key in keys]
    morning = 8 * 3600.0
    for seconds in (morning, morning + 0.2, morning + 0.5, morning + 0.8):  # past every lease, and everybody's
        for daemon in daemons:
            daemon.step(_later(seconds))

    after = [bench.attempts(key) for key in keys]
    assert [[(attempt.id, attempt.token, attempt.runner_id) for attempt in attempts] for attempts in after] == [
        [(attempt.id, attempt.token, attempt.runner_id) for attempt in attempts] for attempts in before
    ]
    bench.go()

    def step() -> bool:
        for daemon in daemons:
            daemon.step(_later(morning + 1.0))

        return all(bench.run(key).status == "completed" for key in keys)

    bench.until(step, "both runs done")
    for key in keys:
        bench.assert_ended_once(key)


def _later(seconds: float) -> Instant:
    at = now()
    return Instant(seconds=at.seconds + seconds, boot_id=at.boot_id)
