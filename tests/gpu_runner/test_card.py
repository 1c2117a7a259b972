"""Which device is found, with the real NVML binding on a fake libnvidia-ml.so.1, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gpu_runner.card import host_memory
from tests.gpu_runner.conftest import fake_card

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench

ROOT = Path(__file__).parents[2]

LOOK = """
import json, sys, time
from dataclasses import asdict
from db.errors import LabError
from db.settings import Runner
from gpu_runner.card import detect_cards
from gpu_runner.nvml import Nvml, NvmlError
nvml = Nvml(timeout=0.3)
said = {}
card = detect_cards(Runner(device=sys.argv[1], threads=2), nvml)[0]
said |= asdict(card) | {"class": card.hardware_class}
try:
    detect_cards(Runner(device="cuda", threads=2), nvml)
except LabError as error:
    said["without"] = str(error)
started = time.monotonic()
try:
    said["sample"] = asdict(nvml.sample("GPU-aaaa"))
except NvmlError as error:
    said["sample"] = str(error)
said["took"] = time.monotonic() - started
print(json.dumps(said))
"""

Look = Callable[..., dict[str, Any]]


@pytest.fixture
def look(library: Path, tmp_path: Path) -> Look:
    """Looks for a card in a fresh process, the fake card being in a given state."""

    def look(device: str = "auto", *, variables: dict[str, str] | None = None, **state: int) -> dict[str, Any]:
        (tmp_path / "state").write_text("".join(f"{name} {value}\n" for name, value in state.items()))
        variables = dict(variables or {})
        torch = variables.pop("TORCH", "cu126")
        environment = os.environ | fake_card(library, tmp_path / "state", torch) | variables
        done = subprocess.run(
            [sys.executable, "-c", LOOK, device],
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return look


def test_card_is_found_by_uuid_and_measured(look: Look) -> None:
    state = {"utilization": 97, "used": 3 << 30, "temperature": 71, "milliwatts": 68_500, "millijoules": 9_000_000}
    found = look(**state, reasons=0x20 | 0x04 | 0x01, pid1=71, pid2=72, ecc=2)
    found.pop("took")
    assert found == {
        "device": "cuda",
        "name": "Tesla T4",
        "key": "GPU-aaaa",
        "uuids": ["GPU-aaaa"],
        "torch": "2.13.0",
        "memory_bytes": 16 << 30,
        "threads": 2,
        "processes": 1,
        "message": "training on Tesla T4 (16.0 GiB)",
        "class": "Tesla T4 fp16 torch 2.13.0",
        "sample": {
            "utilization_percent": 97.0,
            "memory_bytes": 3 << 30,
            "temperature_celsius": 71.0,
            "power_watts": 68.5,
            "energy_joules": 9000.0,
            "slowdowns": ["thermal slowdown"],
            "pids": [71, 72],
            "ecc_errors": 2,
        },
    }


def test_what_the_card_does_not_measure_is_left_out(look: Look) -> None:
    assert look(milliwatts=-1, millijoules=-1, reasons=-1, ecc=-1, temperature=40)["sample"] == {
        "utilization_percent": 0.0,
        "memory_bytes": 0,
        "temperature_celsius": 40.0,
        "power_watts": None,
        "energy_joules": None,
        "slowdowns": None,
        "pids": [],
        "ecc_errors": None,
    }


def test_what_an_old_driver_does_not_know_is_left_out(look: Look, library: Path) -> None:
    found = look(variables={"LD_LIBRARY_PATH": str(library / "old")}, milliwatts=50_000, reasons=0x88, mig=2)["sample"]
    assert found == {
        "utilization_percent": 0.0,
        "memory_bytes": 0,
        "temperature_celsius": 0.0,
        "power_watts": 50.0,
        "energy_joules": None,
        "slowdowns": ["hardware slowdown", "power brake"],
        "pids": None,
        "ecc_errors": None,
    }


@pytest.mark.parametrize(
    ("state", "variables", "reason"),
    [
        ({"count": 0}, {}, "NVML lists no card"),
        ({"init": 9}, {}, "NVML: Driver Not Loaded; load the driver"),
        (
            {"init": 18},
            {},
            "NVML: RM has detected an NVML/RM version mismatch.; the driver was updated under",
        ),
        ({"init": 999}, {}, "NVML: Unknown Error; often a card that was lost"),
        ({"error": 15}, {}, "NVML: GPU is lost; it has fallen off the bus; restart the machine"),
        ({"error": 16}, {}, "NVML: GPU requires restart; restart the machine"),
        ({"hang": 1}, {}, "NVML did not answer within 0.3 s; if it stays so, restart the machine"),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' hides all of them"),
        ({"count": 2, "error@0": 15}, {"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES='0' hides all of them"),
        ({}, {"LD_LIBRARY_PATH": ""}, "NVML: NVML Shared Library Not Found"),
        ({}, {"LD_LIBRARY_PATH": "EMPTY"}, "NVML: NVML Shared Library Not Found"),
        ({}, {"TORCH": "cpu"}, "Tesla T4 is there, but this torch 2.13.0+cpu is built without CUDA"),
    ],
)
def test_without_a_usable_card_the_cpu_trains_and_says_why(
    look: Look, tmp_path: Path, state: dict[str, int], variables: dict[str, str], reason: str
) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    variables = {name: str(tmp_path) if value == "EMPTY" else value for name, value in variables.items()}
    found = look(variables=variables, **state)
    assert found["device"] == "cpu"
    assert found["message"].startswith(f"no NVIDIA card found ({reason}")
    assert found["message"].endswith("): training on the CPU, 2 threads")
    assert found["class"].startswith("cpu ")

    refused = "NVML still does not answer" if "hang" in state else reason
    assert found["without"].startswith(f"runner.device is cuda, but no NVIDIA card can be used ({refused}")


def test_hanging_library_is_given_up_and_not_asked_again(look: Look) -> None:
    found = look(hang=1)
    assert found["sample"] == "NVML still does not answer"
    assert found["took"] < 0.1


def test_lost_card_does_not_hide_the_other(look: Look) -> None:
    found = look(count=2, **{"error@0": 15})
    assert (found["key"], found["sample"][:17]) == ("GPU-bbbb", "NVML: GPU is lost")


def test_card_cut_up_by_mig_is_its_slices(look: Look) -> None:
    found = look(mig=2)
    assert (found["key"], found["class"]) == ("MIG-1", "NVIDIA A100 MIG 1g.5gb fp16 torch 2.13.0")
    assert look(mig=2, variables={"CUDA_VISIBLE_DEVICES": "MIG-2"})["memory_bytes"] == 5 << 30


@pytest.mark.parametrize("visible", ["1", "GPU-bb"])
def test_second_card_can_be_chosen(look: Look, visible: str) -> None:
    assert look(count=2, variables={"CUDA_VISIBLE_DEVICES": visible})["key"] == "GPU-bbbb"


def test_cpu_by_configuration(look: Look) -> None:
    found = look("cpu")
    assert found["message"] == "runner.device is cpu in the configuration: training on the CPU, 2 threads"


def test_daemon_samples_its_card_and_trains_on_when_it_is_lost(bench: Bench, library: Path) -> None:
    state = bench.lab.folder / "state"
    state.write_text("utilization 50\n")
    settings = bench.lab.folder / "blueberry.toml"
    settings.write_text(settings.read_text().replace('"cpu"', '"cuda"') + "sample_seconds = 0.02\n")
    bench.hardware_class = "Tesla T4 fp16 torch 2.13.0"
    key = bench.enqueue("wait")
    bench.start(variables=fake_card(library, state))
    bench.until(lambda: bench.store.value("SELECT max(attempt_id) FROM gpu_samples"), "a sample of the attempt")
    assert bench.store.value("SELECT utilization_percent FROM gpu_samples LIMIT 1") == 50.0

    state.write_text("error 15\n")
    sign = "cannot be read, and nothing new is started on it: NVML: GPU is lost"
    bench.until(lambda: sign in bench.store.value("SELECT message FROM runners"), "a complaint")
    state.write_text("error 0\n")
    bench.until(lambda: sign not in bench.store.value("SELECT message FROM runners"), "the card is back")
    bench.go()
    bench.until_status(key, "completed")
    bench.assert_ended_once(key)
    assert json.loads((bench.directory(key) / "config.json").read_text())["device"] == "cuda"


def test_memory_of_a_container_is_its_share(tmp_path: Path) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    unlimited, limited = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    unlimited.write_text("max\n")
    assert host_memory((unlimited, tmp_path / "missing")) == machine
    limited.write_text(f"{2**28}\n")
    assert host_memory((unlimited, limited)) == 2**28


def test_registering_imports_no_torch(bench: Bench) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gpu_runner", str(bench.lab.folder), "--register"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "gpu_runner.card\n" in done.stderr
    assert " torch\n" not in done.stderr
    row = bench.store.row("SELECT device, device_key, status, threads FROM runners")
    assert row == {"device": "cpu", "device_key": "cpu", "status": "registered", "threads": 1}
