"""How often verdicts are wrong: false claims and coverage over simulated labs with the noise of real runs.

    .venv/bin/python -m benchmarks.verdicts [LABS [TABLE ...]]

LABS (1,000) labs of 100 registered hypotheses each, peeking after every pair. The noise is resampled from residuals of
real runs (benchmarks/data/, made by benchmarks.replicates and benchmarks.curves), scaled so that the difference of a
pair has deviation 1; a lab knows it from 10 earlier pairs. The formulas are those of agents/evidence.py over arrays,
and main() checks them against it. benchmarks.race compares with other ways to claim a gain, benchmarks.shrinkage looks
at the gains that are to be expected.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from agents.discoveries import ALPHA, share
from agents.evidence import SIZES, SPREADS, Better, Moments, log_evidence
from agents.noise import Noise
from agents.prospects import FUTILE, HOPED, pairs_needed
from agents.weighing import LEAST_PAIRS

DATA = Path(__file__).parent / "data" / "replicates.csv"
CURVES = Path(__file__).parent / "data" / "curves.csv"
LABS, HYPOTHESES, PAIRS, KNOWN_PAIRS = 1000, 100, 24, 10

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Spreads = tuple[tuple[float, float], ...]
SHARES = np.array([share(position) for position in range(1, HYPOTHESES + 1)])


class Paths(NamedTuple):
    """Differences of growing numbers of pairs. Shapes: n (N,), mean and squares (..., N), sd (..., 1) or a number."""

    n: Floats
    mean: Floats
    squares: Floats
    sd: Floats
    df: float


def residuals(preset: str) -> Floats:
    """Scores of real runs about the mean of their seed's, scaled to variance 1/2: that of a pair is then 1.

    Those of micro are what interventions and seeds leave unexplained in the runs of benchmarks.curves.
    """
    if preset == "micro":
        return _scaled(_unexplained())

    by_seed: dict[str, list[float]] = defaultdict(list)
    with DATA.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["preset"] == preset:
                by_seed[row["seed"]].append(float(row["val_bpb"]))

    values = np.array([scores for scores in by_seed.values() if len(scores) == 4])
    return _scaled((values - values.mean(axis=1, keepdims=True)).ravel())


def _unexplained() -> Floats:
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    with CURVES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["score"]:
                rows[row["intervention"]][row["seed"]] = float(row["score"])

    seeds = sorted(set.intersection(*(set(found) for found in rows.values())))
    table = np.array([[found[seed] for seed in seeds] for found in rows.values()])
    means = table.mean(axis=1, keepdims=True) + table.mean(axis=0, keepdims=True) - table.mean()
    return np.asarray((table - means).ravel())


def _scaled(centred: Floats) -> Floats:
    return np.asarray(centred * np.sqrt(0.5 / np.mean(centred**2)))


def paths(differences: Floats, sd: Floats, df: float) -> Paths:
    """What accumulates along the last axis."""
    n = np.arange(1.0, differences.shape[-1] + 1.0)
    mean = np.cumsum(differences, axis=-1) / n
    squares = np.maximum(np.cumsum(differences**2, axis=-1) - n * mean**2, 0.0)
    return Paths(n, mean, squares, sd, df)


def log_e(its: Paths, better: Better | None = "lower", spreads: Spreads = SPREADS) -> Floats:
    """agents.evidence.log_evidence over arrays; the far tail of Student's t is cut at 1e-300."""
    n, total_df, known = its.n, its.df + its.n, its.df * its.sd**2
    sign = -1.0 if better == "lower" else 1.0
    null = np.zeros_like(its.mean)
    alternative = np.zeros_like(its.mean)
    first: Floats | None = None
    for spread, prior in spreads:
        scatter = known * spread**2 + its.squares
        around_zero = scatter + n * its.mean**2
        log_null = np.log(prior) + its.df * np.log(spread) - 0.5 * total_df * np.log(around_zero)
        first = log_null if first is None else first
        weight = np.exp(log_null - first)
        null += weight
        for size in SIZES:
            gain = 1.0 + n * size**2
            left = scatter + n * its.mean**2 / gain
            ratio = np.exp(0.5 * (total_df * np.log(around_zero / left) - np.log(gain)))
            if better is not None:
                t = sign * n * its.mean * size * np.sqrt(total_df / (gain * left))
                ratio *= 2.0 * stdtr(total_df, t)

            alternative += weight * ratio / len(SIZES)

    return np.log(np.maximum(alternative, 1e-300)) - np.log(null)


