"""What stopping a run by its baseline's curve costs and saves, on resampled real curves (gpu_runner/pruning.py).

    .venv/bin/python -m benchmarks.pruning [DRAWS]

A resampled curve is an intervention's mean difference from the baseline, plus the whole residual curve of a random pair
of any intervention. A winner is an intervention whose mean score is better than the baseline's, a loser one that is
worse. The noise that the rule knows is drawn anew each time, as a lab would know it from 2 to 40 degrees of freedom. To
be hard on the rule, what is no clear loser is also taken to a gain of one deviation of a pair, and to none: about the
smallest that can be confirmed, and less. Treatments that change how a run unfolds are never compared; they are here
to show why.
"""

from __future__ import annotations

import csv
import math
import random
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks.curves import DATA, INTERVENTIONS, POINTS
from gpu_runner.pruning import UNFOLDS, behind, spread

Curve = list[float]
KNOWN = (3, 5, 11, 21, 41)
"""Runs of one config over which a lab knows its noise."""


def main(draws: int) -> None:
    """Prints a row an intervention."""
    base, others = _read()
    seeds = sorted(base)
    differences = {
        name: [[x - y for x, y in zip(runs[seed], base[seed], strict=True)] for seed in seeds if seed in runs]
        for name, runs in others.items()
    }
    means = {name: [fmean(column) for column in zip(*rows, strict=True)] for name, rows in differences.items()}
    residuals = [
        [(x - m) * math.sqrt(len(rows) / (len(rows) - 1)) for x, m in zip(row, means[name], strict=True)]
        for name, rows in differences.items()
        for row in rows
    ]
    deviation = math.sqrt(fmean(row[-1] ** 2 for row in residuals))
    rng = random.Random(4)
    print(f"{len(seeds)} seeds; a pair's deviation is {deviation:.4f}\n")
    print("| intervention | effect | stopped | compute saved | at a gain of one deviation | at no gain |")
    print("|---|---|---|---|---|---|")
    for name, mean in sorted(means.items(), key=lambda item: item[1][-1]):
        error = deviation / math.sqrt(len(differences[name]))
        cells = [_stops(rng, mean, residuals, base, draws)]
        for gain in (deviation, 0.0):
            if mean[-1] < 2.0 * error:
                # What lifts the end lifts every point: a gain that is smaller all along.
                lifted = [value - mean[-1] - gain for value in mean]
                cells.append(_stops(rng, lifted, residuals, base, draws))

        shown = [f"{sum(x > 0 for x in cell)} of {draws}" for cell in cells]
        shown += [""] * (3 - len(shown))
        kind = " (not compared)" if set(INTERVENTIONS[name]) & set(UNFOLDS) else ""
        shown.insert(1, f"{fmean(cells[0]):.0%}")
        print(f"| {name}{kind} | {mean[-1]:+.3f} | {' | '.join(shown)} |")


def _stops(
    rng: random.Random,
    mean: Sequence[float],
    residuals: Sequence[Curve],
    base: Mapping[int, Curve],
    draws: int,
) -> list[float]:
    """For each draw, the part of the run that was saved; 0 where it went on to its end."""
    found = []
    runs = list(base.values())
    centre = [fmean(column) for column in zip(*runs, strict=True)]
    for _ in range(draws):
        reference = rng.choice(runs)[:POINTS]
        noise = rng.choice(residuals)
        curve = [a + b + c for a, b, c in zip(reference, mean, noise, strict=False)]
        # Runs of one config as a lab has them: the difference of two of them scatters like a pair, so each by half.
        group = [
            [m + x / math.sqrt(2.0) for m, x in zip(centre[:POINTS], rng.choice(residuals), strict=False)]
            for _ in range(rng.choice(KNOWN))
        ]
        deviations = spread([group], POINTS)
        stop = next((k for k in range(1, POINTS) if behind(curve[:k], reference, deviations)), POINTS)
        found.append(1.0 - stop / POINTS)

    return found


def _read() -> tuple[dict[int, Curve], dict[str, dict[int, Curve]]]:
    """Curves with the score as the last point: of the baseline by seed, and of each intervention."""
    curves: dict[str, dict[int, Curve]] = {}
    with DATA.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = [float(row[f"{k}/{POINTS}"]) for k in range(1, POINTS + 1)]
            curves.setdefault(row["intervention"], {})[int(row["seed"])] = [*values, float(row["score"])]

    return curves.pop("baseline"), curves


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
