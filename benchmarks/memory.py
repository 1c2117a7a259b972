"""How far the predicted peak memory of training is from what a process really takes, over shapes and precisions.

    .venv/bin/python -m benchmarks.memory

Each shape trains three steps in a process of its own, on the CPU; the peak is resident memory (VmHWM). On a card
`python -m benchmarks.gpu_check` compares with what CUDA reports.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe.accounting import account, peak_memory_bytes
from moe.config import Config, apply
from moe.presets import PRESETS

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
}

CHILD = """
import sys
from pathlib import Path
import torch
from moe.config import Config
from moe.data import prepare
from moe.rundir import Request, peak_memory
from moe.train import Trainer
torch.set_num_threads(1)
config = Config.model_validate_json(sys.argv[1])
data_dir = Path(sys.argv[2])
request = Request(kind="train", config=config, seed=0, device="cpu", data_dir=data_dir)
trainer = Trainer(request, prepare(config, data_dir), torch.device("cpu"))
for _ in range(3):
    trainer.optimizer_step(config.lr)
    trainer.sequences += config.batch_size
print(peak_memory(torch.device("cpu")))
"""


def main() -> None:
    """Prints the table."""
    print("| shape | precision | parameters | predicted | measured | error |")
    print("|---|---|---|---|---|---|")
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in SHAPES.items():
            for precision in ("fp32", "bf16"):
                config = apply(BASE, changes | {"precision": precision})
                measured = _measure(config, Path(folder))
                predicted = peak_memory_bytes(config, "fp32" if precision == "fp32" else "bf16")
                errors.append(predicted / measured - 1.0)
                size = f"{account(config).parameters / 1e6:.1f} M"
                memory = " | ".join(f"{count / 2**20:,.0f} MiB" for count in (predicted, measured))
                print(f"| {name} | {precision} | {size} | {memory} | {errors[-1]:+.1%} |", flush=True)

    sizes = sorted(map(abs, errors))
    print(f"\nmedian error {sizes[len(sizes) // 2]:.1%}, largest {sizes[-1]:.1%}")


def _measure(config: Config, data_dir: Path) -> int:
    command = [sys.executable, "-c", CHILD, config.model_dump_json(), str(data_dir)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return int(done.stdout)


if __name__ == "__main__":
    main()
