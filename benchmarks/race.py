"""GPU runs for one true claim: screening and confirmation by e-values, against the usual ways of telling a gain.

    .venv/bin/python -m benchmarks.race [LABS]

LABS (200) labs try 100 ideas each, 20 of which lower the metric, with the noise of benchmarks/verdicts.py. Everyone
knows the noise from the same 10 earlier pairs, and pays for every run: rivals share one baseline run a seed among
all ideas; ours screens so too, as agents/judge.py does on one seed or two, and then confirms with fresh runs on both
sides, up to 24 pairs. Each way is shown at its nominal level, and at the one at which 5 % of its claims are false in
fact, which only somebody who knows the truth can choose.

Then the trap: three baseline runs shared among 60 ideas that do nothing; and what several procedures make of the same
e-values.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr

from agents.discoveries import ALPHA
from agents.evidence import SPREADS
from agents.screening import PROMISING
from benchmarks._screening import Screened, least_effect, screen
from benchmarks.verdicts import (
    HYPOTHESES,
    KNOWN_PAIRS,
    SHARES,
    Bools,
    Floats,
    Spreads,
    claims,
    draw_differences,
    known_noise,
    log_e,
    log_e_ahead,
    mixed_effects,
    online_e_bh,
    paths,
    residuals,
)

LABS, SEEDS, MAX_PAIRS = 200, 5, 24

EFFECTS: dict[str, tuple[float, ...]] = {
    "0.5": (0.5,),
    "1": (1.0,),
    "2": (2.0,),
    "4": (4.0,),
    "mixed": (0.5, 1.0, 2.0, 4.0),
}


class Outcome(NamedTuple):
    """Over labs: false share of claims, true claims a lab, runs a lab."""

    false_share: float
    true_claims: float
    runs: float

    @property
    def runs_per_claim(self) -> float:
        return self.runs / self.true_claims if self.true_claims else float("inf")


class Labs(NamedTuple):
    """Simulated labs. Shapes: real (labs, ideas), baseline (labs, 1, seeds), treatment (labs, ideas, seeds)."""

    real: Bools
    sd: Floats
    baseline: Floats
    treatment: Floats
    confirmation: Floats


def make_labs(draw: np.random.Generator, noise: Floats, sizes: Sequence[float], labs: int) -> Labs:
    """Labs whose real effects are drawn from `sizes`."""
    effects = mixed_effects(draw, sizes, labs)
    return Labs(
        real=effects < 0,
        sd=known_noise(draw, noise, labs),
        baseline=draw.choice(noise, (labs, 1, SEEDS)),
        treatment=effects[..., None] + draw.choice(noise, (labs, HYPOTHESES, SEEDS)),
        confirmation=draw_differences(draw, noise, effects, MAX_PAIRS),
    )


def outcome(labs: Labs, claimed: Bools, runs: float) -> Outcome:
    true = (claimed & labs.real).sum(axis=1)
    false = (claimed & ~labs.real).sum(axis=1)
    return Outcome(float((false / np.maximum(true + false, 1)).mean()), float(true.mean()), runs)


def benjamini_hochberg(p: Floats, alpha: float) -> Bools:
    """Benjamini and Hochberg (1995), a lab a row."""
    counts = np.arange(1, p.shape[1] + 1)
    below = np.sort(p, axis=1) <= alpha * counts / p.shape[1]
    most = np.where(below, counts, 0).max(axis=1)
    return np.asarray((p <= alpha * most[:, None] / p.shape[1]) & (most[:, None] > 0))


def t_test(labs: Labs, seeds: int) -> Floats:
    """One-sided p-values of the mean over the first seeds, with the lab's pooled deviation."""
    mean = (labs.treatment - labs.baseline)[..., :seeds].mean(axis=-1)
    return np.asarray(stdtr(KNOWN_PAIRS - 1.0, mean / labs.sd[..., 0] * np.sqrt(seeds)))


def permutation_test(labs: Labs) -> Floats:
    """One-sided p-values of the difference of means, over all 252 ways to deal ten runs into two fives."""
    both = np.concatenate([np.broadcast_to(labs.baseline, labs.treatment.shape), labs.treatment], axis=-1)
    deals = np.zeros((252, 2 * SEEDS))
    for row, chosen in enumerate(itertools.combinations(range(2 * SEEDS), SEEDS)):
        deals[row, list(chosen)] = 1.0

    sums = both @ deals.T
    return np.asarray((sums <= labs.treatment.sum(axis=-1, keepdims=True) + 1e-12).mean(axis=-1))


