"""The server as a process: killed, closed, stopped, and on labs that cannot be used."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

from agents.hands import is_alive, stop_runners
from db.experiments import list_experiments
from db.lab import Lab
from db.queue import count_queued
from db.runners import list_runners
from db.tasks import task_of_key
from tests.server.conftest import IDEA, ROOT, RawServer, Session, connect, put_experiment


def test_it_ends_with_its_client_even_in_mid_call(lab: Lab) -> None:
    server = RawServer(lab.folder)
    server.begin("status", wait_seconds=20)
    begin = time.monotonic()
    code, out = server.close()
    assert (code, time.monotonic() - begin < 3.0) == (0, True)
    assert all(json.loads(line)["jsonrpc"] == "2.0" for line in out.splitlines())


def test_sigterm_ends_it_at_once(lab: Lab) -> None:
    server = RawServer(lab.folder)
    server.begin("status", wait_seconds=20)
    server.process.send_signal(signal.SIGTERM)
    code, out = server.close()
    assert (code, out) == (0, "")


def test_killed_in_mid_call_and_asked_again_it_does_the_call_once(lab: Lab) -> None:
    idea = {**IDEA, "treatment": {"top_k": 1}}
    for pause in (0.02, 0.15):
        server = RawServer(lab.folder)
        server.begin("suggest", proposals=[idea], add_to_queue=True, idempotency_key="once")
        time.sleep(pause)
        server.kill()

    with connect(lab.folder) as session:
        made = session.call("suggest", proposals=[idea], add_to_queue=True, idempotency_key="once")

    [experiment] = list_experiments(lab.store)
    assert made["experiments"][0]["id"] == experiment.id
    task = task_of_key(lab.store, "once")
    assert task is not None
    assert task.status == "done"
    assert count_queued(lab.store) in (0, 5)


def test_the_runner_outlives_the_server(lab: Lab) -> None:
    lab.store.execute("DELETE FROM runners")
    (lab.folder / "blueberry.toml").write_text('preset = "nano"\n[runner]\ndevice = "cpu"\n')
    server = RawServer(lab.folder)
    server.begin("run")
    answer = server.receive()["result"]["structuredContent"]
    assert "is alive" in answer["done"], answer
    server.kill()
    [runner] = list_runners(lab.store)
    try:
        assert is_alive(lab, runner)
    finally:
        assert stop_runners(lab) == 1


def test_a_broken_configuration_is_an_error_of_each_call_until_it_is_mended(lab: Lab) -> None:
    settings = lab.folder / "blueberry.toml"
    good = settings.read_text()
    settings.write_text("preset = nano\n")
    with connect(lab.folder) as session:
        assert "blueberry.toml is not valid TOML" in session.refusal("status")
        settings.write_text("presett = 'nano'\n")
        assert "unknown key 'presett'" in session.refusal("suggest")
        settings.write_text(good)
        assert session.call("status")["overview"]["experiments"] == {}


def test_a_read_only_lab_says_so(lab: Lab) -> None:
    experiment = put_experiment(lab)
    lab.close()
    _make_read_only(lab.folder)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "server.cli", "review", "--json", "--lab", str(lab.folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=_obey_permissions,
        )
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        message = json.loads(done.stdout)["error"]
        assert str(lab.folder) in message
        assert "writable" in message
    finally:
        _make_writable(lab.folder)

    assert [item.id for item in list_experiments(lab.store)] == [experiment.id]


def test_two_servers_do_not_disturb_each_other(sessions: dict[str, Session]) -> None:
    first, second = sessions.values()
    made = [
        session.call("suggest", proposals=[{**IDEA, "title": f"Clip at {value}", "treatment": {"grad_clip": value}}])[
            "experiments"
        ]
        for session, value in ((first, 0.2), (second, 0.35), (first, 3.1), (second, 5.3))
    ]
    ids = [item["id"] for [item] in made]
    assert len(set(ids)) == 4
    assert second.call("status", experiment_id=ids[0])["experiment"]["title"] == "Clip at 0.2"


def test_nothing_but_the_protocol_is_on_stdout_and_the_log_has_no_arguments(lab: Lab) -> None:
    server = RawServer(lab.folder)
    server.begin("review", experiment_id=77)
    answer = server.receive()
    assert answer["result"]["isError"] is True
    code, out = server.close()
    assert (code, out) == (0, "")
    log = lab.log("server").read_text()
    assert "there is no experiment 77" in log


def _make_read_only(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def _make_writable(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def _obey_permissions() -> None:
    # Root may write whatever the permissions say; without CAP_DAC_OVERRIDE (1) it may not.
    if os.geteuid() == 0:
        drop_from_bounding_set = 24
        if ctypes.CDLL(None).prctl(drop_from_bounding_set, 1, 0, 0, 0):
            raise OSError("CAP_DAC_OVERRIDE cannot be dropped")
