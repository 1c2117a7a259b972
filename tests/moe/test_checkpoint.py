"""A run that was killed goes on as if it had never been, and from nothing that is not sound and its own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.accounting import checkpoint_bytes, weights_bytes
from moe.checkpoint import Checkpoints
from moe.config import Config, apply
from moe.data import prepare
from moe.evaluate import evaluate
from moe.knobs import Value
from moe.presets import PRESETS
from moe.rundir import Request, read_request, run_in
from moe.train import Trainer, train
from tests.moe.conftest import MakeRun
from tests.moe.runs import checkpoints, read_json, read_points, read_weights, step_of, until

STEPS = 80
LONG = apply(PRESETS["nano"], {"budget_tokens": 512 * STEPS})


@pytest.fixture(scope="module")
def request_of(data_dir: Path) -> Callable[..., str]:
    """config.json with a checkpoint at every point."""

    def text(config: Config = LONG, **more: Any) -> str:
        request = Request(
            kind="train", config=config, seed=0, device="cpu", threads=1, data_dir=data_dir, checkpoint_seconds=0.0
        )
        return json.dumps(request.model_dump(mode="json") | more)

    return text


@pytest.fixture(scope="module")
def whole(request_of: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    run = tmp_path_factory.mktemp("whole")
    (run / "config.json").write_text(request_of())
    assert run_in(train, [str(run)]) == 0
    assert run_in(evaluate, [str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def killed(request_of: Callable[..., str], whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed in the middle."""
    run = tmp_path_factory.mktemp("killed")
    (run / "config.json").write_text(request_of())
    with subprocess.Popen([sys.executable, "-m", "moe.train", str(run)]) as child:
        until(lambda: len(checkpoints(run)) == 2)
        child.kill()

    assert child.returncode == -signal.SIGKILL
    assert not (run / "checkpoint.pt").exists()
    return run