class Confirmation:
    """Ours: what looks promising on shared baselines is registered, and confirmed on fresh pairs by e-values.

    Promising is also so much better that a gain of that size can be confirmed within MAX_PAIRS.
    """

    def __init__(self, labs: Labs, screened: Screened, spreads: Spreads = SPREADS) -> None:
        self.labs, self.screened = labs, screened
        self.order = np.argsort(~screened.promising, axis=1, kind="stable")
        self.registered = np.take_along_axis(screened.promising, self.order, 1)
        most = int(self.registered.sum(axis=1).max())
        self.order, self.registered = self.order[:, :most], self.registered[:, :most]
        its = paths(np.take_along_axis(labs.confirmation, self.order[..., None], 1), labs.sd, KNOWN_PAIRS - 1.0)
        nothing = np.where(self.registered[..., None], 0.0, -np.inf)
        self.log_e = log_e(its, "lower", spreads) + nothing
        self.ahead = log_e_ahead(its, MAX_PAIRS, spreads) + nothing
        self.shares = SHARES[:most]

    def at(self, alpha: float) -> Outcome:
        found, stopped = claims(self.log_e, self.ahead, self.shares, alpha)
        claimed = np.zeros(self.labs.real.shape, dtype=bool)
        np.put_along_axis(claimed, self.order, found, 1)
        pairs = (stopped * self.registered).sum(axis=1).mean()
        return outcome(self.labs, claimed, self.screened.runs + 2.0 * float(pairs))


def screened_on(labs: Labs, seeds: int, errors: float) -> Screened:
    """Everything screened on so many seeds, and promising that is better by so many standard errors."""
    mean = (labs.treatment - labs.baseline)[..., :seeds].mean(axis=-1) / labs.sd[..., 0]
    promising = (mean < -errors / np.sqrt(seeds)) & (mean <= -least_effect(MAX_PAIRS))
    return Screened(promising, np.full(mean.shape, seeds))


def main(count: int) -> None:
    """Prints the tables."""
    draw = np.random.default_rng(20261124)
    noise = residuals("nano")
    print("| effect | way | nominal: false (%) | true claims | runs a true claim | at 5 % false: true claims | runs |")
    print("|---|---|---|---|---|---|---|")
    for name, sizes in EFFECTS.items():
        labs = make_labs(draw, noise, sizes, count)
        for way, (nominal, at) in _ways(labs).items():
            plain, fair = at(nominal), _at_five_percent(at)
            cells = f"{plain.false_share:.1%} | {plain.true_claims:.1f} | {plain.runs_per_claim:,.1f}"
            rest = f"{fair.true_claims:.1f} | {fair.runs_per_claim:,.1f}" if fair else "- | -"
            print(f"| {name} | {way} | {cells} | {rest} |", flush=True)

    _trap(draw, noise, count)
    _procedures(draw, noise, count)


def _ways(labs: Labs) -> dict[str, tuple[float, Callable[[float], Outcome]]]:
    """Every way with its nominal level, and what comes of it at any."""
    one, three, five, permuted = t_test(labs, 1), t_test(labs, 3), t_test(labs, 5), permutation_test(labs)
    ours = screen(labs.treatment - labs.baseline, labs.sd, least_effect(MAX_PAIRS))

    def by_hochberg(p: Floats, seeds: int) -> Callable[[float], Outcome]:
        runs = float(seeds * (HYPOTHESES + 1))
        return lambda alpha: outcome(labs, benjamini_hochberg(p, alpha), runs)

    def kept(alpha: float) -> Outcome:
        return outcome(labs, one <= alpha, HYPOTHESES + 1.0)

    return {
        "keep if better, 1 seed": (0.5, kept),
        "3 seeds, t-test, BH": (ALPHA, by_hochberg(three, 3)),
        "5 seeds, t-test, BH": (ALPHA, by_hochberg(five, 5)),
        "5 seeds, permutation, BH": (ALPHA, by_hochberg(permuted, 5)),
        "screen on 1 or 2 seeds, confirm by e-values": (ALPHA, Confirmation(labs, ours).at),
        "the same, screened on 2": (ALPHA, Confirmation(labs, screened_on(labs, 2, PROMISING)).at),
        "the same, screened on 1": (ALPHA, Confirmation(labs, screened_on(labs, 1, 1.5)).at),
        "ours, trusting that all scatter alike": (ALPHA, Confirmation(labs, ours, ((1.0, 1.0),)).at),
    }


def _at_five_percent(at: Callable[[float], Outcome]) -> Outcome | None:
    """The outcome at the largest level, of a grid, at which at most 5 % of the claims are false."""
    found = [outcome for level in np.geomspace(1e-4, 30.0, 120) if (outcome := at(float(level))).false_share <= ALPHA]
    return found[-1] if found and found[-1].true_claims else None


