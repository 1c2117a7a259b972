"""Every run ends once under a seeded killer; here in short, and by hand for as long as one likes.

python -m pytest tests/gpu_runner/test_torture.py -m slow
python -m tests.gpu_runner.torture --kills 600 --runs 250
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_runner.torture import Report, Torture


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
    assert report.fenced > 0


def torture(folder: Path, *, seed: int, kills: int, runs: int) -> Report:
    """Tortures a lab, and prints what became of it."""
    torture = Torture(folder, seed)
    try:
        report = torture.run(kills=kills, runs=runs)
    finally:
        torture.close()

    print(report)  # noqa: T201
    return report
