"""Behaves as config.json says: `act` names what happens, the file `go` in the lab ends a wait."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

DIRECTORY = Path(sys.argv[1])
CONFIG: dict[str, Any] = json.loads((DIRECTORY / "config.json").read_bytes())["config"]


def add_points(first: int, last: int) -> None:
    """Appends points one line at a time; train_loss is 1 / step."""
    with (DIRECTORY / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            values = {"train_loss": 1.0 / step}
            file.write(json.dumps({"step": step, "tokens": step * 10, "seconds": step / 100, "values": values}) + "\n")
            file.flush()
            time.sleep(CONFIG.get("pause", 0.0))


def wait() -> None:
    """Trains until the test says go."""
    step = 0
    while not (DIRECTORY.parents[1] / "go").exists():
        step += 1
        add_points(step, step)
        time.sleep(0.005)


def explain(error: str, message: str) -> None:
    """Leaves error.json."""
    (DIRECTORY / "error.json").write_text(json.dumps({"error": error, "message": message, "step": 3}))


act = CONFIG.get("act", "train")
print("the environment has a secret:", any("KEY" in name for name in os.environ))  # noqa: T201
add_points(1, 0)
if act == "train":
    add_points(1, CONFIG.get("points", 5))
elif act == "wait":
    wait()
elif act == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait()
elif act == "crash":
    add_points(1, 3)
    for number in range(50):
        print("line", number)  # noqa: T201

    sys.exit(3)
elif act == "crash once":
    if DIRECTORY.name.endswith("-1"):
        explain("RuntimeError", "bad luck")
        sys.exit(1)

    add_points(1, 5)
elif act == "diverge":
    add_points(1, 2)
    explain("non_finite", "training loss is not finite at step 3")
    sys.exit(1)
elif act == "babble":
    add_points(1, 1)
    with (DIRECTORY / "metrics.jsonl").open("ab") as out:
        out.write(b'not json\n\xff\xfe\0\n{"step": "x"}\n{"step": 1e999}\n[]\n\n' + b"9" * 3_000_000 + b"\n")

    add_points(2, 3)
    with (DIRECTORY / "metrics.jsonl").open("ab") as out:
        out.write(b'{"step": 4, "tokens": 40, "seconds": 0.1, "values": {"train_loss": NaN, "lr": null}}\n{"step": 5, ')
