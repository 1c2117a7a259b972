"""Which kinds of routing look at what they should not: the audit of moe/causality.py over all of them, as a table.

.venv/bin/python -m benchmarks.causality
"""

from __future__ import annotations

from typing import Any

import torch

from moe.causality import LEAK, audit
from moe.config import apply
from moe.observe import build
from moe.presets import PRESETS

BASE = {"seq_len": 32, "routing_group": 2, "micro_batch_size": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax top-2, dropless": {},
    "softmax top-1, raw gates": {"top_k": 1, "normalize_gates": False},
    "sigmoid top-2, balanced by bias": {"router_score": "sigmoid", "balance_bias_rate": 0.01},
    "noisy top-2": {"noisy_top_k": True},
    "capacity 1.0": {"capacity_factor": 1.0},
    "capacity 0.5, noisy top-1": {"capacity_factor": 0.5, "noisy_top_k": True, "top_k": 1},
    "hash": {"routing": "hash"},
    "shared experts, first layer dense": {"num_shared_experts": 1, "first_k_dense": 1},
    "GQA, QK-norm, soft cap": {"gqa_group_size": 2, "qk_norm": True, "logit_softcap": 10.0},
    "expert choice": {"routing": "expert_choice"},
}


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print("| routing | future, evaluation | future, training | neighbours, evaluation | causal |")
    print("|---|---|---|---|---|")
    for name, changes in VARIANTS.items():
        config = apply(PRESETS["nano"], BASE | changes)
        found = audit(build(config, seed=0), config)
        moved = " | ".join(f"{value:.1e}" for value in found)
        print(f"| {name} | {moved} | {'yes' if found.causal else 'NO'} |")

    print(f"\nThe most that a logit moved, in float64; up to {LEAK:.0e} is rounding.")


if __name__ == "__main__":
    main()
