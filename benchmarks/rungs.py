"""Whether short trainings foretell long ones at micro: what screening on a part of the budget finds and costs.

    .venv/bin/python -m benchmarks.rungs SEEDS    # trains what is missing: a row for each intervention, seed and budget
    .venv/bin/python -m benchmarks.rungs          # prints the tables from the rows that there are

A rung is a complete training on a part of the budget, as `screen_share` has it. benchmarks/data/rungs.csv holds val_bpb
after each eighth of that budget, and the score of the trained model; runs of the whole budget that are in curves.csv
are not done again. "Without chance" is what the correlation would be if effects were known exactly: that of effects
from different seeds, divided by the root of what each budget's effects have among themselves (Spearman 1904).
"""

from __future__ import annotations

import csv
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch

from agents.class_noise import noise_of
from agents.foretelling import rank_correlation, spearman
from agents.noise import Noise
from agents.screening import PROMISING
from benchmarks import curves
from benchmarks.curves import POINTS, TOKENS
from db.comparisons import ScoredPair
from moe.config import apply
from moe.presets import PRESETS
from moe.rundir import Request

DATA = Path(__file__).parent / "data" / "rungs.csv"
COLUMNS = (*(f"{k}/{POINTS}" for k in range(1, POINTS + 1)), "score")
NULL_RUNS = 4.8
"""What a promising null costs before its confirmation is given up, in runs (benchmarks/verdicts.py)."""

MILD = 0.1
"""Harm up to this is not clear: what is beyond it everybody would find, at any length."""

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


def report() -> None:
    """Prints the tables, over the seeds that every intervention has at every budget."""
    runs = measured()
    seeds = [s for s in range(1, 99) if all((n, s, TOKENS // p) in runs for n in INTERVENTIONS for p in PARTS)]
    names = [name for name in INTERVENTIONS if name != "baseline"]

    def effect(name: str, seed: int, part: int, point: int = -1) -> float:
        return runs[name, seed, TOKENS // part][point] - runs["baseline", seed, TOKENS // part][point]

    effects = {part: {name: [effect(name, seed, part) for seed in seeds] for name in names} for part in PARTS}
    whole = {name: fmean(values) for name, values in effects[1].items()}
    noise = {part: _noise(runs, names, seeds, part) for part in PARTS}
    print(f"{len(names)} interventions, seeds {seeds[0]} to {seeds[-1]}\n")
    _head("intervention", *(_budget(part) for part in PARTS))
    for name in sorted(names, key=whole.__getitem__):
        _print(name, *(f"{fmean(effects[part][name]):+.3f}" for part in PARTS))

    _print("a pair's deviation", *(f"{noise[part].sd:.3f}" for part in PARTS))
    print()
    mild = [name for name in names if whole[name] < MILD]
    _head("early effect", f"all {len(names)}", "without chance", f"the {len(mild)} without clear harm")
    for part in PARTS[:-1]:
        found = [_correlation([(fmean(effects[part][n]), whole[n]) for n in some]) for some in (names, mild)]
        _print(f"screened at {_budget(part)}", found[0], _without_chance(effects[part], effects[1]), found[1])

    for k in range(1, POINTS):
        curve = {name: [effect(name, seed, 1, k - 1) for seed in seeds] for name in names}
        found = [_correlation([(fmean(curve[n]), whole[n]) for n in some]) for some in (names, mild)]
        _print(f"the curve at {k}/{POINTS}", found[0], _without_chance(curve, effects[1]), found[1])

    print()
    gains = [name for name in names if whole[name] < -2.0 * noise[1].sd / math.sqrt(len(seeds))]
    others = [name for name in names if name not in gains]
    _head("screening", "runs an idea", f"of {len(gains)} gains", f"of {len(others)} others", "runs a gain let through")
    for part in PARTS:
        passed = {name: _passes(effects[part][name], noise[part].sd) for name in names}
        let, wrong = (sum(passed[name] for name in some) for some in (gains, others))
        spent = len(names) * 2.0 / part + NULL_RUNS * wrong
        _print(_budget(part), f"{2.0 / part:g}", f"{let:.1f}", f"{wrong:.1f}", f"{spent / let:.1f}" if let else "none")

    print("\nGains:", ", ".join(gains))


def _noise(runs: Runs, names: Sequence[str], seeds: Sequence[int], part: int) -> Noise:
    """Of one pair's difference, as a lab would know it from these runs."""
    pairs = [
        ScoredPair(
            experiment_id=number,
            stage="screen",
            seed=seed,
            extended=False,
            baseline_fingerprint="baseline",
            treatment_fingerprint=name,
            baseline=runs["baseline", seed, TOKENS // part][-1],
            treatment=runs[name, seed, TOKENS // part][-1],
        )
        for number, name in enumerate(names)
        for seed in seeds
    ]
    found = noise_of(pairs)
    assert found is not None, "one seed tells nothing of the noise"
    return found


def _passes(differences: Sequence[float], sd: float) -> float:
    """The share of pairs of seeds on which a screening calls it promising."""
    chosen = list(combinations(differences, 2))
    return sum(-fmean(two) > PROMISING * sd / math.sqrt(2.0) for two in chosen) / len(chosen)


def _correlation(points: Sequence[tuple[float, float]]) -> str:
    found = rank_correlation(points)
    assert found is not None
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def _without_chance(early: Mapping[str, Sequence[float]], late: Mapping[str, Sequence[float]]) -> str:
    def between(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> float:
        seeds = range(len(next(iter(one.values()))))
        found = [spearman([(one[n][i], other[n][j]) for n in one]) for i in seeds for j in seeds if i != j]
        return fmean(value for value in found if value is not None)

    return f"{between(early, late) / math.sqrt(between(early, early) * between(late, late)):.2f}"


def _budget(part: int) -> str:
    return "the whole budget" if part == 1 else f"1/{part}"


def _head(*cells: str) -> None:
    _print(*cells)
    print("|---" * len(cells) + "|")


def _print(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else report()
