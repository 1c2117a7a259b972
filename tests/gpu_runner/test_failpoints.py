"""A process is killed once at each step of the protocol that has a name, and the lab is as if nothing had happened.
By hand also: it is stopped there until its lease is over and another daemon had time to take over, and wakes.

All deaths befall one lab, one after the other, so that a daemon is started only where one died. The steps are found in
the source: one that no scenario here reaches is a failure, as is a scenario of a step that is gone.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from db.experiments import add_experiment, get_experiment, move_experiment
from db.failpoints import VARIABLE
from db.lab import Lab
from db.store import Store
from moe.presets import PRESETS
from tests.gpu_runner.conftest import LEAN, LEASE_SECONDS, ROOT, WAIT_SECONDS, Bench
from tests.gpu_runner.soundness import find_faults, lab_processes

PACKAGES = ("server", "agents", "gpu_runner", "db")


class Doomed:
    """A lab in which a process will die at the step that the fuse names."""

    def __init__(self, folder: Path) -> None:
        self.bench = Bench(folder)
        self.fuse = folder / "fuse"
        self.daemon: subprocess.Popen[bytes] | None = None

    def arm(self, step: str, how: str = "KILL") -> None:
        """The next process that comes to the step gets the signal."""
        partial = self.fuse.with_suffix(".new")
        partial.write_text(f"{how} {step}")
        partial.rename(self.fuse)

    def has_fired(self) -> bool:
        """Whether a process has come to the step."""
        return not self.fuse.exists()

    def keep_a_daemon(self) -> subprocess.Popen[bytes]:
        """The daemon that lives; a new one where it died."""
        if self.daemon is None or self.daemon.poll() is not None:
            self.daemon = self.bench.start(variables={VARIABLE: str(self.fuse)})

        return self.daemon

    def call(self, step: str, *command: str) -> None:
        """Runs a Python program on the lab twice: once it dies at the step, and then it does what it should."""
        environment = os.environ | {"PYTHONPATH": f"{LEAN}{os.pathsep}{ROOT}", VARIABLE: str(self.fuse)}
        self.arm(step)
        codes = [
            subprocess.run([sys.executable, *command], env=environment, check=False, timeout=WAIT_SECONDS).returncode
            for _ in range(2)
        ]
        assert codes == [-signal.SIGKILL, 0]

    def is_drained(self) -> bool:
        """Whether all runs have ended; starts the daemon again where it died."""
        self.keep_a_daemon()
        return not self.bench.store.value("SELECT count(*) FROM runs WHERE status IN ('queued', 'running')")

    def drain(self) -> None:
        """Waits until the death has happened, the queue is empty, and all is as it should be."""
        self.bench.until(lambda: self.is_drained() and self.has_fired(), "the step reached, and an empty queue")
        faults: list[str] = []

        def is_sound() -> bool:
            self.keep_a_daemon()
            living = [daemon.pid for daemon in self.bench.daemons if daemon.poll() is None]
            faults[:] = find_faults(self.bench.lab, daemons=living)
            return not faults

        with suppress(AssertionError):  # what is wrong is told below
            self.bench.until(is_sound, "all as it should be")

        assert faults == []


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doomed]:
    """One lab for all deaths."""
    doomed = Doomed(tmp_path_factory.mktemp("doomed") / "lab")
    yield doomed
    doomed.bench.close()


def do_a_run(doomed: Doomed, step: str) -> None:
    """A run is claimed, started, trained with a checkpoint, scored and settled."""
    doomed.keep_a_daemon()
    doomed.arm(step)
    doomed.bench.enqueue(config={"act": "train", "save": 3})


def do_a_cold_run(doomed: Doomed, step: str) -> None:
    """A run is started while the warm process does not answer."""
    daemon = doomed.keep_a_daemon()
    doomed.bench.until_status(doomed.bench.enqueue(), "completed")
    os.kill(doomed.bench.warm_pid(daemon), signal.SIGSTOP)
    do_a_run(doomed, step)


def warm_up(doomed: Doomed, step: str) -> None:
    """A daemon has a process import what runs need; after this death it goes on cold, so another daemon follows it."""
    daemon = doomed.keep_a_daemon()
    daemon.kill()
    daemon.wait()
    do_a_run(doomed, step)
    doomed.bench.until(doomed.has_fired, f"{step} reached")
    daemon = doomed.keep_a_daemon()
    daemon.kill()
    daemon.wait()


def do_a_second_attempt(doomed: Doomed, step: str) -> None:
    """A run whose training process is killed is lost, and done again."""
    doomed.keep_a_daemon()
    doomed.arm(step)
    doomed.bench.enqueue(config={"act": "die once", "save": 3})


def take_over(doomed: Doomed, step: str) -> None:
    """A daemon dies while a run trains, and the next one adopts it."""
    key = doomed.bench.enqueue("linger")
    daemon = doomed.keep_a_daemon()
    doomed.bench.until_training(key)
    daemon.kill()
    daemon.wait()
    doomed.arm(step)
    doomed.bench.until(lambda: doomed.keep_a_daemon() and doomed.has_fired(), f"{step} reached")
    os.kill(doomed.bench.shim_pid(key), signal.SIGKILL)


def stop(doomed: Doomed, step: str) -> None:
    """A daemon is stopped while a run trains, and puts it back."""
    key = doomed.bench.enqueue("linger")
    daemon = doomed.keep_a_daemon()
    doomed.bench.until_training(key)
    doomed.arm(step)
    daemon.terminate()
    daemon.wait()


def cancel(doomed: Doomed, step: str) -> None:
    """Somebody cancels a run that trains; a caller that died calls again."""
    key = doomed.bench.enqueue("linger")
    doomed.keep_a_daemon()
    doomed.bench.until_training(key)
    code = "import sys; from pathlib import Path; from db.lab import Lab; from db.queue import cancel_experiment_runs; "
    code += f"cancel_experiment_runs(Lab(Path(sys.argv[1])).store, {doomed.bench.experiment_id})"
    doomed.call(step, "-c", code, str(doomed.bench.lab.folder))


def beat(doomed: Doomed, step: str) -> None:
    """A run is stopped because it cannot win; it is not tried again."""
    doomed.keep_a_daemon()
    doomed.arm(step)
    key = doomed.bench.enqueue_race(behind=2.0)
    doomed.bench.until(lambda: doomed.keep_a_daemon() and doomed.bench.run(key).status == "pruned", f"{step} survived")
    doomed.bench.assert_ended_once(key, "pruned")


def judge(doomed: Doomed, step: str) -> None:
    """The mind process finds that an experiment's probe has failed, and ends it; once."""
    store, folder = doomed.bench.store, doomed.bench.lab.folder
    values: dict[str, Any] = {
        "title": "t",
        "hypothesis": "h",
        "method": "m",
        "domain": "d",
        "preset": "nano",
        "metric": "val_bpb",
    }
    values |= {"direction": "lower", "proposer": "catalog", "baseline": PRESETS["nano"].model_dump()}
    experiment = add_experiment(store, {**values, "treatment": {"lr": 0.5}})
    move_experiment(store, experiment.id, "queued", allowed=["suggested"])
    doomed.bench.experiment_id = experiment.id
    key = doomed.bench.enqueue(kind="probe", arm="probe", code="other code, so that the daemon refuses it")
    doomed.keep_a_daemon()
    doomed.bench.until_status(key, "failed")
    doomed.call(step, "-m", "agents", str(folder))
    verdicts = store.rows("SELECT verdict, final FROM verdicts WHERE experiment_id = ?", (experiment.id,))
    assert verdicts == [{"verdict": "invalid", "final": 1}]
    assert get_experiment(store, experiment.id).status == "failed"