def log_e_ahead(its: Paths, max_pairs: int, spreads: Spreads = SPREADS) -> Floats:
    """The evidence that can just be hoped for at the last pair; agents.prospects.is_futile compares it with its aim."""
    left = its.df + its.n - 1.0
    variance = (its.df * its.sd**2 + its.squares) / left
    ahead = np.maximum(max_pairs - its.n, 0.0)
    drift = stdtrit(left, 1.0 - FUTILE) * np.sqrt(variance * (1.0 / its.n - 1.0 / max_pairs))
    last = Paths(its.n + ahead, its.mean - drift, its.squares + ahead * variance, its.sd, its.df)
    return log_e(last, "lower", spreads)


def known_noise(draw: np.random.Generator, noise: Floats, labs: int, pairs: int = KNOWN_PAIRS) -> Floats:
    """The deviation that each lab measures from its earlier pairs. Shape (labs, 1, 1)."""
    earlier = draw.choice(noise, (labs, pairs)) - draw.choice(noise, (labs, pairs))
    return np.asarray(np.std(earlier, axis=1, ddof=1)[:, None, None])


def draw_differences(
    draw: np.random.Generator, noise: Floats, effects: Floats, pairs: int, spread: float = 1.0
) -> Floats:
    """Fresh pairs of every hypothesis; effects and spread in deviations of a pair. Shape (*effects.shape, pairs)."""
    shape = (*effects.shape, pairs)
    return np.asarray(effects[..., None] + spread * (draw.choice(noise, shape) - draw.choice(noise, shape)))


def claims(log_e_values: Floats, ahead: Floats, shares: Floats, alpha: float) -> tuple[Bools, Counts]:
    """Runs campaigns in rounds of one pair for every open hypothesis, by online e-BH.

    Args:
        log_e_values, ahead: of shape (labs, hypotheses, pairs); -inf where nothing is registered.
        shares: of alpha, by position.

    Returns which are claimed, and at how many pairs each one stopped: when it is claimed, or when it is futile even if
    a share HOPED of the other open ones is claimed as well.
    """
    labs, hypotheses, pairs = log_e_values.shape
    claimed = np.zeros((labs, hypotheses), dtype=bool)
    open_still = np.isfinite(log_e_values[..., 0])
    stopped = np.full((labs, hypotheses), pairs)
    frozen = np.full((labs, hypotheses), -np.inf)
    for look in range(pairs):
        evidence = log_e_values[..., look]
        frozen = np.where(open_still, evidence if look + 1 >= LEAST_PAIRS else np.minimum(evidence, 0.0), frozen)
        claimed = online_e_bh(frozen, shares, alpha)
        others = np.maximum((open_still & ~claimed).sum(axis=1) - 1, 0)
        hoped = claimed.sum(axis=1) + HOPED * others + 1.0
        aim = -np.log(alpha * shares[None, :] * hoped[:, None])
        ended = open_still & (claimed | (ahead[..., look] < aim))
        stopped[ended] = look + 1
        open_still &= ~ended

    return claimed, stopped


def online_e_bh(log_e_values: Floats, shares: Floats, alpha: float) -> Bools:
    """agents.discoveries.discoveries over labs; -inf where nothing was registered."""
    needed = np.exp(np.minimum(-log_e_values, 500.0)) / (alpha * shares[None, :])  # claims among which it may be one
    counts = np.arange(1, needed.shape[1] + 1)
    enough = np.sort(needed, axis=1) <= counts[None, :]
    most = np.where(enough, counts[None, :], 0).max(axis=1)
    return np.asarray(needed <= most[:, None])


def main(labs: int, only: Sequence[str] = ()) -> None:
    """Prints the tables, or some of them. Each draws for itself, so that one printed alone is the same as among all."""
    noise = residuals("nano")
    tables: dict[str, Callable[[np.random.Generator], None]] = {
        "nulls": lambda draw: _all_nulls(draw, noise, labs),
        "mixed": lambda draw: _all_mixed(draw, labs),
        "coverage": lambda draw: _coverage(draw, noise, labs),
        "lost": lambda draw: _lost(draw, noise, labs),
        "planned": lambda draw: _planned(draw, noise, labs),
        "real": lambda draw: _real_comparisons(),
    }
    for number, (name, table) in enumerate(tables.items()):
        if not only or name in only:
            table(np.random.default_rng(20261123 + 1000 * number))


