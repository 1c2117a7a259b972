"""What tests read and change in run directories, and a trainer without one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe.config import Config
from moe.data import prepare
from moe.parallel import Team
from moe.rundir import Request
from moe.train import Trainer


def make_trainer(config: Config, data_dir: Path, team: Team | None = None) -> Trainer:
    """On the CPU, with seed 0."""
    request = Request(kind="train", config=config, seed=0, device="cpu", threads=1, data_dir=data_dir)
    return Trainer(request, prepare(config, data_dir), torch.device("cpu"), team or Team())


def read_json(path: Path) -> dict[str, Any]:
    """A file such as score.json, which holds an object."""
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


def edit(run: Path, **changes: Any) -> None:
    """Change fields of config.json."""
    path = run / "config.json"
    path.write_text(json.dumps(read_json(path) | changes))


def read_points(run: Path, last: int = sys.maxsize) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl up to step `last`; none before the run has begun."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [point for point in whole if point["step"] <= last]


def checkpoints(run: Path) -> list[Path]:
    """The resumable checkpoints, oldest first."""
    return sorted(run.glob("resume-*.pt"))


def step_of(checkpoint: Path) -> int:
    """The step that a resumable checkpoint was written after."""
    return int(checkpoint.stem.removeprefix("resume-"))


def read_weights(run: Path) -> dict[str, bytes]:
    """The bits of the final weights."""
    model = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    return {name: tensor.numpy().tobytes() for name, tensor in model.items()}


def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
