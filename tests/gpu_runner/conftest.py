"""A workbench for the runner: a lab of its own, real daemons as processes, and what must hold when all is over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from db.clock import now
from db.experiments import add_experiment, move_experiment
from db.lab import Lab
from db.processes import is_locked
from db.queue import add_run, get_run
from db.records import Arm, Attempt, Run
from db.runners import register_runner
from gpu_runner.card import Card, detect_cards
from gpu_runner.daemon import Daemon
from gpu_runner.nvml import Nvml
from moe.fingerprint import code_hash

ROOT = Path(__file__).parents[2]
STANDIN = Path(__file__).parent / "standin"
LEAN = Path(__file__).parent / "lean"
WAIT_SECONDS = 60.0
LEASE_SECONDS = 1.0

SETTINGS = f"""
[runner]
device = "cpu"
threads = 1
poll_seconds = 0.02
lease_seconds = {LEASE_SECONDS}
"""

CARD = Card(
    device="cpu",
    name="test",
    key="cpu",
    torch="2.13.0",
    memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    threads=1,
    message="training on the CPU",
)

OTHER_DAEMON = """
import sys
from dataclasses import replace
from pathlib import Path
from db.lab import Lab
from gpu_runner.card import detect_cards
from gpu_runner.drive import drive
from gpu_runner.nvml import Nvml
import logging
logging.basicConfig(level=logging.INFO)
lab, nvml = Lab(Path(sys.argv[1])), Nvml()
drive(lab, [replace(detect_cards(lab.settings.runner, nvml)[0], key=sys.argv[2])], nvml)
"""
"""A daemon of a second card with the same hardware class, as on a machine with two of them."""


class Bench:
    """One lab under test."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "blueberry.toml").write_text(SETTINGS)
        self.lab = Lab(folder)
        self.store = self.lab.store
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.stepped: list[Daemon] = []
        self.experiment_id = 0
        self.hardware_class = ""

    def register(self) -> None:
        """Makes runs go to daemon(); without it, they go to start()."""
        self.hardware_class = register_runner(self.store, CARD.columns()).hardware_class

    def start(
        self,
        *,
        key: str | None = None,
        owner: Path | None = None,
        standin: bool = True,
        variables: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a daemon; its log is logs/runner.log. `key` makes it one of another card, `owner` one that has one."""
        paths = [*([str(STANDIN)] if standin else []), str(LEAN), str(ROOT)]
        command = [sys.executable, "-m", "gpu_runner", str(self.lab.folder)]
        if owner is not None:
            command += ["--owner", str(owner)]

        if key is not None:
            command = [sys.executable, "-c", OTHER_DAEMON, str(self.lab.folder), key]

        with self.lab.log("runner").open("ab") as log:
            daemon = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (variables or {}),
                stdout=log,
                stderr=log,
                cwd=self.lab.folder,
            )

        self.daemons.append(daemon)
        return daemon

    def daemon(self, key: str = "cpu", *, card: Card = CARD) -> Daemon:
        """A daemon within the test, to be stepped by hand; its next run starts warm, in the step that claims it."""
        daemon = Daemon(Lab(self.lab.folder), replace(card, key=key), Nvml(), now())
        self.stepped.append(daemon)

        def is_settled() -> bool:
            daemon.launcher.step(now(), in_use=False)
            return daemon.launcher.is_settled(now(), quiet=False)

        self.until(is_settled, "a warm process")
        return daemon

    def enqueue(self, act: str = "train", *, arm: Arm = "treatment", **values: Any) -> int:
        """Queues a run whose child does as `act` says; returns its id."""
        if not self.hardware_class:
            card = detect_cards(self.lab.settings.runner, Nvml())[0]
            self.hardware_class = register_runner(self.store, card.columns()).hardware_class

        if not self.experiment_id:
            columns = {"title": "t", "hypothesis": "h", "method": "m", "domain": "d", "preset": "nano"}
            columns |= {"metric": "val_bpb", "direction": "lower", "proposer": "catalog"}
            self.experiment_id = add_experiment(self.store, {**columns, "baseline": {}, "treatment": {"lr": 1.0}}).id

        seed = int(self.store.value("SELECT count(*) FROM runs"))
        run = {"kind": "train", "fingerprint": "f", "seed": seed, "config": {"act": act}, "baseline": None}
        run |= {
            "code": code_hash(),
            "hardware_class": self.hardware_class,
            "needs_run_id": None,
            "priority": 0,
            "steps": None,
        }
        return add_run(self.store, self.experiment_id, arm, run | values).run.id

    def enqueue_race(self, behind: float, *, points: int = 4, act: str = "linger", **columns: Any) -> int:
        """Queues three baselines, then a treatment that is so far behind for so many of 8 points; returns its id."""
        values = {"title": "t", "hypothesis": "h", "method": "m", "domain": "d", "preset": "nano"}
        values |= {"metric": "val_bpb", "direction": "lower", "proposer": "catalog"}
        experiment = add_experiment(self.store, {**values, "baseline": {}, "treatment": {"lr": 1.0}, **columns})
        move_experiment(self.store, experiment.id, "queued", allowed=["suggested"])
        self.experiment_id = experiment.id
        curve = [4.0 - 0.2 * k for k in range(8)]
        last = None
        for seed in (1, 2, 3):
            config = {"act": "train", "points": 8, "curve": " ".join(f"{value + 0.001 * seed:.3f}" for value in curve)}
            name = f"baseline of {experiment.id}"
            last = self.enqueue(arm="baseline", fingerprint=name, seed=seed, config=config, needs_run_id=last)

        config = {"act": act, "points": 8, "curve": " ".join(f"{value + behind:.3f}" for value in curve[:points])}
        return self.enqueue(fingerprint=f"treatment of {experiment.id}", seed=1, config=config, needs_run_id=last)

    def run(self, run_id: int) -> Run:
        """The run as it stands."""
        return get_run(self.store, run_id)

    def attempts(self, run_id: int) -> list[Attempt]:
        """The attempts of a run, oldest first."""
        return [
            Attempt.of(row) for row in self.store.rows("SELECT * FROM attempts WHERE run_id = ? ORDER BY id", (run_id,))
        ]

    def statuses(self, run_id: int) -> list[str]:
        """How the attempts of a run stand."""
        return [attempt.status for attempt in self.attempts(run_id)]

    def directory(self, run_id: int) -> Path:
        """The run directory of its latest attempt."""
        return self.lab.runs_folder / self.attempts(run_id)[-1].directory

    def go(self) -> None:
        """Lets all waiting children end."""
        (self.lab.folder / "go").touch()

    def until(self, condition: Callable[[], object], what: str, *, seconds: float = WAIT_SECONDS) -> None:
        """Waits for a condition, and fails when it does not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            log = self.lab.log("runner")
            assert time.monotonic() < deadline, (
                f"after {seconds} s: not {what}\n{log.read_text() if log.exists() else 'no log'}"
            )
            time.sleep(0.01)

    def step_until(self, daemon: Daemon, condition: Callable[[], object], what: str) -> None:
        """Steps a daemon of the test until a condition holds."""

        def steps() -> object:
            daemon.step(now())
            return condition()

        self.until(steps, what)

    def until_training(self, run_id: int, *, step: int = 3) -> None:
        """Waits until the database knows of some steps."""
        self.until(lambda: (self.run(run_id).step or 0) >= step, f"run {run_id} at step {step}")

    def until_status(self, run_id: int, status: str) -> None:
        """Waits until a run stands so."""
        self.until(lambda: self.run(run_id).status == status, f"run {run_id} {status}")

    def shim_pid(self, run_id: int) -> int:
        """The process that leads a run's latest attempt."""
        return int((self.directory(run_id) / "shim.lock").read_text())

    def child_pid(self, run_id: int) -> int:
        """The training process below the shim."""
        shim = self.shim_pid(run_id)
        return int(Path(f"/proc/{shim}/task/{shim}/children").read_text().split()[0])

    def warm_pid(self, daemon: subprocess.Popen[bytes]) -> int:
        """The process from which the next run of a daemon is to be forked."""
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        [warm] = [pid for pid in children if b"gpu_runner.warm" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return int(warm)

    def steps(self, run_id: int) -> list[int]:
        """The steps of train_loss that the latest attempt has recorded."""
        rows = self.store.rows(
            """
            SELECT step, value FROM metric_points
            WHERE attempt_id = ? AND name = 'train_loss' AND value IS NOT NULL ORDER BY step
            """,
            (self.attempts(run_id)[-1].id,),
        )
        assert [row["value"] for row in rows] == [1.0 / row["step"] for row in rows]
        return [int(row["step"]) for row in rows]

    def assert_ended_once(self, run_id: int, status: str = "completed") -> None:
        """One end, one result, all that the child wrote without gap or duplicate, and no process left."""
        run = self.run(run_id)
        assert run.status == status
        ends = self.store.value("SELECT count(*) FROM events WHERE run_id = ? AND kind = 'ended'", (run_id,))
        assert ends == 1
        statuses = self.statuses(run_id)
        assert statuses.count("live") == 0
        if status == "completed":
            assert statuses.count("completed") == 1
            assert run.score == {"val_bpb": 1.5}
            written = (self.directory(run_id) / "metrics.jsonl").read_text().splitlines()
            assert self.steps(run_id) == list(range(1, len(written) + 1))

        for directory in self.lab.runs_folder.iterdir():
            assert not is_locked(directory / "lock")

    def close(self) -> None:
        """Ends whatever is left."""
        for daemon in self.daemons:
            with suppress(ProcessLookupError):
                daemon.send_signal(signal.SIGCONT)

            daemon.kill()
            daemon.wait()

        for directory in self.lab.runs_folder.iterdir():
            if is_locked(directory / "lock"):
                with suppress(OSError, ValueError):
                    os.killpg(int((directory / "shim.lock").read_text()), signal.SIGKILL)

        for stepped in self.stepped:
            children = [held.child.process for held in stepped.attempts.held.values()]
            processes = [*stepped.attempts.former, stepped.mind.process, *children]
            for process in processes:
                if process is not None:
                    process.wait()

            stepped.launcher.close()
            stepped.lab.close()

        self.lab.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """An empty lab, in whose folder the test stands."""
    bench = Bench(tmp_path / "lab")
    monkeypatch.chdir(bench.lab.folder)
    monkeypatch.setenv("PYTHONPATH", str(STANDIN))
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fake library, in old/ as it was years ago, and two builds of torch as far as metadata go."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is missing, which compiles the fake NVML")

    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    for place, flags in ((folder, []), (folder / "old", ["-DOLD"])):
        place.mkdir(exist_ok=True)
        output = place / "libnvidia-ml.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", str(output), str(source)], check=True)

    for build in ("cu126", "cpu"):
        metadata = folder / build / "torch-2.13.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+{build}\n")

    return folder


def fake_card(library: Path, state: Path, torch: str = "cu126") -> dict[str, str]:
    """The environment in which that library is found, and tells what the file `state` says."""
    paths = [library / torch, STANDIN, ROOT]
    return {
        "LD_LIBRARY_PATH": str(library),
        "FAKE_NVML": str(state),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
