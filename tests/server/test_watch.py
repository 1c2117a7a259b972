"""The live view of the runner: what a frame shows of a lab, at any width, and how it ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from db.cards import GpuSample, add_gpu_sample
from db.clock import now
from db.lab import Lab
from db.queue import Point, claim_run, ingest
from db.runners import list_runners
from server.watch import look, render_frame, sparkline
from tests.server.conftest import ROOT, put_experiment, put_run
from tests.server.test_cli import answer, do


def shown(lab: Lab, width: int) -> list[str]:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        console.print(render_frame(look(lab), width))
        return console.export_text().splitlines()


def train(lab: Lab) -> int:
    """Has the registered runner train a run up to its tenth step; returns the run's id."""
    run = put_run(lab, put_experiment(lab).id)
    [runner] = list_runners(lab.store)
    claim = claim_run(lab.store, runner, now(), lease_seconds=30.0)
    assert claim is not None
    points = [
        Point(step=step, tokens=step * 1000, seconds=step * 0.5, values={"train_loss": 5.0 - step / 10})
        for step in range(1, 11)
    ]
    points.append(Point(step=10, tokens=10_000, seconds=5.0, values={"val_bpb": 2.25, "val_tokens": 2048.0}))
    ingest(lab.store, claim.attempt, points, 0, now(), lease_seconds=30.0)
    for utilization in (20.0, 100.0):
        sample = GpuSample(
            utilization_percent=utilization,
            memory_bytes=3 << 30,
            temperature_celsius=71.0,
            power_watts=65.4,
            energy_joules=None,
            slowdowns=("heat",),
            others=1,
        )
        add_gpu_sample(lab.store, runner.id, claim.attempt.id, sample, now())

    return run.id


def test_a_frame_shows_cards_curves_and_what_is_left(lab: Lab) -> None:
    key = train(lab)
    waiting = put_run(lab, put_experiment(lab).id).id
    text = "\n".join(shown(lab, 100))
    for words in (
        f"run {key} (",
        "step 10/40, 2,000 tokens/s, 15 s left",
        "train_loss  █▇▆▆▅▄▃▃▂▁",
        "4.0000",
        "val_bpb     ▁",
        "2.2500",
        "val_bpb along the curve: 2,048 tokens of val; the score: 4,096 tokens of val",
        "not running, 71 °C, 65 W, 3.0 GiB, slowed: heat, shared with 1 other process",
        "busy        ▁█",
        "100 %",
        "1 running, 1 waiting",
        f"in line 1: run {waiting} (train, seed 1), ",
        "registered by a test",
        "started",
    ):
        assert words in text, f"{words!r} is missing in\n{text}"

    frame = answer(lab, "runner", "watch")
    assert frame["runs"][0]["train_loss"][-1] == 4.0
    assert [sample["utilization_percent"] for sample in frame["cards"][0]["samples"]] == [20.0, 100.0]


@pytest.mark.parametrize("width", [10, 30, 60, 200])
def test_lines_are_cut_at_any_width(lab: Lab, width: int) -> None:
    train(lab)
    lines = shown(lab, width)
    assert max(map(len, lines)) <= width
    assert any(line.startswith("step 10") for line in lines)


def test_an_empty_lab_and_one_without_a_runner(lab: Lab) -> None:
    assert "0 running, 0 waiting" in do(lab, "runner", "watch").stdout
    lab.store.execute("DELETE FROM runners")
    said = do(lab, "runner", "watch", "--once").stdout
    assert "no runner is known yet: `blueberry runner start` starts one" in said


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 5, ""),
        ([1.0], 5, "▁"),
        ([2.0, 2.0, 2.0], 5, "▁▁▁"),
        ([0.0, 7.0, None, 7.0], 5, "▁█ █"),
        ([None, None], 5, "  "),
        ([0.0, 0.0, 7.0, 7.0], 2, "▁█"),
        (list(map(float, range(1000))), 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparklines(values: list[float | None], width: int, drawn: str) -> None:
    assert sparkline(values, width) == drawn


def test_on_a_terminal_it_is_live_until_interrupted(lab: Lab) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "runner", "watch", "--lab", str(lab.folder)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "70", "LINES": "20"},
        text=True,
    )
    os.close(theirs)
    _read_until(ours, "0 running, 0 waiting")
    train(lab)
    _read_until(ours, "2,000 tokens/s")
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    os.close(ours)
    assert child.returncode == 130
    assert "stopped looking" in errors
    assert "Traceback" not in errors


def _read_until(terminal: int, words: str) -> None:
    seen: Any = ""
    while words not in seen:
        seen += os.read(terminal, 65536).decode(errors="replace")
