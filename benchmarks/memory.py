"""How far the predicted peak memory of training is from what it really takes, over shapes and precisions, on the CPU.

    .venv/bin/python -m benchmarks.memory

Each shape trains three steps in a process of its own. Allocated: the peak of the tensors alive, from the profiler's
trace of the third step; this is what CUDA reports of a card. Resident: the process's memory (VmHWM), with what the
allocator could not reuse. On a card `python -m benchmarks.gpu_check` compares with what CUDA reports.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from moe.accounting import CONTEXT_BYTES, account, peak_memory_bytes
from moe.config import Config, apply
from moe.data import prepare
from moe.precision import Precision
from moe.presets import PRESETS
from moe.rundir import Request, peak_memory
from moe.train import Trainer

WIDE = {
    "d_model": 384,
    "n_layers": 4,
    "n_heads": 6,
    "seq_len": 256,
    "d_expert": 768,
    "batch_size": 8,
    "budget_tokens": 10**6,
}
BASE = apply(PRESETS["nano"], WIDE | {"micro_batch_size": 8})
SHAPES: dict[str, dict[str, Any]] = {
    "8 experts, top 2": {"num_experts": 8},
    "micro-batch of 2": {"num_experts": 8, "micro_batch_size": 2},
    "32 sequences": {"num_experts": 8, "batch_size": 32, "micro_batch_size": 32},
    "64 experts, top 8": {"num_experts": 64, "top_k": 8, "d_expert": 192},
    "two-matrix experts": {"num_experts": 8, "expert_kind": "mlp"},
    "vocabulary 8,192": {"num_experts": 8, "tokenizer": "bpe", "vocab_size": 8192},
    "half dense": {"num_experts": 8, "moe_every": 2},
    "shared experts": {"num_experts": 8, "num_shared_experts": 1},
    "checkpointing": {"num_experts": 8, "activation_checkpointing": True, "batch_size": 32, "micro_batch_size": 32},
    "Muon": {"num_experts": 8, "optimizer": "muon"},
    "averaged weights": {"num_experts": 8, "ema_decay": 0.99},
    "Muon, a short batch": {"num_experts": 8, "optimizer": "muon", "batch_size": 2, "micro_batch_size": 2},
    "expert choice, capped": {"num_experts": 16, "routing": "expert_choice", "logit_softcap": 15.0},
    "capacity 1.25, deep": {"num_experts": 16, "top_k": 1, "capacity_factor": 1.25, "n_layers": 8, "moe_every": 2},
    "hash, checkpointing, Muon": {
        "num_experts": 64,
        "routing": "hash",
        "d_expert": 128,
        "activation_checkpointing": True,
        "optimizer": "muon",
    },
}

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


class Measured(NamedTuple):
    """Bytes: of the most tensors alive at once, and of the most memory that the process had."""

    allocated: int
    resident: int


def measure(config: Config, data_dir: Path) -> Measured:
    """Train three steps in this process."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    request = Request(kind="train", config=config, seed=0, device="cpu", data_dir=data_dir)
    trainer = Trainer(request, prepare(config, data_dir), device)

    def step() -> None:
        trainer.optimizer_step(config.lr)
        trainer.sequences += config.batch_size

    step()
    step()
    resident = peak_memory(device)
    trainer.model.zero_grad(set_to_none=True)
    states = [value for o in trainer.optimizers for state in o.state.values() for value in state.values()]
    models = [trainer.model] + ([trainer.average.model] if trainer.average else [])
    held = [*states, *(tensor for model in models for tensor in [*model.parameters(), *model.buffers()])]
    before = sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()

    assert trace.profiler is not None
    events = sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return Measured(before + max(itertools.accumulate(changes)), resident)


def main() -> None:
    """Prints the table."""
    print("| shape | precision | parameters | predicted | allocated | error | with the process | resident | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    errors: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in SHAPES.items():
            for precision in PRECISIONS:
                config = apply(BASE, changes | {"precision": precision})
                predicted = peak_memory_bytes(config, precision)
                cells = [name, precision, f"{account(config).parameters / 1e6:.1f} M"]
                own = (predicted - CONTEXT_BYTES[precision], predicted)
                for kind, (expected, measured) in enumerate(
                    zip(own, _measure_apart(config, Path(folder)), strict=True)
                ):
                    errors[kind].append(expected / measured - 1.0)
                    cells += [f"{count / 2**20:,.0f} MiB" for count in (expected, measured)]
                    cells.append(f"{errors[kind][-1]:+.1%}")

                print(f"| {' | '.join(cells)} |", flush=True)

    for kind, text in enumerate(("allocated", "resident")):
        sizes = sorted(map(abs, errors[kind]))
        print(f"\n{text}: median error {sizes[len(sizes) // 2]:.1%}, largest {sizes[-1]:.1%}")


def _measure_apart(config: Config, data_dir: Path) -> Measured:
    command = [sys.executable, "-m", "benchmarks.memory", config.model_dump_json(), str(data_dir)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.stdout.write(json.dumps(measure(Config.model_validate_json(sys.argv[1]), Path(sys.argv[2]))) + "\n")
    else:
        main()
