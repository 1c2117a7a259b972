"""A seeded killer against a lab with two daemons: SIGKILL of daemons, shims and children, SIGSTOP past the lease."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from db.processes import is_locked

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench

RUNS = 25
SECONDS = 300.0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_run_ends_once_under_a_killer(bench: Bench, seed: int) -> None:
    dice = random.Random(seed)
    settings = bench.lab.folder / "blueberry.toml"
    settings.write_text(settings.read_text() + "max_lost = 100\n")
    keys = [bench.enqueue(config={"act": "train", "points": 200, "pause": 0.002}) for _ in range(RUNS)]
    daemons: dict[str, subprocess.Popen[bytes]] = {}
    deeds = {"daemon": 0, "stop": 0, "shim": 0, "child": 0}
    stopped: dict[str, float] = {}
    deadline = time.monotonic() + SECONDS
    while any(bench.run(key).status in ("queued", "running") for key in keys):
        assert time.monotonic() < deadline, [(bench.run(key).status, bench.statuses(key)) for key in keys]
        for name in ("cpu", "cpu-b"):
            if name not in daemons or daemons[name].poll() is not None:
                daemons[name] = bench.start(key=name)

        time.sleep(dice.uniform(0.03, 0.35))
        for name, until in list(stopped.items()):
            if time.monotonic() > until:
                daemons[name].send_signal(signal.SIGCONT)
                del stopped[name]

        deed, name = (
            dice.choice(["daemon", "stop", "shim", "child", "nothing", "nothing"]),
            dice.choice(["cpu", "cpu-b"]),
        )
        if deed == "daemon":
            daemons[name].kill()
            daemons[name].wait()
            stopped.pop(name, None)
        elif deed == "stop" and not stopped:
            daemons[name].send_signal(signal.SIGSTOP)
            stopped[name] = time.monotonic() + dice.uniform(0.5, 3.0)
        elif deed in ("shim", "child"):
            live = [key for key in keys if bench.statuses(key)[-1:] == ["live"]]
            if not live:
                continue

            with suppress(OSError, ValueError, IndexError):
                find = bench.shim_pid if deed == "shim" else bench.child_pid
                os.kill(find(dice.choice(live)), signal.SIGKILL)
        else:
            continue

        deeds[deed] += 1

    for key in keys:
        bench.assert_ended_once(key)

    assert not any(is_locked(path) for path in (bench.lab.folder / "locks").glob("slot-*"))
    lost = sum(bench.run(key).lost for key in keys)
    print(f"seed {seed}: {deeds}, {lost} attempts lost and done again")  # noqa: T201
