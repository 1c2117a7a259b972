"""`blueberry backup` and `blueberry doctor`, as people and programs call them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from db.lab import Lab
from server import doctor
from server.cli import blueberry
from tests.server.conftest import ROOT
from tests.server.test_cli import answer, do


def test_a_healthy_lab_is_exit_code_0(lab: Lab) -> None:
    said = answer(lab, "doctor")
    assert said["problems"] == 0
    names = [check["name"] for check in said["checks"]]
    assert {"python", "packages", "sqlite", "folder", "disk", "configuration", "database", "card", "mind"} <= {*names}
    assert {"driver", "sandbox"} <= {*names}
    assert len(names) == len(set(names))
    assert "no problems" in do(lab, "doctor").stdout


def test_a_problem_is_exit_code_1_and_its_fix_is_shown(lab: Lab) -> None:
    (lab.folder / "blueberry.toml").write_text("autostart = true\n")
    result = do(lab, "doctor")
    assert result.exit_code == 1
    said = " ".join(result.stdout.split())
    assert "unknown key 'autostart'" in said
    assert "→ correct it in" in said
    assert "1 problem, no warnings" in said or "1 problem, 1 warning" in said  # the disk of the machine that tests
    told = json.loads(do(lab, "doctor", "--json").stdout)
    [check] = [check for check in told["checks"] if check["level"] == "problem"]
    assert check["name"] == "configuration"


def test_packages_that_are_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["mcp>=99", "pydantic>=2", "nothing-such>=1; extra == 'runner'", "also-not; extra == 'dev'"]
    monkeypatch.setattr(doctor, "requires", lambda _name: needed)
    checks = {check.name: check for check in doctor.check_installation()}
    assert (checks["packages"].level, checks["trainer"].level) == ("problem", "warning")
    assert checks["packages"].fix == f"{sys.executable} -m pip install 'mcp>=99'"
    assert "nothing-such is not installed" in checks["trainer"].says
    assert checks["trainer"].fix.endswith("-m pip install 'nothing-such>=1'")


def test_a_fresh_look_is_taken_by_a_process_of_the_runners(lab: Lab) -> None:
    (lab.folder / "blueberry.toml").write_text('[runner]\ndevice = "cpu"\n')
    checks = {check["name"]: check for check in answer(lab, "doctor", "--look")["checks"]}
    assert checks["look"]["says"].startswith("registered cpu ")
    assert "runner 2" in checks


def test_a_lab_that_is_not_there_is_neither_copied_nor_made(tmp_path: Path) -> None:
    for arguments, code in ((["doctor"], 0), (["backup"], 1)):
        result = CliRunner().invoke(blueberry, [*arguments, "--lab", str(tmp_path / "typo")])
        assert (result.exit_code, list(tmp_path.iterdir())) == (code, []), result.output


def test_a_backup_says_what_is_in_it_and_how_to_restore_it(lab: Lab, tmp_path: Path) -> None:
    (lab.folder / ".env").write_text("OPENROUTER_API_KEY=sk-or-very-secret\n")
    (lab.folder / ".env").chmod(0o600)
    made = answer(lab, "backup")
    path = Path(made["output"])
    assert path.parent == lab.folder / "backups"
    assert path.stat().st_size == made["bytes"]
    assert b"very-secret" not in path.read_bytes()
    assert "delete lab.db-wal and lab.db-shm" in made["restore"]

    target = str(tmp_path / "copy.db")
    said = do(lab, "backup", "--output", target).stdout
    assert "no key is in it" in said
    assert "stop the runner" in said
    again = do(lab, "backup", "--output", target, "--json")
    assert (again.exit_code, "--force" in json.loads(again.stdout)["error"]) == (1, True)
    assert do(lab, "backup", "--output", target, "--force").exit_code == 0


def test_the_doctor_needs_no_torch(lab: Lab) -> None:
    script = (
        "import sys; from click.testing import CliRunner; from server.cli import blueberry;"
        f"done = CliRunner().invoke(blueberry, ['doctor', '--lab', {str(lab.folder)!r}]); assert not done.exit_code;"
        "sys.exit(' '.join({'torch', 'pynvml', 'gpu_runner', 'optuna', 'openai'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
