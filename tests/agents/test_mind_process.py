"""The mind process, as others start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_lab_that_was_deleted_does_not_come_back(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agents", str(tmp_path / "gone")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "there is no lab in" in done.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []
