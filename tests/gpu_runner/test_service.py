"""The daemon as a service: restarted in place, reconfigured, paused, drained, with two cards, and outdated."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from db.processes import FileLock
from db.runners import list_runners, set_mode
from tests.gpu_runner.conftest import fake_card

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench

NEWER = """
INSERT INTO _sqlite_migrations
SELECT max(id) + 1, migration_set, 'm999_future', applied_at FROM _sqlite_migrations
"""


def test_restart_leaves_the_child_alone(bench: Bench) -> None:
    key = bench.enqueue("wait")
    daemon = bench.start()
    bench.until_training(key)
    child, started = bench.child_pid(key), list_runners(bench.store)[0].started_at
    for _ in range(5):  # also before the new program listens
        daemon.send_signal(signal.SIGUSR1)
        time.sleep(0.01)

    bench.until(lambda: list_runners(bench.store)[0].started_at != started, "a new daemon")
    bench.until_training(key, step=(bench.run(key).step or 0) + 20)
    assert bench.child_pid(key) == child
    assert daemon.poll() is None
    assert list_runners(bench.store)[0].pid == daemon.pid

    bench.go()
    bench.until_status(key, "completed")
    bench.assert_ended_once(key)
    assert bench.statuses(key) == ["completed"]
    bench.until(lambda: not _zombies(daemon.pid), "the shim is reaped")
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0


def test_a_daemon_does_not_outlive_its_owner(bench: Bench) -> None:
    key = bench.enqueue("wait")
    with FileLock(bench.lab.lock("owner")) as owner:
        assert owner.acquire()
        daemon = bench.start(owner=owner.path)
        bench.until_training(key)
        daemon.send_signal(signal.SIGUSR1)  # it stays the owner's when it starts anew
        bench.until_training(key, step=(bench.run(key).step or 0) + 20)
        assert daemon.poll() is None

    assert daemon.wait(60) == 0
    assert bench.run(key).status == "queued"
    assert list_runners(bench.store)[0].status == "stopped"
    assert "so this runner stops as well" in bench.lab.log("runner").read_text()


def test_configuration_is_read_anew_or_stays(bench: Bench) -> None:
    key = bench.enqueue("wait")
    daemon = bench.start()
    bench.until_training(key)
    path = bench.lab.folder / "blueberry.toml"
    good = path.read_text()

    def reload(text: str, said: str) -> None:
        path.write_text(text)
        daemon.send_signal(signal.SIGHUP)
        query = "SELECT count(*) FROM events WHERE kind = 'reloaded' AND message LIKE ?"
        bench.until(lambda: bench.store.value(query, (f"%{said}%",)), said)
        assert said in bench.lab.log("runner").read_text()

    reload(good + "max_failures = 1\n", "configuration read anew: runner.max_failures 2 -> 1")
    reload(good + "max_failures = 0\n", "what held before stays: ")
    reload(good.replace("threads = 1", "threads = 2") + "max_failures = 1\n", "hold from the next restart")
    (bench.lab.folder / "go").touch()
    crash = bench.enqueue("crash")
    bench.until_status(crash, "failed")
    assert bench.run(crash).failures == 1
    bench.assert_ended_once(key)


def test_paused_runner_finishes_what_trains_and_claims_nothing_even_after_a_restart(bench: Bench) -> None:
    first, second = bench.enqueue("wait"), bench.enqueue("train")
    daemon = bench.start()
    bench.until_training(first)
    runner = list_runners(bench.store)[0]
    set_mode(bench.store, runner.id, "paused")
    bench.go()
    bench.until_status(first, "completed")
    daemon.kill()
    daemon.wait()
    bench.start()
    bench.until(lambda: list_runners(bench.store)[0].started_at != runner.started_at, "a new daemon")
    beats = {list_runners(bench.store)[0].heartbeat_at}
    bench.until(lambda: len(beats | {list_runners(bench.store)[0].heartbeat_at}) > 1, "time to claim")
    assert bench.statuses(second) == []

    set_mode(bench.store, runner.id, "open")
    bench.until_status(second, "completed")


def test_drained_runner_finishes_what_trains_and_ends(bench: Bench) -> None:
    first, second = bench.enqueue("wait"), bench.enqueue("train")
    daemon = bench.start()
    bench.until_training(first)
    set_mode(bench.store, list_runners(bench.store)[0].id, "draining")
    daemon.send_signal(signal.SIGUSR1)  # a restart in between does not make it forget
    bench.go()
    assert daemon.wait(60) == 0
    bench.assert_ended_once(first)
    assert bench.run(second).status == "queued"
    [runner] = list_runners(bench.store)
    assert (runner.status, runner.pid, runner.mode) == ("stopped", None, "open")
    assert runner.message is not None
    assert runner.message.startswith("drained")

    bench.start()
    bench.until_status(second, "completed")


def test_daemon_in_a_lab_of_a_newer_blueberry_leaves_and_says_so(bench: Bench) -> None:
    key = bench.enqueue("wait")
    daemon = bench.start()
    bench.until_training(key)
    child = bench.child_pid(key)
    bench.store.execute(NEWER)
    assert daemon.wait(60) == 1
    log = bench.lab.log("runner").read_text()
    assert "starting anew, in case that this installation was updated" in log
    assert "was written by a newer Blueberry (m999_future); update this installation" in log
    assert Path(f"/proc/{child}").exists()
    assert bench.statuses(key) == ["live"]

    bench.store.execute("DELETE FROM _sqlite_migrations WHERE name = 'm999_future'")
    bench.start()
    bench.go()
    bench.until_status(key, "completed")
    bench.assert_ended_once(key)


def test_two_cards_train_side_by_side_under_one_daemon(bench: Bench, library: Path) -> None:
    state = bench.lab.folder / "state"
    state.write_text("count 2\n")
    settings = bench.lab.folder / "blueberry.toml"
    settings.write_text(settings.read_text().replace('"cpu"', '"cuda"'))
    bench.hardware_class = "Tesla T4 fp16 torch 2.13.0"
    keys = [bench.enqueue("wait") for _ in range(3)]
    daemon = bench.start(variables=fake_card(library, state))
    bench.until(lambda: [bench.run(key).step is not None for key in keys] == [True, True, False], "two that train")
    names = {runner.id: runner.device_key for runner in list_runners(bench.store)}
    assert sorted(names.values()) == ["GPU-aaaa", "GPU-bbbb"]
    for key in keys[:2]:
        [attempt] = bench.attempts(key)
        environment = Path(f"/proc/{bench.child_pid(key)}/environ").read_bytes().split(b"\0")
        assert f"CUDA_VISIBLE_DEVICES={names[attempt.runner_id]}".encode() in environment

    assert len({bench.attempts(key)[0].runner_id for key in keys[:2]}) == 2
    bench.go()
    for key in keys:
        bench.until_status(key, "completed")

    for key in keys:
        bench.assert_ended_once(key)

    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0
    assert {runner.status for runner in list_runners(bench.store)} == {"stopped"}


def _zombies(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if ") Z " in Path(f"/proc/{child}/stat").read_text()]