def test_resumed_run_is_bit_for_bit_the_whole_one(make_run: MakeRun, killed: Path, whole: Path) -> None:
    step = step_of(checkpoints(killed)[-1])
    run = make_run(LONG, resume=str(killed))
    assert run_in(train, [str(run)]) == 0
    assert run_in(evaluate, [str(run)]) == 0

    assert 0 < step < STEPS
    assert read_weights(run) == read_weights(whole)
    assert _without_costs(read_json(run / "score.json")) == _without_costs(read_json(whole / "score.json"))
    assert read_json(run / "train.json")["steps"] == STEPS
    assert _even_points(run) == _even_points(whole)
    assert read_points(run, step) == read_points(killed, step)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon", "ema_decay": 0.9},
        {"precision": "bf16", "noisy_top_k": True, "capacity_factor": 1.0, "balance_bias_rate": 0.01},
        {"batch_doublings": 1, "length_doublings": 1, "schedule": "wsd"},
        {"routing": "expert_choice", "routing_group": 2},
    ],
    ids=str,
)
def test_a_state_is_all_that_training_goes_on_from(data_dir: Path, changes: dict[str, Value]) -> None:
    config = apply(LONG, {"budget_tokens": 512 * 8, "progress_evals": 4} | changes)
    request = Request(kind="train", config=config, seed=0, device="cpu", threads=1, data_dir=data_dir)
    whole, resumed = (Trainer(request, prepare(config, data_dir), torch.device("cpu")) for _ in range(2))
    points = whole.run(signals=["every step"])
    for _ in range(5):
        next(points)

    kept = BytesIO()
    torch.save(whole.state(), kept)
    kept.seek(0)
    resumed.restore(torch.load(kept, weights_only=True))
    values = [[point["values"] | {"tokens_per_second": None} for point in rest] for rest in (points, resumed.run())]
    assert values[0] == values[1] != []
    pairs = zip(whole.scored_model.state_dict().values(), resumed.scored_model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert resumed.watch.state_dict() == whole.watch.state_dict()  # it ends a run that goes wrong at the same step


def test_files_are_as_large_as_accounted_for(killed: Path, whole: Path) -> None:
    files = {checkpoint_bytes(LONG): checkpoints(killed)[-1], weights_bytes(LONG): whole / "checkpoint.pt"}
    for accounted, path in files.items():  # names and shapes come to some kilobytes, whatever the model's size
        assert accounted < path.stat().st_size < accounted + 50_000


@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_checkpoint_is_noticed(
    make_run: MakeRun, killed: Path, whole: Path, damaged: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = shutil.copytree(killed, tmp_path / "earlier")
    older, newer = checkpoints(earlier)
    _flip_a_bit(newer)
    if damaged == 2:
        older.write_bytes(older.read_bytes()[:-1])

    run = make_run(LONG, resume=str(earlier))
    assert run_in(train, [str(run)]) == 0
    log = capsys.readouterr().err
    assert f"{newer} is damaged" in log
    assert ("starting from the beginning" in log) == (damaged == 2)
    assert (f"resumed at step {step_of(older)} from {earlier}" in log) == (damaged == 1)
    assert read_weights(run) == read_weights(whole)
    assert _even_points(run) == _even_points(whole)


@pytest.mark.parametrize(("lr", "seed"), [(0.01, 1), (0.02, 0)], ids=["seed", "config"])
def test_checkpoint_of_another_run_is_refused(
    make_run: MakeRun, killed: Path, lr: float, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(apply(LONG, {"lr": lr}), seed=seed)
    assert Checkpoints(run, read_request(run)).resume(killed) is None
    log = capsys.readouterr().err
    assert f"{checkpoints(killed)[-1]} is of another config, seed, device or code" in log
    assert "starting from the beginning" in log
    assert not (run / "metrics.jsonl").exists()


def test_checkpoint_without_its_metrics_is_of_no_use(
    make_run: MakeRun, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = shutil.copytree(killed, tmp_path / "earlier")
    older, newer = checkpoints(earlier)
    kept = "".join(f"{json.dumps(point)}\n" for point in read_points(earlier, step_of(older)))
    (earlier / "metrics.jsonl").write_text(kept)
    run = make_run(LONG)
    state = Checkpoints(run, read_request(run)).resume(earlier)
    assert state is not None
    assert state["step"] == step_of(older)
    assert f"{newer} is of no use" in capsys.readouterr().err
    assert [path.name for path in checkpoints(run)] == [older.name]  # the next attempt needs no other folder


def test_sigterm_leaves_a_checkpoint_and_the_budget_in_seconds_goes_on(make_run: MakeRun) -> None:
    config = apply(LONG, {"budget_tokens": None, "budget_seconds": 1.0})
    first = make_run(config, name="first")
    second = make_run(config, name="second", resume=str(first))
    with subprocess.Popen([sys.executable, "-m", "moe.train", str(first)]) as child:
        until(lambda: read_points(first))
        child.terminate()
        assert child.wait(timeout=300) == -signal.SIGTERM

    (checkpoint,) = checkpoints(first)
    left = read_points(first)[-1]
    assert left["step"] == step_of(checkpoint)
    assert 0.0 < left["seconds"] < 1.0

    assert run_in(train, [str(second)]) == 0
    after = read_points(second)
    assert after[: len(read_points(first))] == read_points(first)
    assert after[len(read_points(first))]["seconds"] > left["seconds"]
    assert after[-2]["seconds"] < 1.0 <= read_json(second / "train.json")["seconds"]


def test_checkpoints_are_written_less_often_where_they_are_slow(make_run: MakeRun) -> None:
    run = make_run(LONG)
    checkpoints = Checkpoints(run, read_request(run))
    assert not checkpoints.due(29.0)
    assert checkpoints.due(30.0)
    checkpoints._cost = 6.0  # as at a slow disk: 2 % of 300 s
    assert not checkpoints.due(299.0)
    assert checkpoints.due(301.0)
    assert not checkpoints.fits(time.monotonic())


def test_full_disk_costs_the_checkpoint_and_not_the_run(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(LONG)
    checkpoints = Checkpoints(run, read_request(run))
    checkpoints.directory = Path("/proc")  # where nobody can write
    checkpoints.save({"step": 7, "seconds": 31.0})
    assert "no checkpoint at step 7" in capsys.readouterr().err
    assert not checkpoints.due(32.0)


def _even_points(run: Path) -> list[dict[str, Any]]:
    """Those at evenly spaced steps, without their times; others depend on the clock."""
    steps = [point["step"] for point in read_points(run)]
    assert steps == sorted(set(steps))
    even = [point for point in read_points(run) if point["step"] == 1 or point["step"] % (STEPS // 20) == 0]
    assert len(even) >= 20
    for point in even:
        del point["seconds"], point["values"]["tokens_per_second"]

    return even


def _without_costs(score: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in score.items() if name not in ("train_seconds", "peak_memory_bytes")}


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
