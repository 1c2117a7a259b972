"""Whether short trainings foretell long ones at micro: what screening on a part of the budget finds and costs.

    .venv/bin/python -m benchmarks.rungs SEEDS

Appends a row to benchmarks/data/rungs.csv for every intervention, seed and budget that is not there yet: val_bpb after
each eighth of that budget, and the score of the trained model.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import curves
from benchmarks.curves import POINTS, TOKENS
from moe.config import apply
from moe.presets import PRESETS
from moe.rundir import Request

DATA = Path(__file__).parent / "data" / "rungs.csv"
COLUMNS = (*(f"{k}/{POINTS}" for k in range(1, POINTS + 1)), "score")
PARTS = (8, 4, 2, 1)
"""A rung is a training of its own on the whole budget divided by one of these."""

INTERVENTIONS: Mapping[str, Mapping[str, bool | int | float | str]] = {
    **curves.INTERVENTIONS,  # gains, harm, and what changes how a run unfolds
    # Perhaps gains.
    "query-key norm": {"qk_norm": True},
    "4 heads": {"n_heads": 4},
    "beta1 0.8, query-key norm": {"beta1": 0.8, "qk_norm": True},
    # What may depend on how long is trained.
    "batch 4": {"batch_size": 4},
    "half the learning rate": {"lr": 0.003},
    "no warmup": {"warmup_fraction": 0.0},
    "beta2 0.99": {"beta2": 0.99},
    "2 experts": {"num_experts": 2},
    "3 layers": {"n_layers": 3},
    "width 96": {"d_model": 96},
    # Nothing, as far as is known.
    "geglu experts": {"expert_kind": "geglu"},
    "sigmoid router": {"router_score": "sigmoid"},
    "no weight decay": {"weight_decay": 0.0},
    "more balance loss": {"load_balance_weight": 0.1},
    # Harm.
    "noisy top-k": {"noisy_top_k": True},
    "gates not normalized": {"normalize_gates": False},
}

Runs = dict[tuple[str, int, int], list[float]]
"""By intervention, seed and tokens: val_bpb after each POINTS-th of training, and last the score."""


def measured() -> Runs:
    """All runs that there are; those of the whole budget that benchmarks/curves.py has traced are among them."""
    found: Runs = {}
    for path in filter(Path.exists, (curves.DATA, DATA)):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                key = (row["intervention"], int(row["seed"]), int(row.get("budget_tokens", TOKENS)))
                found[key] = [float(row[name]) for name in COLUMNS]

    return found


def measure(seeds: int) -> None:
    """Trains what is missing, seed after seed."""
    torch.set_num_threads(1)
    base = apply(PRESETS["micro"], {"progress_evals": POINTS})
    found = measured()
    is_new = not DATA.exists()
    with DATA.open("a", encoding="utf-8", newline="") as file, tempfile.TemporaryDirectory() as folder:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(("intervention", "seed", "budget_tokens", *COLUMNS))

        for seed in range(1, seeds + 1):
            for name, overrides in INTERVENTIONS.items():
                for tokens in (TOKENS // part for part in PARTS):
                    if (name, seed, tokens) not in found:
                        config = apply(base, dict(overrides) | {"budget_tokens": tokens})
                        request = Request(
                            kind="train", config=config, seed=seed, device="cpu", threads=1, data_dir=Path(folder)
                        )
                        writer.writerow((name, seed, tokens, *(f"{value:.5f}" for value in curves.trace(request))))
                        file.flush()


if __name__ == "__main__":
    measure(int(sys.argv[1]))
