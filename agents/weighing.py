"""The numbers of one look at a metric's pairs: effect, interval, and an e-value for each word that may be claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from agents.confirmation import CLAIMS
from agents.evidence import equivalence, evidence, interval
from agents.noise import Noise
from agents.student import quantile
from db.records import Claim, Direction

ALPHA = 0.05
"""Chance that an interval misses its effect: a new pair's over all looks, a screening's at its one."""

LARGEST = 1e300  # SQLite's numbers end soon after

LEAST_PAIRS = 2
"""New pairs that a claim rests on at least. One shows nothing of how much a treatment scatters by itself, so what it
comes to counts against a claim but not for one: the e-value is at most 1 until then, which keeps it one."""


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """The mean difference treatment - baseline, and its interval."""

    effect: float
    low: float
    high: float


def glance(differences: Sequence[float], noise: Noise) -> Weighed:
    """What a screening's differences say: Student's interval for a single look, which is all that ranking needs."""
    effect = fmean(differences)
    half = quantile(noise.df, 1.0 - ALPHA / 2.0) * noise.sd / math.sqrt(len(differences))
    return Weighed(effect=effect, low=effect - half, high=effect + half)


def weigh(differences: Sequence[float], noise: Noise | None) -> Weighed | None:
    """What new differences say, however often one looks; None while they are too few to say anything."""
    if not differences or (len(differences) < 2 and noise is None):
        return None

    low, high = interval(differences, noise, alpha=ALPHA)
    return Weighed(effect=fmean(differences), low=low, high=high)


def floor_of(noise: Noise | None) -> float:
    """The noise floor: the standard deviation of single runs over seeds."""
    return 0.0 if noise is None else noise.sd / math.sqrt(2.0)


def e_values(
    differences: Sequence[float], noise: Noise | None, better: Direction, *, guarded: bool, lost: bool
) -> dict[Claim, float]:
    """How much evidence there is for each claim, at most LARGEST.

    Args:
        guarded: whether a guard metric is surely within its margin; otherwise nothing is improved.
        lost: whether pairs count at a bound because their treatment has no score; then nothing is equivalent.
    """
    floor = floor_of(noise)
    if noise is not None and floor == 0.0 and len(set(differences)) == 1:
        values = _counted(differences[0], better)
    else:
        values = {
            "improved": evidence(differences, noise, better=better),
            "worse": evidence(differences, noise, better="higher" if better == "lower" else "lower"),
            "equivalent": equivalence(differences, noise, margin=floor) if floor > 0.0 else 0.0,
        }

    if not guarded:
        values["improved"] = 0.0

    if lost:
        values["equivalent"] = 0.0

    most = LARGEST if len(differences) >= LEAST_PAIRS else 1.0
    return {claim: min(value, most) for claim, value in values.items()}


def _counted(difference: float, better: Direction) -> dict[Claim, float]:
    """A metric that is counted, such as bytes, is the same on every seed: there is nothing to doubt."""
    gain = -difference if better == "lower" else difference
    claim: Claim = "improved" if gain > 0.0 else "worse" if gain < 0.0 else "equivalent"
    return {name: LARGEST if name == claim else 0.0 for name in CLAIMS}
