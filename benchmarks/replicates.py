"""Scores of a config compared with itself: what of a difference is noise (benchmarks/data/replicates.csv).

    .venv/bin/python -m benchmarks.replicates PRESET SEEDS REPLICATES [TOKENS]

Appends a row for every seed and replicate that is not there yet. Runs of one seed read the same text in the same order;
replicates differ in the initial weights alone, so the difference of two replicates of one seed is what a paired
comparison measures when the treatment does nothing.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

import torch

from moe.config import apply
from moe.data import prepare
from moe.evaluate import score_tokens
from moe.presets import PRESETS
from moe.rundir import Request
from moe.train import Trainer

DATA = Path(__file__).parent / "data" / "replicates.csv"
COLUMNS = ("preset", "budget_tokens", "seed", "replicate", "val_bpb")
REPLICATE_STRIDE = 1_000_000
"""Initial weights of replicate k of seed s are drawn from s + k * REPLICATE_STRIDE."""


def score(request: Request, replicate: int) -> float:
    """val_bpb after training with the text of the request's seed and this replicate's initial weights."""
    device = torch.device("cpu")
    data = prepare(request.config, request.data_dir)
    trainer = Trainer(request, data, device)
    trainer.model.init_weights(request.seed + replicate * REPLICATE_STRIDE)
    for _ in trainer.run():
        pass

    return score_tokens(trainer.scored_model, data, "val", request.config.eval_tokens, device).bits_per_byte


def main(preset: str, seeds: int, replicates: int, tokens: int | None) -> None:
    """Trains what is missing, one row after the other."""
    torch.set_num_threads(1)
    overrides = {"progress_evals": 1} | ({} if tokens is None else {"budget_tokens": tokens})
    config = apply(PRESETS[preset], overrides)
    found: set[tuple[str, int, int, int]] = set()
    if DATA.exists():
        with DATA.open(encoding="utf-8", newline="") as file:
            found = {
                (row["preset"], int(row["budget_tokens"]), int(row["seed"]), int(row["replicate"]))
                for row in csv.DictReader(file)
            }

    with DATA.open("a", encoding="utf-8", newline="") as file, tempfile.TemporaryDirectory() as folder:
        writer = csv.writer(file, lineterminator="\n")
        if not found:
            writer.writerow(COLUMNS)

        for seed in range(seeds):
            request = Request(kind="train", config=config, seed=seed, device="cpu", threads=1, data_dir=Path(folder))
            for replicate in range(replicates):
                if (preset, config.budget_tokens, seed, replicate) not in found:
                    value = score(request, replicate)
                    writer.writerow((preset, config.budget_tokens, seed, replicate, f"{value:.6f}"))
                    file.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