def migrate(doomed: Doomed, step: str) -> None:
    """A lab is made."""
    folder = doomed.bench.lab.folder / step
    code = "import sys; from pathlib import Path; from db.lab import Lab; Lab(Path(sys.argv[1])).store.pending()"
    doomed.call(step, "-c", code, str(folder))
    made = Lab(folder)
    assert made.store.value("PRAGMA journal_mode") == "wal"
    assert made.store.pending() == []
    assert find_faults(made) == []
    made.close()


def back_up(doomed: Doomed, step: str) -> None:
    """A lab is copied."""
    copy = doomed.bench.lab.folder / "copy.db"
    code = "import sys; from pathlib import Path; from db.backup import back_up; lab, copy = map(Path, sys.argv[1:]); "
    doomed.call(step, "-c", code + "back_up(lab, copy, force=True)", str(doomed.bench.lab.folder), str(copy))
    store = Store(copy, read_only=True)
    assert store.row("SELECT count(*) FROM runs") == doomed.bench.store.row("SELECT count(*) FROM runs")
    store.close()


SCENARIOS: dict[Callable[[Doomed, str], None], list[str]] = {
    do_a_run: [
        *("claim.commit", "claim.committed"),
        *("start.made", "start.locked", "write.synced", "write.renamed", "ingest.commit", "ingest.committed"),
        *("start.confirmed", "start.given", "start.noted", "warm.forked", "blank.started", "blank.given"),
        *("shim.started", "shim.named", "shim.step_started", "shim.step_ended", "shim.synced", "shim.ended"),
        *("settle.read", "finish.commit", "finish.committed", "settle.released"),
        *("checkpoint.dropped", "settle.tidied", "mind.woken"),
    ],
    do_a_cold_run: ["start.spawned"],
    warm_up: ["warm.ready"],
    do_a_second_attempt: ["lose.commit", "lose.committed"],
    take_over: ["daemon.registered", "daemon.ready", "adopt.commit", "adopt.committed"],
    stop: ["daemon.stopping", "put_back.commit", "put_back.committed", "close.commit", "close.committed"],
    cancel: ["cancel.commit", "cancel.committed"],
    beat: ["prune.found", "prune.killed"],
    judge: ["mind.locked", "judge.commit", "judge.committed", "mind.released"],
    migrate: ["migrate.locked", "migrate.wal", "migrate.statement", "migrate.applied"],
    back_up: ["backup.copied", "backup.named"],
}