def _all_nulls(draw: np.random.Generator, noise: Floats, labs: int) -> None:
    _check(draw, noise)
    print(f"{labs:,} labs of {HYPOTHESES} hypotheses that do nothing: labs with any claim (%)\n")
    print("| noise | spread of treatments | improved | worse | one hypothesis at .05 | at .01 | at .002 |")
    print("|---|---|---|---|---|---|---|")
    for kind, spread in (
        *((kind, spread) for kind in ("nano", "micro") for spread in (1.0, 1.5, 2.0, 3.0)),
        ("normal", 1.0),
    ):
        source = draw.normal(0.0, np.sqrt(0.5), 100_000) if kind == "normal" else residuals(kind)
        _nulls(draw, source, kind, spread, labs)


def _all_mixed(draw: np.random.Generator, labs: int) -> None:
    print(f"\n{labs:,} labs of 80 nulls and 20 real effects: nominal 5 %\n")
    print("| noise | effect | false share of claims (%) | real ones claimed (%) | pairs a real one | pairs a null |")
    print("|---|---|---|---|---|---|")
    for kind in ("nano", "micro"):
        for sizes in ((0.5,), (1.0,), (2.0,), (4.0,), (0.5, 1.0, 2.0, 4.0)):
            _mixed(draw, residuals(kind), kind, sizes, labs)


def _check(draw: np.random.Generator, noise: Floats) -> None:
    differences = draw_differences(draw, noise, np.array([-1.0, 0.0, 3.0]), 12)
    its = paths(differences, np.full((3, 1), 0.8), 7.0)
    known = Noise(sd=0.8, df=7.0)
    directions: tuple[Better | None, ...] = ("lower", "higher", None)
    for better in directions:
        found = log_e(its, better)
        for row in range(3):
            for look in range(12):
                moments = Moments.of(differences[row, : look + 1].tolist())
                assert np.isclose(found[row, look], log_evidence(moments, known, better), rtol=1e-9, atol=1e-9)


def _nulls(draw: np.random.Generator, noise: Floats, kind: str, spread: float, labs: int) -> None:
    any_better, any_worse, single = [], [], []
    for few in _chunks(labs):
        sd = known_noise(draw, noise, few)
        its = paths(draw_differences(draw, noise, np.zeros((few, HYPOTHESES)), PAIRS, spread), sd, KNOWN_PAIRS - 1.0)
        lower, higher = log_e(its), log_e(its, "higher")
        never = np.full(lower.shape, np.inf)  # nobody gives up: the most chances to be wrong
        any_better.append(claims(lower, never, SHARES, ALPHA)[0].any(axis=1))
        any_worse.append(claims(higher, never, SHARES, ALPHA)[0].any(axis=1))
        single.append(lower.max(axis=-1))

    highest = np.concatenate(single)
    levels = " | ".join(f"{np.mean(highest >= -np.log(level)):.4f}" for level in (0.05, 0.01, 0.002))
    labs_with = f"{np.mean(np.concatenate(any_better)):.1%} | {np.mean(np.concatenate(any_worse)):.1%}"
    print(f"| {kind} | {spread} | {labs_with} | {levels} |", flush=True)


def _mixed(draw: np.random.Generator, noise: Floats, kind: str, sizes: Sequence[float], labs: int) -> None:
    shares_false, claimed_real, pairs_real, pairs_null = [], [], [], []
    for few in _chunks(labs):
        effects = mixed_effects(draw, sizes, few)
        its = paths(draw_differences(draw, noise, effects, PAIRS), known_noise(draw, noise, few), KNOWN_PAIRS - 1.0)
        claimed, stopped = claims(log_e(its), log_e_ahead(its, PAIRS), SHARES, ALPHA)
        real = effects < 0
        shares_false.append((claimed & ~real).sum(axis=1) / np.maximum(claimed.sum(axis=1), 1))
        claimed_real.append(claimed[real])
        pairs_real.append(stopped[real])
        pairs_null.append(stopped[~real])

    name = "mixed" if len(sizes) > 1 else f"{sizes[0]}"
    false = f"{np.mean(np.concatenate(shares_false)):.2%}"
    means = f"{np.mean(np.concatenate(pairs_real)):.1f} | {np.mean(np.concatenate(pairs_null)):.1f}"
    print(f"| {kind} | {name} | {false} | {np.mean(np.concatenate(claimed_real)):.0%} | {means} |", flush=True)


def mixed_effects(draw: np.random.Generator, sizes: Sequence[float], labs: int, real: int = 20) -> Floats:
    """Effects of which `real` in every lab, at random places, are drawn from `sizes` and lower the metric."""
    chosen = np.argsort(draw.random((labs, HYPOTHESES)), axis=1) < real
    return np.where(chosen, -draw.choice(sizes, (labs, HYPOTHESES)), 0.0)


