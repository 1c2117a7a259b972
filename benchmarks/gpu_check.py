"""What only a card shows: memory and speed beside their predictions, fp16, resuming, running out of memory.

    python -m benchmarks.gpu_check                      a card, with a T4's limits imposed on it
    python -m benchmarks.gpu_check --device cpu --preset nano      the same steps without one, to see that they run

Prints a table that can be pasted into benchmarks/README.md. A T4's limits are its 15 GiB, fp16 without bf16, and no
kernels that need compute capability 8.0: Blueberry uses none, so nothing has to be switched off for the last.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from moe.accounting import account, peak_memory_bytes
from moe.config import Config, apply
from moe.data import prepare
from moe.evaluate import evaluate
from moe.precision import precision_on
from moe.presets import PRESETS
from moe.roofline import speed
from moe.rundir import Request, run_in
from moe.train import Trainer, train

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic row; no other one is slower for it

T4_GIB = 15.0
STEPS = 8
SHAPES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a third of the micro-batch": {"micro_batch_size": 8},
    "64 experts, top 8": {"num_experts": 64, "top_k": 8, "d_expert": 384},
    "activation checkpointing": {"activation_checkpointing": True},
    "capacity 1.25": {"capacity_factor": 1.25},
    "Muon": {"optimizer": "muon"},
    "fp32": {"precision": "fp32"},
    "deterministic": {"deterministic": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--preset", choices=list(PRESETS), default="t4")
    parser.add_argument("--gib", type=float, default=T4_GIB, help="memory that the card may use")
    parser.add_argument("--data", type=Path, help="folder for tokenized text; a temporary one by default")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --device cpu --preset nano shows only that the steps run")

    with tempfile.TemporaryDirectory() as folder:
        data_dir = options.data or Path(folder) / "data"
        for line in check(options.device, PRESETS[options.preset], options.gib, data_dir, Path(folder)):
            print(line, flush=True)


def check(device: Literal["cpu", "cuda"], config: Config, gib: float, data_dir: Path, folder: Path) -> Iterator[str]:
    """The lines of the report."""
    yield _machine(device)
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))

    yield "\n| shape | tokens/s | lowest | highest | T4 predicted | peak memory | predicted | error |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, changes in SHAPES.items():
        yield _shape(name, apply(config, changes), device, data_dir)

    yield f"\nfp16 against fp32, loss after {STEPS} steps: {_precisions(config, device, data_dir)}"
    yield f"the same seed twice, then interrupted and resumed: {_repeats(config, device, data_dir)}"
    if device == "cuda":
        yield f"host syncs in one optimizer step: {_syncs(config, data_dir)}"
        yield f"more than the card holds: {_out_of_memory(config, data_dir, folder / 'large')}"

    yield f"train, then evaluate, as the runner does: {_whole_run(config, device, data_dir, folder / 'run')}"


def _machine(device: str) -> str:
    if device == "cpu":
        return f"{platform.processor() or platform.machine()}, torch {torch.__version__}"

    card = torch.cuda.get_device_properties(0)
    return (
        f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB, "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    )


def _trainer(config: Config, device: Literal["cpu", "cuda"], data_dir: Path) -> Trainer:
    request = Request(kind="train", config=config, seed=0, device=device, data_dir=data_dir)
    return Trainer(request, prepare(config, data_dir), torch.device(device))


def _step(trainer: Trainer) -> float:
    loss = trainer.optimizer_step(trainer.config.lr)["train_loss"]
    trainer.sequences += trainer.config.batch_size
    return loss


def _shape(name: str, config: Config, device: Literal["cpu", "cuda"], data_dir: Path) -> str:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    torch.use_deterministic_algorithms(config.deterministic)
    trainer = _trainer(config, device, data_dir)
    rates = []
    for _ in range(STEPS):
        started = time.perf_counter()
        _step(trainer)  # ends with a number on the host, so the card has finished
        rates.append(config.batch_size * config.seq_len / (time.perf_counter() - started))

    rates = rates[2:]  # the first ones choose algorithms and allocate
    cells = [f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}", f"{max(rates):,.0f}"]
    cells.append(f"{speed(config).tokens_per_second:,.0f}")
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        held = total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_allocated()  # with the context
        predicted = peak_memory_bytes(config, precision_on(device, config.precision))
        cells += [f"{held / 2**30:.2f} GiB", f"{predicted / 2**30:.2f} GiB", f"{predicted / held - 1:+.0%}"]
    else:
        cells += ["", "", ""]

    return f"| {name} | {' | '.join(cells)} |"


def _precisions(config: Config, device: Literal["cpu", "cuda"], data_dir: Path) -> str:
    other = "fp16" if device == "cuda" else "bf16"
    losses = {}
    for precision in ("fp32", other):
        trainer = _trainer(apply(config, {"precision": precision}), device, data_dir)
        losses[precision] = [_step(trainer) for _ in range(STEPS)][-1]

    return ", ".join(f"{precision} {loss:.4f}" for precision, loss in losses.items())


def _repeats(config: Config, device: Literal["cpu", "cuda"], data_dir: Path) -> str:
    first, second, resumed = (_trainer(config, device, data_dir) for _ in range(3))
    half = STEPS // 2
    losses = [[_step(trainer) for _ in range(half)] for trainer in (first, second)]
    resumed.restore(copy.deepcopy(first.state()))
    losses += [[_step(trainer) for _ in range(half)] for trainer in (first, second, resumed)]
    apart = [abs(a - b) for a, b in zip(losses[0] + losses[2], losses[1] + losses[3], strict=True)]
    after = [abs(a - b) for a, b in zip(losses[2], losses[4], strict=True)]
    return f"losses apart by at most {max(apart):.1e} and {max(after):.1e} nats (0 is bit for bit)"


def _syncs(config: Config, data_dir: Path) -> int:
    trainer = _trainer(config, "cuda", data_dir)
    _step(trainer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _step(trainer)

    names = [event.name for event in profile.events()]
    return sum(name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize") for name in names)


def _out_of_memory(config: Config, data_dir: Path, directory: Path) -> str:
    size = 64 * config.batch_size
    large = apply(config, {"batch_size": size, "micro_batch_size": size, "budget_tokens": 4 * size * config.seq_len})
    _write_request(directory, large, "cuda", data_dir)
    code = run_in(train, [str(directory)])
    error = json.loads((directory / "error.json").read_text()) if code else {}
    return f"exit code {code}, error.json says {error.get('error')} (expected 1, out_of_memory)"


def _whole_run(config: Config, device: Literal["cpu", "cuda"], data_dir: Path, directory: Path) -> str:
    short = apply(config, {"budget_tokens": STEPS * config.batch_size * config.seq_len, "progress_evals": 1})
    _write_request(directory, short, device, data_dir)
    codes = [run_in(work, [str(directory)]) for work in (train, evaluate)]
    score = json.loads((directory / "score.json").read_text())
    rate = account(short).flops_per_token * score["train_tokens"] / score["train_seconds"]
    return f"exit codes {codes}, val_bpb {score['val_bpb']:.3f}, {rate / 1e12:.2f} TFLOP/s"


def _write_request(directory: Path, config: Config, device: str, data_dir: Path) -> None:
    directory.mkdir()
    request = {"kind": "train", "config": config.model_dump(), "seed": 0, "device": device, "data_dir": str(data_dir)}
    (directory / "config.json").write_text(json.dumps(request))


if __name__ == "__main__":
    main()
