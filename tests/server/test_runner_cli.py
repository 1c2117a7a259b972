"""`blueberry runner ...` against a real daemon."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.hands import alive_runners, stop_runners
from db.lab import Lab
from db.runners import list_runners
from tests.server.conftest import connect, put_experiment, put_run
from tests.server.test_cli import answer, do


@pytest.fixture
def idle(lab: Lab) -> Iterator[Lab]:
    """A lab with nothing to do, whose daemon is ended with the test."""
    lab.store.execute("DELETE FROM runners")
    (lab.folder / "blueberry.toml").write_text('preset = "nano"\n[runner]\ndevice = "cpu"\n')
    yield lab
    stop_runners(lab)


def test_runner_is_started_paused_restarted_and_drained(idle: Lab) -> None:
    started = answer(idle, "runner", "start")
    [line] = started["runners"]
    assert (line["alive"], line["state"]) == (True, "alive")
    assert started["done"] == f"runner 1 is alive (pid {line['pid']}, {line['device_name']})"

    paused = "paused: finishes what trains, claims nothing until `blueberry runner resume`"
    assert paused in do(idle, "runner", "pause").stdout
    restarted = answer(idle, "runner", "restart")
    assert restarted["done"].endswith("started anew, and what trained goes on")
    assert [(line["pid"], line["state"][:6]) for line in restarted["runners"]] == [(line["pid"], "paused")]
    assert "paused: finishes what trains" in do(idle, "runner", "status").stdout
    with connect(idle.folder) as session:
        assert session.call("run")["done"].endswith("until run(action='resume')")
        assert session.call("run", action="resume")["done"].startswith("runner 1 is alive")
        put_run(idle, put_experiment(idle).id)  # of a machine that is not this one
        assert session.call("status")["next"].startswith("none of the 1 waiting runs is for the runner")
        session.call("run", action="drain")

    while alive_runners(idle):
        pass

    [runner] = list_runners(idle.store)
    assert (runner.status, runner.mode) == ("stopped", "open")


def test_nothing_to_restart_or_drain_is_said_so(lab: Lab) -> None:
    for verb in ("restart", "drain"):
        refused = do(lab, "runner", verb)
        assert refused.exit_code == 1
        assert "no runner is alive" in refused.stderr

    assert "not running, and paused until `blueberry runner resume`" in do(lab, "runner", "pause").stdout
    assert "is not running" in do(lab, "runner", "resume").stdout


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which systemd looks for the units of this user."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "systemd" / "user"


def test_unit_starts_the_daemon_from_nothing(units: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path / '100 % of $HOME\'s "lab"')
    (lab.folder / "blueberry.toml").write_text('preset = "nano"\n[runner]\ndevice = "cpu"\n')
    made = answer(lab, "runner", "install")
    path = Path(made["path"])
    assert (path.parent, path.read_text()) == (units, made["unit"])
    assert made["commands"] == [
        "systemctl --user daemon-reload",
        f"systemctl --user enable --now {path.name}",
        "loginctl enable-linger",
    ]
    lines = dict(line.split("=", 1) for line in made["unit"].splitlines() if "=" in line)
    assert (lines["KillMode"], lines["Restart"], lines["WantedBy"]) == ("process", "on-failure", "default.target")
    assert lines["ExecReload"].endswith("/kill -HUP $MAINPID")
    start, variable = (lines[name].replace("%%", "%") for name in ("ExecStart", "Environment"))
    assert lines["StandardOutput"] == f"append:{lab.log('runner')}".replace("%", "%%")
    with lab.log("runner").open("a") as log:
        daemon = subprocess.Popen(
            shlex.split(start.replace("$$", "$")),
            env=dict([shlex.split(variable)[0].split("=", 1)]),
            cwd="/",
            stderr=log,
        )

    try:
        while not alive_runners(lab):
            assert daemon.poll() is None, lab.log("runner").read_text()

        assert made["commands"][0] not in do(lab, "runner", "install", "--print").stdout
        assert answer(lab, "runner", "install")["commands"][0] == "blueberry runner stop"
    finally:
        daemon.terminate()

    assert daemon.wait(30) == 0
    assert answer(lab, "runner", "uninstall")["commands"][0] == f"systemctl --user stop {path.name}"
    assert list(units.iterdir()) == []
    assert do(lab, "runner", "uninstall").exit_code == 1
    lab.close()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze to ask")
def test_systemd_understands_the_unit(units: Path, lab: Lab) -> None:
    path = answer(lab, "runner", "install")["path"]
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", path],
        env=os.environ | {"XDG_RUNTIME_DIR": str(units)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, Path(path).name in done.stderr) == (0, False), done.stderr


def test_each_lab_has_its_own_unit(units: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    labs = [Lab(tmp_path / name) for name in (".blueberry", "a/lab", "b/lab", "a/läb!")]
    names = [answer(lab, "runner", "install", "--print")["path"] for lab in labs]
    assert Path(names[0]) == units / "blueberry-runner.service"
    assert len(set(names)) == 4
    assert not units.exists()
    for lab in labs:
        lab.close()
