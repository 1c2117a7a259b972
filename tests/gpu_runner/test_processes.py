"""Several processes train one run of the lab: on the CPU for real, on cards as far as a fake library shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agents.preflight import preflight
from db.clock import now
from db.processes import FileLock, is_locked, is_process
from db.queries import curve
from db.runners import register_runner
from db.settings import GpuOptimization
from gpu_runner.fit import fit_run
from gpu_runner.nvml import Sample, combine
from moe.config import apply
from moe.evaluate import evaluate
from moe.presets import PRESETS
from moe.rundir import run_in
from moe.train import train
from tests.gpu_runner.conftest import CARD, SETTINGS, fake_card

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench

STEPS = 160
LONG = apply(PRESETS["nano"], {"budget_tokens": 512 * STEPS, "micro_batch_size": 4})


@pytest.mark.timeout(1200)  # torch starts seven times
def test_a_run_of_two_processes_survives_a_stop_and_a_kill_and_scores_as_one(bench: Bench) -> None:
    (bench.lab.folder / "blueberry.toml").write_text(f"{SETTINGS}processes = 2\n")
    bench.lab.reload()
    key = bench.enqueue(config=LONG.model_dump(), steps=STEPS)
    assert bench.hardware_class.endswith(", 2 processes")  # and so has another fingerprint than with one

    def train_on_to(step: int) -> None:
        bench.until(lambda: (bench.run(key).step or 0) >= step, f"step {step}", seconds=240)  # torch starts twice

    daemon = bench.start(standin=False)
    train_on_to(20)
    daemon.terminate()  # a stop: the checkpoint of both is one
    daemon.wait()
    assert bench.run(key).status == "queued"
    stopped_at = bench.run(key).step or 0

    bench.start(standin=False)
    train_on_to(stopped_at + 20)
    first = bench.child_pid(key)
    [other] = [int(pid) for pid in Path(f"/proc/{first}/task/{first}/children").read_text().split()]
    os.kill(other, signal.SIGKILL)
    bench.until(lambda: bench.run(key).status == "completed", "completed", seconds=400)

    _, killed, last = bench.attempts(key)
    assert (killed.status, killed.error) == ("lost", "moe.train: process 1 of the run was killed by signal 9")
    assert not is_process(first)
    run, directory = bench.run(key), bench.directory(key)
    assert (run.failures, run.lost) == (0, 1)
    assert (last.status, run.step) == ("completed", STEPS)
    assert "resumed at step" in (directory / "log.txt").read_text()
    steps = [point.step for point in curve(bench.store, key, "train_loss")]
    assert steps == sorted(set(steps))
    assert json.loads((directory / "train.json").read_text())["processes"] == 2
    assert not any(is_locked(path) for path in bench.lab.runs_folder.glob("*/lock"))

    alone = bench.lab.folder / "alone"
    alone.mkdir()
    request = json.loads((directory / "config.json").read_text()) | {"processes": 1, "resume": None}
    (alone / "config.json").write_text(json.dumps(request))
    assert run_in(train, [str(alone)]) == run_in(evaluate, [str(alone)]) == 0
    assert run.score is not None  # with as many micro-batches as processes, even the bits are those of one
    assert run.score["val_bpb"] == json.loads((alone / "score.json").read_text())["val_bpb"]


def test_two_cards_are_one_device_that_a_run_has_for_itself(bench: Bench, library: Path) -> None:
    state = bench.lab.folder / "state"
    state.write_text("count 2\nmilliwatts 60000\nmilliwatts@1 70000\nused@1 5\n")
    settings = bench.lab.folder / "blueberry.toml"
    settings.write_text(SETTINGS.replace('"cpu"', '"cuda"') + "sample_seconds = 0.02\nprocesses = 2\n")
    bench.hardware_class = "Tesla T4 fp16 torch 2.13.0, 2 processes"
    with FileLock(bench.lab.lock("slot-GPU-bbbb")) as slot:
        assert slot.acquire()  # by a run of one process that goes on
        bench.start(variables=fake_card(library, state))
        key = bench.enqueue("wait")
        bench.until(lambda: bench.store.value("SELECT count(*) FROM gpu_samples"), "a look at the cards")
        assert bench.run(key).status == "queued"

    bench.until_training(key)
    bench.until(lambda: bench.store.value("SELECT max(attempt_id) FROM gpu_samples"), "a look for the run")
    look = bench.store.row("SELECT * FROM gpu_samples WHERE attempt_id IS NOT NULL LIMIT 1")
    assert look is not None
    assert (look["power_watts"], look["memory_bytes"]) == (130.0, 5)
    runner = bench.store.row("SELECT device_name, device_key, cards, processes FROM runners")
    assert runner == {"device_name": "Tesla T4", "device_key": "GPU-aaaa+1", "cards": 2, "processes": 2}
    assert is_locked(bench.lab.lock("slot-GPU-aaaa"))
    assert is_locked(bench.lab.lock("slot-GPU-bbbb"))
    assert json.loads((bench.directory(key) / "config.json").read_text())["processes"] == 2
    environment = Path(f"/proc/{bench.child_pid(key)}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=GPU-aaaa,GPU-bbbb" in environment
    bench.go()
    bench.until_status(key, "completed")
    bench.assert_ended_once(key)


LOOK = """
import json, sys
from dataclasses import asdict
from db.errors import LabError
from db.settings import Runner
from gpu_runner.card import detect_cards
from gpu_runner.nvml import Nvml
try:
    cards = detect_cards(Runner(device="cuda", processes=int(sys.argv[1])), Nvml())
    print(json.dumps([asdict(card) for card in cards]))
