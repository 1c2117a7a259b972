"""How long the card waits between two runs of a queue, and which part of the time it works.

    .venv/bin/python -m benchmarks.gap [--runs 30] [--preset micro] [--tokens N] [--cold]

A real daemon works off a queue of training runs in a lab of its own, on the CPU; the mind process is woken after each
of them, as always. The corpus is tokenized before.

    gap       from one run's score.json to the first optimizer step of the next: the end of its processes, its row,
              the next claim, the start of processes, data and model
    training  from the first optimizer step to train.json, with the evaluations on the way
    scoring   from train.json to score.json, with the start of that process; so a cold start flatters the busy part
    busy      training and scoring, as a part of the time from the first step of the first run to the last score.json
    beside    seconds a run, of all that time, that were no optimizer steps

--cold has no process warmed, for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from db.experiments import add_experiment
from db.lab import Lab
from db.queue import add_run
from db.runners import register_runner
from gpu_runner.card import detect_cards
from gpu_runner.nvml import Nvml
from moe.config import Config, apply
from moe.data import prepare
from moe.fingerprint import code_hash
from moe.presets import PRESETS

LOOK_SECONDS = 0.005  # between two looks whether a run has begun

COLD = """
import sys
from gpu_runner import launcher
from gpu_runner.__main__ import main
launcher.LEAST_MEMORY = 2**62
sys.exit(main(sys.argv[1:]))
"""


class Life(NamedTuple):
    """One run: when it began to train, had trained and was scored (time.time()), and its seconds of optimizer steps."""

    begun: float
    trained: float
    scored: float
    steps_seconds: float


def enqueue(lab: Lab, config: Config, count: int) -> None:
    """Queues runs that differ in their seeds."""
    hardware_class = register_runner(lab.store, detect_cards(lab.settings.runner, Nvml())[0].columns()).hardware_class
    columns = {"title": "gap", "hypothesis": "-", "method": "-", "domain": "efficiency", "preset": "micro"}
    columns |= {"metric": "val_bpb", "direction": "lower", "proposer": "catalog"}
    experiment = add_experiment(lab.store, {**columns, "baseline": config.model_dump(), "treatment": {"lr": 1.0}})
    for seed in range(count):
        run = {"kind": "train", "fingerprint": "gap", "seed": seed, "config": config.model_dump(), "baseline": None}
        run |= {"code": code_hash(), "hardware_class": hardware_class, "needs_run_id": None, "priority": 0}
        add_run(lab.store, experiment.id, "baseline", run | {"steps": None})


def work_off(lab: Lab, count: int, *, cold: bool) -> list[Life]:
    """Has a daemon do all runs; returns their lives in order."""
    program = ["-c", COLD] if cold else ["-m", "gpu_runner"]
    begun: dict[Path, float] = {}
    with lab.log("runner").open("ab") as log:
        daemon = subprocess.Popen([sys.executable, *program, str(lab.folder)], stdout=log, stderr=log)
        try:
            while len([path for path in begun if (path.parent / "exit.json").exists()]) < count:
                for path in lab.runs_folder.glob("*/metrics.jsonl"):  # made right before the first step
                    begun.setdefault(path, time.time())

                if daemon.poll() is not None:
                    raise SystemExit(lab.log("runner").read_text())

                time.sleep(LOOK_SECONDS)
        finally:
            daemon.terminate()
            daemon.wait()

    return sorted(read_life(path.parent, begun[path]) for path in begun)


def read_life(directory: Path, begun: float) -> Life:
    """What the files of a run directory tell."""
    trained, scored = ((directory / name).stat().st_mtime for name in ("train.json", "score.json"))
    return Life(begun, trained, scored, json.loads((directory / "train.json").read_bytes())["seconds"])


def show(lives: list[Life]) -> None:
    """Prints the table."""
    gaps = [after.begun - before.scored for before, after in itertools.pairwise(lives)]
    wall = lives[-1].scored - lives[0].begun
    rows = {
        "gap, s": gaps,
        "training, s": [life.trained - life.begun for life in lives],
        "scoring, s": [life.scored - life.trained for life in lives],
    }
    print("| | median | lowest | highest |\n|---|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")

    busy = sum(life.scored - life.begun for life in lives) / wall
    beside = (wall - sum(life.steps_seconds for life in lives)) / len(lives)
    print(f"\n{len(lives)} runs in {wall:.0f} s; busy {busy:.3f}; beside optimizer steps {beside:.2f} s a run")


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="micro")
    parser.add_argument("--tokens", type=int, help="of training, instead of the preset's")
    parser.add_argument("--cold", action="store_true", help="start every process cold")
    options = parser.parse_args()
    config = PRESETS[options.preset]
    if options.tokens is not None:
        config = apply(config, {"budget_tokens": options.tokens})

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "blueberry.toml").write_text('[runner]\ndevice = "cpu"\n')
        lab = Lab(Path(name))
        prepare(config, lab.data_folder)
        enqueue(lab, config, options.runs)
        before = os.getloadavg()[0]
        lives = work_off(lab, options.runs, cold=options.cold)
        lab.close()

    show(lives)
    print(f"load of the machine before: {before:.1f}, after: {os.getloadavg()[0]:.1f}, of {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
