"""A training process that cannot write says so by its exit code, and leaves nothing half written."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.config import apply
from moe.presets import PRESETS
from moe.rundir import NO_DISK, run_in
from moe.train import train
from tests.moe.conftest import MakeRun
from tests.moe.runs import read_json

SHORT = apply(PRESETS["nano"], {"budget_tokens": 512 * 2, "progress_evals": 0})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, with room for a log and for no weights."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")

    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_weights_that_do_not_fit_are_for_want_of_disk(make_run: MakeRun, disk: Path) -> None:
    (disk / "config.json").write_bytes((make_run(SHORT) / "config.json").read_bytes())
    assert run_in(train, [str(disk)]) == NO_DISK
    assert not list(disk.glob("*checkpoint*"))
    assert json.loads((disk / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_a_fault_that_cannot_be_written_down_is_for_want_of_disk_too(make_run: MakeRun, disk: Path) -> None:
    def crash(_directory: Path) -> None:
        raise ValueError("a fault of the run")

    assert run_in(crash, [str(disk)]) == 1
    assert read_json(disk / "error.json")["message"] == "a fault of the run"
    (disk / "error.json").unlink()
    (disk / "a film").write_bytes(bytes(128 * 2**10))
    assert run_in(crash, [str(disk)]) == NO_DISK