def _trap(draw: np.random.Generator, noise: Floats, count: int) -> None:
    """60 nulls that share three baseline runs, against 60 nulls confirmed on fresh pairs."""
    labs, ideas = 10 * count, 60
    sd = known_noise(draw, noise, labs)
    baseline, treatment = draw.choice(noise, (labs, 1, 3)), draw.choice(noise, (labs, ideas, 3))
    t = (treatment - baseline).mean(axis=-1) / sd[..., 0] * np.sqrt(3.0)
    fresh = paths(draw_differences(draw, noise, np.zeros((count, ideas)), MAX_PAIRS), sd[:count], KNOWN_PAIRS - 1.0)
    ours, _ = claims(log_e(fresh), np.full((count, ideas, MAX_PAIRS), np.inf), SHARES[:ideas], ALPHA)
    print("\n60 ideas that do nothing | labs with a claim (%) | false claims in such a lab: mean | 90 % | most")
    for name, claimed in (
        ("3 shared baseline runs, BH", benjamini_hochberg(np.asarray(stdtr(KNOWN_PAIRS - 1.0, t)), ALPHA)),
        ("fresh pairs, e-values", ours),
    ):
        number = claimed.sum(axis=1)
        bad = number[number > 0]
        worst = f"{bad.mean():.1f} | {np.quantile(bad, 0.9):.0f} | {bad.max()}" if bad.size else "- | - | -"
        print(f"{name} | {np.mean(number > 0):.1%} | {worst}")


def _procedures(draw: np.random.Generator, noise: Floats, count: int) -> None:
    """True claims from the same e-values, after six pairs of each of 30 hypotheses, ten of which are real."""
    print("\ntrue claims of 10 among 30 | effect 1: false (%) | effect 2: false (%)\n|---|---|---|")
    procedures: dict[str, Callable[[Floats], Bools]] = {
        "e-LOND (decides at once)": e_lond,
        "online e-BH": lambda log_evidences: online_e_bh(log_evidences, SHARES[:30], ALPHA),
        "e-BH, told of the 30": lambda log_evidences: online_e_bh(log_evidences, np.full(30, 1.0 / 30.0), ALPHA),
        "closed e-BH, told of the 30": closed_e_bh,
    }
    rows: dict[str, list[str]] = {name: [] for name in procedures}
    for effect in (1.0, 2.0):
        effects = np.where(np.argsort(draw.random((count, 30)), axis=1) < 10, -effect, 0.0)
        its = paths(draw_differences(draw, noise, effects, 6), known_noise(draw, noise, count), KNOWN_PAIRS - 1.0)
        log_evidences = log_e(its)[..., -1]
        for name, procedure in procedures.items():
            claimed = procedure(log_evidences)
            true, false = (claimed & (effects < 0)).sum(axis=1), (claimed & (effects == 0)).sum(axis=1)
            rows[name].append(f"{true.mean():.2f}: {(false / np.maximum(true + false, 1)).mean():.2%}")

    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def e_lond(log_evidences: Floats) -> Bools:
    """Xu and Ramdas (2024): every hypothesis is decided in its turn, given the claims before it."""
    claimed = np.zeros(log_evidences.shape, dtype=bool)
    for position in range(log_evidences.shape[1]):
        level = ALPHA * SHARES[position] * (claimed.sum(axis=1) + 1)
        claimed[:, position] = log_evidences[:, position] >= -np.log(level)

    return claimed


def closed_e_bh(log_evidences: Floats) -> Bools:
    """Xu, Solari, Fischer, de Heide, Ramdas and Goeman (2025), with mean e-values.

    The largest set R of the highest e-values such that every set A of hypotheses has a mean of at least
    |A and R| / (alpha |R|); it is enough to look at the lowest ones within R and the lowest ones outside.
    """
    claimed = np.zeros(log_evidences.shape, dtype=bool)
    order = np.argsort(-log_evidences, axis=1)
    for lab, e in enumerate(np.exp(np.take_along_axis(log_evidences, order, 1))):
        for size in range(len(e), 0, -1):
            inside, outside = np.cumsum(e[:size][::-1]), np.concatenate([[0.0], np.cumsum(e[size:][::-1])])
            k, j = np.arange(1, size + 1)[:, None], np.arange(len(outside))[None, :]
            if np.all(inside[:, None] + outside >= (k + j) * k / (ALPHA * size)):
                claimed[lab, order[lab, :size]] = True
                break

    return claimed


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else LABS)
