"""Learning curves of known gains and losses at micro, on which stopping early is calibrated.

    .venv/bin/python -m benchmarks.curves SEEDS

Appends a row to benchmarks/data/curves.csv for every intervention and seed that is not there yet: val_bpb after each
eighth of 204,800 tokens, on the small part of val that a curve is made of, and last the score that a verdict would use.
What each is known for: docs/studies/knob_effects.md.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from moe.config import apply
from moe.data import prepare
from moe.evaluate import score_tokens
from moe.presets import PRESETS
from moe.rundir import Request
from moe.train import Trainer

DATA = Path(__file__).parent / "data" / "curves.csv"
POINTS = 8
TOKENS = 204_800

INTERVENTIONS: Mapping[str, Mapping[str, bool | int | float | str]] = {
    "baseline": {},
    "Muon with momentum 0.9": {"optimizer": "muon", "muon_momentum": 0.9},
    "Muon": {"optimizer": "muon"},
    "beta1 0.8": {"beta1": 0.8},
    "hash routing": {"routing": "hash"},
    "16 experts": {"num_experts": 16},
    "wsd that decays for half": {"schedule": "wsd", "decay_fraction": 0.5},
    "averaged weights": {"ema_decay": 0.98},
    "two-matrix experts": {"expert_kind": "mlp"},
    "batch 16": {"batch_size": 16},
    "twice the learning rate": {"lr": 0.012},
    "untied embeddings": {"tie_embeddings": False},
    "a tenth of the learning rate": {"lr": 0.0006},
    "one active expert": {"top_k": 1},
}


def trace(request: Request) -> list[float]:
    """val_bpb at each of POINTS points of training, and of the trained model."""
    device = torch.device("cpu")
    data = prepare(request.config, request.data_dir)
    trainer = Trainer(request, data, device)
    points = [point["values"]["val_bpb"] for point in trainer.run() if "val_bpb" in point["values"]]
    return [*points, score_tokens(trainer.scored_model, data, "val", request.config.eval_tokens, device).bits_per_byte]


def main(seeds: int) -> None:
    """Trains what is missing, one row after the other."""
    torch.set_num_threads(1)
    base = apply(PRESETS["micro"], {"progress_evals": POINTS, "budget_tokens": TOKENS})
    found: set[tuple[str, int]] = set()
    if DATA.exists():
        with DATA.open(encoding="utf-8", newline="") as file:
            found = {(row["intervention"], int(row["seed"])) for row in csv.DictReader(file)}

    with DATA.open("a", encoding="utf-8", newline="") as file, tempfile.TemporaryDirectory() as folder:
        writer = csv.writer(file, lineterminator="\n")
        if not found:
            writer.writerow(("intervention", "seed", *(f"{k}/{POINTS}" for k in range(1, POINTS + 1)), "score"))

        for seed in range(1, seeds + 1):
            for name, overrides in INTERVENTIONS.items():
                if (name, seed) not in found:
                    config = apply(base, dict(overrides))
                    data_dir = Path(folder)
                    request = Request(
                        kind="train", config=config, seed=seed, device="cpu", threads=1, data_dir=data_dir
                    )
                    writer.writerow((name, seed, *(f"{value:.5f}" for value in trace(request))))
                    file.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