except LabError as error:
    print(json.dumps(str(error)))
"""


def _look(library: Path, state: Path, text: str, processes: int) -> Any:
    state.write_text(text)
    command = [sys.executable, "-c", LOOK, str(processes)]
    done = subprocess.run(command, env=os.environ | fake_card(library, state), stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def test_cards_of_one_kind_are_put_together(library: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    [pair] = _look(library, state, "count 3\n", 2)
    assert (pair["key"], pair["uuids"], pair["processes"]) == ("GPU-aaaa+1", ["GPU-aaaa", "GPU-bbbb"], 2)
    assert pair["message"] == "training on 2 cards together, each Tesla T4 (16.0 GiB); 1 left over"

    mixed = "count 4\nkind@1 1\nkind@3 1\n"
    found = _look(library, state, mixed, 2)
    assert [(card["name"], card["uuids"]) for card in found] == [
        ("Tesla T4", ["GPU-aaaa", "GPU-cccc"]),
        ("NVIDIA L4", ["GPU-bbbb", "GPU-dddd"]),
    ]
    assert _look(library, state, mixed, 4).startswith(
        "runner.processes is 4, which needs 4 whole cards of one kind, and here are: 2 x Tesla T4, 2 x NVIDIA L4; "
    )
    assert "here are: slices of cards (MIG)" in _look(library, state, "mig 2\n", 2)


def test_a_look_at_two_cards_is_one() -> None:
    one = Sample(
        utilization_percent=90.0,
        memory_bytes=3,
        temperature_celsius=50.0,
        power_watts=60.0,
        energy_joules=100.0,
        slowdowns=(),
        pids=(7,),
        ecc_errors=0,
    )
    other = replace(one, utilization_percent=70.0, memory_bytes=4, slowdowns=("power brake",), pids=(8, 9))
    assert combine([one]) == one
    assert combine([one, other]) == Sample(
        utilization_percent=80.0,
        memory_bytes=4,
        temperature_celsius=50.0,
        power_watts=120.0,
        energy_joules=200.0,
        slowdowns=("power brake",),
        pids=(7, 8, 9),
        ecc_errors=0,
    )
    assert combine([one, replace(other, power_watts=None)]).power_watts is None


def test_processes_of_a_cpu_share_its_memory_and_cards_have_their_own(bench: Bench) -> None:
    config = apply(PRESETS["nano"], {"batch_size": 16, "micro_batch_size": 16, "routing_group": 2})
    pair = register_runner(bench.store, replace(CARD, processes=2).columns())
    assert bench.lab.settings.gpu_optimization == GpuOptimization()
    seen = preflight(bench.lab, config, pair)
    alone = preflight(bench.lab, apply(config, {"micro_batch_size": 8}), pair)
    assert (seen.processes, seen.micro_batch_size, seen.memory_bytes) == (2, 8, alone.memory_bytes)
    assert seen.memory_available_bytes == int(0.8 * CARD.memory_bytes / 2)

    cards = pair.model_copy(update={"device": "cuda", "cards": 2, "device_name": "Tesla T4"})
    seen = preflight(bench.lab, config, cards)
    assert seen.memory_available_bytes == int(0.8 * CARD.memory_bytes)
    assert seen.seconds is None  # what the sums of gradients cost between two cards was never measured

    bench.register()
    run = bench.run(bench.enqueue(steps=config.steps, config=config.model_dump()))
    needed = seen.memory_bytes * 3
    small = pair.model_copy(update={"memory_bytes": needed})
    assert fit_run(bench.store, small, run, GpuOptimization(memory_safety_margin=1.0), 0).micro_batch_size
    assert fit_run(bench.store, small, run, GpuOptimization(memory_safety_margin=1.0), 2 * needed // 3).waits


def test_a_daemon_of_one_process_leaves_runs_of_two_alone(bench: Bench) -> None:
    bench.hardware_class = register_runner(bench.store, replace(CARD, processes=2).columns()).hardware_class
    key = bench.enqueue("train")
    bench.register()
    daemon = bench.daemon()
    daemon.step(now())
    assert bench.run(key).status == "queued"
