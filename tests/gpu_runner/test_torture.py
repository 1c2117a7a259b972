"""Every run ends once under a seeded killer; here in short, and by hand for as long as one likes.

python -m pytest tests/gpu_runner/test_torture.py -m slow
python -m tests.gpu_runner.torture --kills 600 --runs 250
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from moe.config import apply
from moe.presets import PRESETS
from tests.gpu_runner.torture import Report, Torture

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench


@pytest.mark.timeout(600)
def test_lab_is_sound_after_forty_kills(tmp_path: Path) -> None:
    report = torture(tmp_path / "lab", seed=1, kills=40, runs=12)
    assert report.faults == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_lab_is_sound_after_two_hundred_kills(tmp_path: Path, seed: int) -> None:
    report = torture(tmp_path / "lab", seed=seed, kills=200, runs=80)
    assert report.faults == []
    assert {"gpu_runner", "gpu_runner.shim", "moe.train", "moe.evaluate", "agents"} <= set(report.kills)


def torture(folder: Path, *, seed: int, kills: int, runs: int) -> Report:
    """Tortures a lab, and prints what became of it."""
    torture = Torture(folder, seed)
    try:
        report = torture.run(kills=kills, runs=runs)
    finally:
        torture.close()

    print(report)  # noqa: T201
    return report


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_real_training_that_is_killed_again_and_again_ends_with_the_same_weights(bench: Bench) -> None:
    settings = bench.lab.folder / "blueberry.toml"
    settings.write_text(settings.read_text() + 'keep = "all"\n')
    config = apply(PRESETS["nano"], {"budget_tokens": 512 * 300}).model_dump()
    spared, tortured = (bench.enqueue(fingerprint=name, config=config, seed=7) for name in ("spared", "tortured"))
    bench.start(standin=False)
    until = partial(bench.until, seconds=300.0)
    until(lambda: bench.run(spared).status == "completed", "the run that is spared done")
    saved = 0
    for blow in ("checkpoint", "trainer", "daemon", "shim", "checkpoint", "shim"):
        until(partial(is_beyond, bench, tortured, saved), f"training beyond step {saved}")
        token = bench.attempts(tortured)[-1].token
        if blow == "checkpoint":
            saved = bench.run(tortured).step or 0
            os.kill(bench.child_pid(tortured), signal.SIGTERM)  # as a machine does that is about to be taken away
        elif blow == "daemon":
            bench.daemons[-1].kill()
            bench.start(standin=False)
        else:
            os.kill(bench.child_pid(tortured) if blow == "trainer" else bench.shim_pid(tortured), signal.SIGKILL)

        until(partial(has_moved_on, bench, tortured, token), f"the run taken over after the {blow}")

    until(lambda: bench.run(tortured).status == "completed", "the run that is tortured done")
    assert bench.statuses(tortured) == ["lost"] * 5 + ["completed"]
    one, other = (bench.run(key) for key in (spared, tortured))
    assert one.val_bpb == other.val_bpb
    weights = [torch.load(bench.directory(key) / "checkpoint.pt")["model"] for key in (spared, tortured)]
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def is_beyond(bench: Bench, key: int, step: int) -> bool:
    """Whether the run is known to have trained beyond that step."""
    return (bench.run(key).step or 0) > step


def has_moved_on(bench: Bench, key: int, token: int) -> bool:
    """Whether the run has an owner since who held that token."""
    return bench.attempts(key)[-1].token != token
