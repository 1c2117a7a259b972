"""Two real processes train what one does, and end together whatever ends one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from moe.config import Config, ConfigError, apply
from moe.data import prepare
from moe.parallel import LOST, KilledProcessError, LostProcessError, Team, explain, lead
from moe.presets import PRESETS
from moe.rundir import Request, run_in
from moe.schedule import micro_batch_rows
from moe.train import Trainer, train
from tests.moe.conftest import MakeRun
from tests.moe.runs import checkpoints, edit, read_json, read_points, read_weights, step_of, until

CPU = torch.device("cpu")
NANO = apply(PRESETS["nano"], {"progress_evals": 1, "micro_batch_size": 4})
LONG = apply(NANO, {"budget_tokens": 512 * 80, "ema_decay": 0.9, "balance_bias_rate": 0.01, "noisy_top_k": True})

# Not the same number of micro-batches for both: 3 in a step; then 1, 2 and 2 as the batch grows.
THREE = {
    "batch_size": 12,
    "micro_batch_size": 4,
    "routing_group": 4,
    "budget_tokens": 64 * 12 * 3,
    "length_doublings": 1,
}
IDLE = {"batch_size": 8, "micro_batch_size": 8, "routing_group": 2, "budget_tokens": 64 * 24, "batch_doublings": 2}
ALL = {"noisy_top_k": True, "balance_bias_rate": 0.01, "ema_decay": 0.9, "capacity_factor": 1.0, "grad_clip": 0.5}
CASES = {
    "three": apply(NANO, {**ALL, **THREE}),
    "idle": apply(NANO, {**ALL, **IDLE, "optimizer": "muon", "num_shared_experts": 1}),
}


def test_two_processes_train_what_one_does(data_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.moe.test_parallel", str(data_dir), str(tmp_path)]
    prepare(NANO, data_dir)
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as other:
        first = _train_as(0, data_dir, tmp_path)
        assert other.wait(timeout=300) == 0

    second = torch.load(tmp_path / "seen.pt", weights_only=True)
    for case, config in CASES.items():
        alone = _seen(_float64(config, data_dir, Team()))
        for name, expected in alone.items():
            torch.testing.assert_close(first[case][name], expected, rtol=1e-9, atol=1e-12, msg=f"{case} {name}")
            if name not in ("val_bpb", "val_tokens", "router_stability"):  # the first process alone evaluates
                assert torch.equal(first[case][name], second[case][name]), (case, name)


def test_the_gradient_is_that_of_the_mean_over_the_batch(data_dir: Path) -> None:
    # In one pass over all of it, at a time when sequences are cut in two.
    config = apply(CASES["three"], {"grad_clip": 1e6})
    trainer = _float64(config, data_dir, Team())
    whole = _float64(apply(config, {"micro_batch_size": 12}), data_dir, Team())
    ((tokens, targets, noise),) = whole.micro_batches(12)
    assert tokens.shape == (24, 32)
    whole.model.train()
    torch.autograd.backward(whole.model(tokens, targets, noise).loss)
    trainer.optimizer_step(1e-3)
    pairs = zip(trainer.model.parameters(), whole.model.parameters(), strict=True)
    for accumulated, at_once in pairs:
        torch.testing.assert_close(accumulated.grad, at_once.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.timeout(600)  # starts five processes one after another: seconds, or minutes where others use the cores
def test_a_run_goes_on_after_either_end(make_run: MakeRun) -> None:
    runs = [make_run(LONG, name=f"run{n}", processes=2, checkpoint_seconds=0.0, threads=1) for n in range(3)]
    for run, earlier in zip(runs[1:], runs, strict=False):
        edit(run, resume=str(earlier))

    # The second process is killed: the first says so.
    with _start(runs[0]) as process:
        until(lambda: len(checkpoints(runs[0])) == 2)
        (other,) = _children(process.pid)
        os.kill(other, signal.SIGKILL)
        assert process.wait(timeout=180) == 1

    error = read_json(runs[0] / "error.json")
    assert error["error"] == "KilledProcessError"
    assert error["message"] == "process 1 of the run was killed by signal 9"
    assert not _alive(other)

    # SIGTERM to both, as a service manager sends it: a last checkpoint, then all end.
    with _start(runs[1]) as process:
        until(lambda: len(read_points(runs[1])) > len(read_points(runs[0])) + 1)
        (other,) = _children(process.pid)
        os.kill(other, signal.SIGTERM)
        process.terminate()
        assert process.wait(timeout=180) == -signal.SIGTERM
        until(lambda: not _alive(other))

    assert read_points(runs[1])[-1]["step"] == step_of(checkpoints(runs[1])[-1])

    assert run_in(train, [str(runs[2])]) == 0

    # With as many micro-batches as processes, even one process adds the same two gradients.
    alone = make_run(LONG, name="alone")
    assert run_in(train, [str(alone)]) == 0
    assert read_weights(runs[2]) == read_weights(alone)
    assert read_json(runs[2] / "train.json")["processes"] == 2
    assert read_points(runs[2])[-1]["step"] == 80


def test_nobody_outlives_the_first_process(make_run: MakeRun) -> None:
    with _start(make_run(LONG, processes=2)) as process:
        until(lambda: _children(process.pid))
        (other,) = _children(process.pid)
        process.kill()
        process.wait()
        until(lambda: not _alive(other))


def test_divergence_of_all_is_one_error(make_run: MakeRun) -> None:
    wild = {"lr": 1.0, "weight_decay": 10.0, "warmup_fraction": 0.0, "min_lr_ratio": 1.0}
    run = make_run(apply(NANO, wild), processes=2)
    assert run_in(train, [str(run)]) == 1
    error = read_json(run / "error.json")
    assert error["error"] == "non_finite"
    assert error["step"] > 1
    assert not (run / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("size", "processes", "rows"),
    [
        (12, 1, 4),
        (12, 2, 2),  # 3 micro-batches of 4 would leave one process with two
        (12, 3, 4),
        (2, 1, 2),
        (2, 2, 2),  # a routing group cannot be cut: the second process has none
        (24, 2, 4),
    ],
)
def test_micro_batches_are_dealt_out_evenly_where_groups_allow(size: int, processes: int, rows: int) -> None:
    config = apply(NANO, {"batch_size": 24, "micro_batch_size": 4, "routing_group": 2})
    assert micro_batch_rows(config, size, processes) == rows


def test_the_reason_is_told_by_who_knows_it() -> None:
    gone = (1, LOST, b"")
    memory = json.dumps({"error": "out_of_memory", "message": "2 GiB", "step": None}).encode()
    other = json.dumps({"error": "OSError", "message": "disk", "step": None}).encode()
    assert explain([]) is None
    for lost, kind, message in [
        ([gone, (2, -9, b"")], KilledProcessError, "process 2 of the run was killed by signal 9"),
        ([(1, -11, b"")], LostProcessError, "process 1 of the run was killed by signal 11"),
        ([(1, 3, b"")], LostProcessError, "process 1 of the run ended with exit code 3"),
        ([gone, (2, 1, b"some text\n" + memory + b"\n")], MemoryError, "process 2 of the run: 2 GiB"),
        ([(1, 1, other)], LostProcessError, "process 1 of the run: OSError: disk"),
    ]:
        reason = explain(lost)
        assert type(reason) is kind
        assert str(reason) == message


@pytest.mark.skipif(torch.cuda.device_count() >= 64, reason="needs a GPU less")
def test_processes_need_a_card_each(data_dir: Path, tmp_path: Path) -> None:
    request = Request(kind="train", config=NANO, seed=0, device="cuda", processes=64, data_dir=data_dir)
    with pytest.raises(ConfigError, match="processes=64 need a card each"), lead(tmp_path, request):
        pass


def _train_as(rank: int, data_dir: Path, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What one of two processes sees of all cases."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    try:
        return {case: _seen(_float64(config, data_dir, Team(rank, 2))) for case, config in CASES.items()}
    finally:
        dist.destroy_process_group()


def _float64(config: Config, data_dir: Path, team: Team) -> Trainer:
    request = Request(kind="train", config=config, seed=0, device="cpu", data_dir=data_dir)
    trainer = Trainer(request, prepare(config, data_dir), CPU, team)
    trainer.model.double()
    if trainer.average is not None:
        trainer.average.model.double()

    return trainer


def _seen(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Trains through the budget: the last step's gradients and values, the weights, their average, the bias."""
    values = list(trainer.run())[-1]["values"]
    del values["tokens_per_second"]
    assert trainer.average is not None
    return {
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()},
        **{f"gradient of {name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None},
        **{f"{name} at the end": tensor for name, tensor in trainer.model.state_dict().items()},
        **{f"{name} on average": tensor for name, tensor in trainer.average.model.state_dict().items()},
    }


def _start(run: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "moe.train", str(run)])


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False

    return state != "Z"  # dead, and not reaped yet by whoever adopted it


if __name__ == "__main__":  # the other of two processes
    torch.set_num_threads(1)
    torch.save(_train_as(1, Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[2]) / "seen.pt")