DRIVES = "SELECT count(*) FROM runners WHERE pid = ? AND status = 'running'"

DEATHS = [(scenario, step) for scenario, steps in SCENARIOS.items() for step in steps]


@pytest.mark.parametrize(("scenario", "step"), DEATHS, ids=[step for _, step in DEATHS])
def test_a_process_dies_at(doomed: Doomed, scenario: Callable[[Doomed, str], None], step: str) -> None:
    scenario(doomed, step)
    doomed.drain()


@pytest.mark.slow
@pytest.mark.parametrize("step", SCENARIOS[do_a_run])
def test_a_process_sleeps_past_its_lease_at(doomed: Doomed, step: str) -> None:
    doomed.keep_a_daemon()
    doomed.arm(step, "STOP")
    key = doomed.bench.enqueue(config={"act": "train", "save": 3})
    doomed.bench.until(doomed.has_fired, f"{step} reached")
    other = doomed.bench.start(key="another card")
    if not step.endswith(".commit"):  # there the sleeper holds the database's lock, and the other waits
        doomed.bench.until(lambda: doomed.bench.store.value(DRIVES, (other.pid,)), "another daemon")

    awake_at = time.monotonic() + 3 * LEASE_SECONDS
    doomed.bench.until(
        lambda: doomed.bench.run(key).status == "completed" or time.monotonic() > awake_at, "time to take over"
    )
    for pid in lab_processes(doomed.bench.lab.folder):
        os.kill(pid, signal.SIGCONT)

    doomed.drain()
    other.kill()
    other.wait()


def test_every_step_with_a_name_was_visited() -> None:
    source = "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    named = set(re.findall(r'failpoint\("([^"]+)"\)', source))
    for transaction in re.findall(r'\.transaction\("([^"]+)"\)', source):
        named |= {f"{transaction}.commit", f"{transaction}.committed"}

    assert named == {step for _, step in DEATHS}
