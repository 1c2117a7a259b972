"""The rule of agents/screening.py over arrays, for simulated labs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from agents.prospects import pairs_needed
from agents.screening import AHEAD, PROMISING
from benchmarks.verdicts import KNOWN_PAIRS, Bools, Counts, Floats


class Screened(NamedTuple):
    """Which ideas are promising, and after how many pairs that was known. Shape (labs, ideas)."""

    promising: Bools
    pairs: Counts

    @property
    def runs(self) -> float:
        """GPU runs a lab: every treatment's, and the baselines that they share, one a seed."""
        return float((self.pairs.sum(axis=1) + self.pairs.max(axis=1)).mean())


def screen(differences: Floats, sd: Floats, least: float) -> Screened:
    """Screens by the first pair where that tells enough, and else by two.

    Args:
        differences: treatment - baseline of two seeds or more. Shape (labs, ideas, seeds).
        sd: what each lab takes for the noise. Shape (labs, 1, 1).
        least: the smallest gain, in deviations, that is worth confirming.
    """
    gain = -differences / sd
    first, both = gain[..., 0], gain[..., :2].mean(axis=-1)
    early = first >= AHEAD
    open_still = (first > 0.0) & ~early
    promising = (early & (first >= least)) | (open_still & (both > PROMISING / np.sqrt(2.0)) & (both >= least))
    return Screened(promising, np.where(open_still, 2, 1))


def least_effect(max_pairs: int) -> float:
    """The smallest gain that the judge thinks can be confirmed as the tenth hypothesis of a campaign."""
    sizes = (float(size) for size in np.arange(0.2, 6.0, 0.05))
    return next(size for size in sizes if pairs_needed(size, hypotheses=10, df=KNOWN_PAIRS - 1.0) <= max_pairs)
