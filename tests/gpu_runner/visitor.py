"""Somebody who uses a lab while its runner is tortured: `python -m tests.gpu_runner.visitor LAB SEED HARDWARE_CLASS`.

Enqueues small experiments, some with a probe before their runs, so that a few are always open, and cancels one now and
then. What it does is a function of the seed and of what stands in the lab, so it may be killed and started again. It
goes on until it is ended.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from db.errors import RefusedError
from db.experiments import add_experiment, move_experiment
from db.lab import Lab
from db.queue import add_run, cancel_experiment_runs
from db.store import Store
from moe.fingerprint import code_hash

MOST_OPEN = 6
"""Runs that wait or train at a time."""

_PROBE = {"acts": {"lr": {"acts": True}}, "causal": True, "fits": True}


def visit(store: Store, dice: random.Random, hardware_class: str) -> None:
    """Enqueues or cancels, for ever."""
    while True:
        open_runs = store.value("SELECT count(*) FROM runs WHERE status IN ('queued', 'running')")
        if open_runs < MOST_OPEN:
            enqueue(store, dice, hardware_class)

        if dice.random() < 0.1:
            cancel(store, dice)

        time.sleep(dice.uniform(0.02, 0.2))


def enqueue(store: Store, dice: random.Random, hardware_class: str) -> None:
    """One experiment with one to three runs, all or none."""
    values: dict[str, Any] = {"title": "t", "hypothesis": "h", "method": "m", "domain": "d", "preset": "nano"}
    values |= {
        "metric": "val_bpb",
        "direction": "lower",
        "proposer": "catalog",
        "baseline": {},
        "treatment": {"lr": 1.0},
    }
    with store.transaction():
        experiment = add_experiment(store, values)
        move_experiment(store, experiment.id, "queued", allowed=["suggested"])
        run: dict[str, Any] = {"fingerprint": f"{experiment.id}", "baseline": None, "steps": None, "needs_run_id": None}
        run |= {"code": code_hash(), "hardware_class": hardware_class, "priority": dice.randrange(3)}
        if dice.random() < 0.2:
            probe = run | {"kind": "probe", "seed": 0, "config": {"score": json.dumps(_PROBE)}}
            run["needs_run_id"] = add_run(store, experiment.id, "probe", probe).run.id

        for seed in range(1, dice.randint(1, 3) + 1):
            config: dict[str, Any] = {"act": "train", "points": dice.randint(5, 150), "pause": 0.005, "save": 20}
            if dice.random() < 0.1:
                config = {"act": "crash once"}

            config["score"] = json.dumps({"val_bpb": experiment.id + seed / 10})  # so that a mix-up is seen
            add_run(store, experiment.id, "treatment", run | {"kind": "train", "seed": seed, "config": config})


def cancel(store: Store, dice: random.Random) -> None:
    """One of the open experiments, if there is any."""
    rows = store.rows("SELECT id FROM experiments WHERE status IN ('queued', 'running') ORDER BY id DESC LIMIT 4")
    if not rows:
        return

    chosen = dice.choice(rows)["id"]
    try:
        with store.transaction():
            move_experiment(store, chosen, "cancelled", allowed=["queued", "running"], reason="cancelled on request")
            cancel_experiment_runs(store, chosen)
    except RefusedError:  # it has ended meanwhile
        return


if __name__ == "__main__":
    visit(Lab(Path(sys.argv[1])).store, random.Random(sys.argv[2]), sys.argv[3])
