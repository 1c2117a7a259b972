"""An empty lab, and short ways to put experiments, runs and runners into one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from db.experiments import add_experiment, move_experiment
from db.lab import Lab
from db.queue import Queued, add_run
from db.records import Arm, Experiment, ExperimentStatus, Runner
from db.runners import register_runner
from db.store import Store


class Filled:
    """A lab with short ways to fill it."""

    def __init__(self, folder: Path) -> None:
        self.lab = Lab(folder)
        self.store: Store = self.lab.store

    def experiment(self, status: ExperimentStatus = "queued", **columns: Any) -> Experiment:
        """A new experiment."""
        values: dict[str, Any] = {"title": "More experts", "hypothesis": "h", "method": "m", "domain": "d"}
        values |= {"preset": "nano", "baseline": {"lr": 0.01}, "treatment": {"lr": 0.02}, "metric": "val_bpb"}
        experiment = add_experiment(self.store, {**values, "direction": "lower", "proposer": "catalog", **columns})
        move_experiment(self.store, experiment.id, status, allowed=["suggested"])
        return experiment

    def run(self, experiment: Experiment, seed: int = 0, *, arm: Arm = "treatment", **columns: Any) -> Queued:
        """A run in the queue."""
        values: dict[str, Any] = {
            "kind": "train",
            "fingerprint": "f",
            "seed": seed,
            "hardware_class": "cpu",
            "code": "c",
            "config": {"lr": 0.02},
        }
        values |= {"baseline": None, "needs_run_id": None, "priority": 0, "steps": 40}
        return add_run(self.store, experiment.id, arm, values | columns)

    def runner(self, key: str = "cpu", hardware_class: str = "cpu") -> Runner:
        """A registered runner."""
        values: dict[str, Any] = {
            "hostname": "host",
            "device": "cpu",
            "device_name": "CPU",
            "device_key": key,
            "precision": "fp32",
        }
        values |= {"torch": "2.13.0", "hardware_class": hardware_class, "memory_bytes": 2**30, "threads": 2}
        return register_runner(self.store, values | {"message": "training on the CPU"})


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    """A new lab."""
    filled = Filled(tmp_path / "lab")
    yield filled
    filled.lab.close()