def _coverage(draw: np.random.Generator, noise: Floats, labs: int) -> None:
    print("\nintervals at 95 % that hold the true effect, over all of 24 looks | at the claim or the end\n")
    for spread in (1.0, 2.0, 3.0):
        held, held_at_stop = [], []
        for few in _chunks(labs // 4):
            effects = mixed_effects(draw, (0.5, 1.0, 2.0, 4.0), few, real=50)
            differences = draw_differences(draw, noise, effects, PAIRS, spread)
            its = paths(differences, known_noise(draw, noise, few), KNOWN_PAIRS - 1.0)
            about_truth = its._replace(mean=its.mean - effects[..., None])
            inside = log_e(about_truth, None) < np.log(20.0)
            _, stopped = claims(log_e(its), log_e_ahead(its, PAIRS), SHARES, ALPHA)
            held.append(inside.all(axis=-1))
            held_at_stop.append(np.take_along_axis(inside, stopped[..., None] - 1, -1)[..., 0])

        print(f"spread {spread}: {np.mean(np.concatenate(held)):.2%} | {np.mean(np.concatenate(held_at_stop)):.2%}")


def _lost(draw: np.random.Generator, noise: Floats, labs: int) -> None:
    print("\nnulls whose worst 24 % of pairs are lost: called improved at .05\n")
    count = 20 * labs
    differences = draw_differences(draw, noise, np.zeros((count, 1)), PAIRS)
    sd = known_noise(draw, noise, count)
    lost = differences > np.quantile(differences, 0.76)
    kept = np.take_along_axis(differences, np.argsort(lost, axis=-1, kind="stable"), -1)
    pairs_left = (~lost).sum(axis=-1, keepdims=True)
    dropped = log_e(paths(kept, sd, KNOWN_PAIRS - 1.0))
    dropped = np.where(np.arange(PAIRS) < pairs_left, dropped, -np.inf)
    for name, log_evidences in (
        ("nothing is lost", log_e(paths(differences, sd, KNOWN_PAIRS - 1.0))),
        ("they are dropped", dropped),
        ("they count as +4 sigma", log_e(paths(np.where(lost, 4.0, differences), sd, KNOWN_PAIRS - 1.0))),
    ):
        print(f"{name}: {np.mean(log_evidences.max(axis=-1) >= np.log(20.0)):.2%}")


def _planned(draw: np.random.Generator, noise: Floats, labs: int) -> None:
    print("\npairs needed for a claim: planned (median of simulations), noise known from 20 pairs\n")
    print("| effect | 1 registered | 10 | 50 |\n|---|---|---|---|")
    for effect in (0.5, 1.0, 2.0, 4.0):
        differences = draw_differences(draw, noise, np.full((labs, 1), -effect), 160)
        log_evidences = log_e(paths(differences, known_noise(draw, noise, labs, 20), 19.0))[:, 0]
        cells = []
        for hypotheses in (1, 10, 50):
            reached = log_evidences >= -np.log(ALPHA * share(hypotheses))
            median = np.median(np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, 999))
            cells.append(f"{pairs_needed(effect, hypotheses=hypotheses, df=19.0)} ({median:.0f})")

        print(f"| {effect} | {' | '.join(cells)} |", flush=True)


def _real_comparisons() -> None:
    """Real runs of a config against itself, nothing resampled: 8 pairs each, the noise from the 16 pairs before."""
    scores: dict[int, dict[int, float]] = defaultdict(dict)
    with DATA.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["preset"] == "nano":
                scores[int(row["seed"])][int(row["replicate"])] = float(row["val_bpb"])

    pairs = np.array([values[k] - values[k + 1] for k in (0, 2) for values in scores.values() if len(values) == 4])
    groups = pairs[: len(pairs) // 8 * 8].reshape(-1, 8)
    highest, covered = [], 0
    for index, group in enumerate(groups):
        known = np.concatenate([groups[index - 1], groups[index - 2]])
        its = paths(group, np.array([np.std(known, ddof=1)]), 15.0)
        highest += [log_e(its).max(), log_e(its, "higher").max()]
        covered += bool((log_e(its, None) < np.log(20.0)).all())

    print(
        f"\n{len(groups)} real comparisons of nano with itself, deviation of a pair {pairs.std(ddof=1):.4f} bits a byte"
    )
    print(f"evidence of 20 or more for either direction, at any look: {np.sum(np.array(highest) >= np.log(20.0))}")
    print(f"highest evidence: {np.exp(max(highest)):.1f}; intervals that hold 0 at all looks: {covered}")


def _chunks(labs: int, most: int = 100) -> list[int]:
    return [min(most, labs - start) for start in range(0, labs, most)]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else LABS, sys.argv[2:])
