"""When a screening is over: which gains go on to confirmation, which end, and which need another pair. Pure functions.

Whatever is decided here claims nothing and spends no error; the thresholds were chosen by what a true claim costs
(benchmarks/race.py).
"""

from __future__ import annotations

import math

from agents.noise import Noise
from db.records import Screening

AHEAD = 2.0
"""Deviations by which the first pair alone must be better to go on. One that is not better at all ends there, which
needs no knowledge of the noise: half of the nulls, and one in fifty of the gains of two deviations."""

PROMISING = 1.0
"""Standard errors by which the mean of several pairs must be better. Five of six nulls end here and cost no
confirmation; a gain of two noise floors passes with two pairs in about 84 of 100 cases."""

KNOWN = 8.0
"""Degrees of freedom from which the noise is known well enough to stop at one pair, of a screening or a confirmation.
Below, every experiment has two, which measure it: a second pair that was asked for because of the first does not."""


def outlook(gain: float, pairs: int, noise: Noise) -> Screening | None:
    """What a mean gain over so many pairs promises; None where one pair leaves it open, and a second is to tell."""
    if pairs > 1:
        return "promising" if gain > PROMISING * noise.sd / math.sqrt(pairs) else "not promising"

    if gain <= 0.0:
        return "not promising"

    return "promising" if noise.df >= KNOWN and gain >= AHEAD * noise.sd else None


def first_pairs(noise: Noise | None) -> int:
    """How many pairs a screening begins with, or a confirmation, given the noise of its class."""
    return 1 if noise is not None and noise.df >= KNOWN else 2
