"""How far the gain that is expected of a claim lies from the true one, over simulated labs with the noise of real runs.

    .venv/bin/python -m benchmarks.shrinkage [CLAIMS]

Labs as in benchmarks/verdicts.py, screened, confirmed and claimed as agents/judge.py does it, until CLAIMS (150) claims
of each kind of lab were looked at, at most four a lab. Beside what agents/shrinkage.py expects stands what somebody
would who knew how effects are spread in truth, and the noise: less error than that is not to be had.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

from agents.discoveries import ALPHA, share
from agents.noise import Noise
from agents.shrinkage import shrunk
from benchmarks._screening import least_effect, screen
from benchmarks.verdicts import (
    KNOWN_PAIRS,
    Bools,
    Counts,
    Floats,
    claims,
    draw_differences,
    known_noise,
    log_e,
    log_e_ahead,
    paths,
    residuals,
)

CLAIMS, LABS, MOST_LABS = 150, 50, 1500
"""Claims looked at, labs simulated at a time, labs simulated at most."""


class Kind(NamedTuple):
    """A kind of lab: its experiments, how many are real, the sizes of their effects, the pairs of a confirmation."""

    experiments: int
    real: int
    sizes: tuple[float, ...]
    max_pairs: int = 24
    noise: str = "nano"


class Seen(NamedTuple):
    """What labs have come to know, an experiment a column: mean and number of all pairs, who is claimed, the noise."""

    effects: Floats
    means: Floats
    pairs: Counts
    confirmed: Floats
    claimed: Bools
    sd: Floats
    df: Floats


MIXED = (0.5, 1.0, 2.0, 4.0)
KINDS = (
    *(Kind(100, 20, sizes) for sizes in ((0.5,), (1.0,), (2.0,), (4.0,), MIXED)),
    *(Kind(100, 20, sizes, max_pairs=48) for sizes in ((0.5,), (1.0,), MIXED)),
    *(Kind(100, 50, sizes) for sizes in ((0.5,), (1.0,), (2.0,), (4.0,), MIXED)),
    *(Kind(30, 6, sizes) for sizes in ((1.0,), (2.0,), (4.0,), MIXED)),
    *(Kind(10, 2, sizes) for sizes in ((1.0,), (2.0,), (4.0,), MIXED)),
    *(Kind(100, 20, sizes, noise="micro") for sizes in ((0.5,), (1.0,), (2.0,), (4.0,), MIXED)),
)


def simulate(draw: np.random.Generator, kind: Kind, labs: int) -> Seen:
    """Labs that screen on shared baselines and confirm what is promising."""
    noise, shape = residuals(kind.noise), (labs, kind.experiments)
    chosen = np.argsort(draw.random(shape), axis=1) < kind.real
    effects = np.where(chosen, -draw.choice(kind.sizes, shape), 0.0)
    sd = known_noise(draw, noise, labs)
    screening = effects[..., None] + draw.choice(noise, (*shape, 2)) - draw.choice(noise, (labs, 1, 2))
    found = screen(screening, sd, least_effect(kind.max_pairs))
    screened = np.where(found.pairs == 2, screening.mean(axis=-1), screening[..., 0])

    its = paths(draw_differences(draw, noise, effects, kind.max_pairs), sd, KNOWN_PAIRS - 1.0)
    nothing = np.where(found.promising[..., None], 0.0, -np.inf)
    shares = np.array([share(position) for position in range(1, kind.experiments + 1)])
    in_turn = np.argsort(~found.promising, axis=1, kind="stable")
    evidence, ahead = log_e(its) + nothing, log_e_ahead(its, kind.max_pairs) + nothing
    order = in_turn[..., None]
    claimed_in_turn, stopped_in_turn = claims(
        np.take_along_axis(evidence, order, 1), np.take_along_axis(ahead, order, 1), shares, ALPHA
    )
    claimed, stopped = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
    np.put_along_axis(claimed, in_turn, claimed_in_turn, 1)
    np.put_along_axis(stopped, in_turn, stopped_in_turn, 1)

    last = np.maximum(stopped, 1)[..., None] - 1
    new = np.where(found.promising, stopped, 0)
    confirmed = np.where(found.promising, np.take_along_axis(its.mean, last, -1)[..., 0], 0.0)
    scatter = np.where(found.promising, np.take_along_axis(its.squares, last, -1)[..., 0], 0.0).sum(axis=1)
    df = KNOWN_PAIRS - 1.0 + np.maximum(new - 1, 0).sum(axis=1)
    known = (KNOWN_PAIRS - 1.0) * sd[:, 0, 0] ** 2
    return Seen(
        effects=effects,
        means=(found.pairs * screened + new * confirmed) / (found.pairs + new),
        pairs=found.pairs + new,
        confirmed=confirmed,
        claimed=claimed,
        sd=np.sqrt((known + scatter) / df),
        df=df,
    )


def knowing_all(mean: float, n: int, kind: Kind) -> float:
    """The posterior mean of an effect, for who knows the true spread of effects, and that the noise is 1."""
    sizes = np.array([0.0, *(-size for size in kind.sizes)])
    priors = np.array([kind.experiments - kind.real, *([kind.real / len(kind.sizes)] * len(kind.sizes))])
    weights = priors * np.exp(-0.5 * n * ((mean - sizes) ** 2 - np.min((mean - sizes) ** 2)))
    return float(weights @ sizes / weights.sum())


def errors(draw: np.random.Generator, kind: Kind, most: int) -> tuple[Floats, int]:
    """Observed, expected and all-knowing less the true effect of up to `most` claims, and the lab of each.

    Shape (claims, 4). Also the number of labs that were simulated.
    """
    rows: list[tuple[float, float, float, float]] = []
    done = 0
    while len(rows) < most and done < MOST_LABS:
        seen = simulate(draw, kind, LABS)
        for lab in range(LABS):
            known = Noise(sd=float(seen.sd[lab]), df=float(seen.df[lab]))
            every = list(zip(seen.means[lab].tolist(), seen.pairs[lab].tolist(), strict=True))
            for index in np.flatnonzero(seen.claimed[lab])[:4]:
                mean, n = every[index]
                truth = float(seen.effects[lab, index])
                expected = shrunk(mean, n, known, every[:index] + every[index + 1 :])
                observed = float(seen.confirmed[lab, index])
                rows.append((observed - truth, expected - truth, knowing_all(mean, n, kind) - truth, done + lab))

        done += LABS

    return np.array(rows), done


def standard_error(values: Floats, labs: Floats) -> float:
    """Of the mean of values of which those of one lab are not independent."""
    centred = values - values.mean()
    sums = [centred[labs == lab].sum() for lab in np.unique(labs)]
    return float(np.sqrt(np.sum(np.square(sums))) / len(values))


def main(most: int) -> None:
    """Prints the table."""
    draw = np.random.default_rng(20261125)
    print(
        "| experiments | real | effect | noise | pairs | claims (a lab) | observed | expected | (error) | all-knowing |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        found, labs = errors(draw, kind, most)
        name = "mixed" if len(kind.sizes) > 1 else f"{kind.sizes[0]:g}"
        means = [f"{value:+.3f}" for value in found[:, :3].mean(axis=0)]
        error = standard_error(found[:, 1], found[:, 3])
        print(
            f"| {kind.experiments} | {kind.real} | {name} | {kind.noise} | {kind.max_pairs} | {len(found)} "
            f"({len(found) / labs:.2f}) | {means[0]} | {means[1]} | {error:.3f} | {means[2]} |",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else CLAIMS)
