"""Whether training a treatment takes clearly longer than training its baseline, on machines that are never quiet.

Seconds are no property of a config, as FLOPs are: whatever else a machine does goes into them. On two shared cores runs
of one config, minutes apart, took up to 6 times each other's time, and screenings of nulls .7 to 2.5 times that of
baselines which had been trained at another hour. So nothing is said of a screening, which may share such baselines, and
otherwise the pairs are compared, whose runs follow each other. Of 27 confirmations on those cores two were told apart,
a slower optimizer and twice as many steps, and none of the nulls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from agents.student import quantile

LEAST = 1.1
"""A smaller ratio is not worth a word, however clear it is."""

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How many times as long a treatment trains, with Student's interval over the pairs' logarithms."""

    ratio: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether it surely takes LEAST times as long, or its baseline does."""
        return self.low > LEAST or self.high < 1.0 / LEAST


def pace(pairs: Sequence[tuple[float, float]]) -> Pace | None:
    """The ratio of the seconds of each pair, baseline and treatment; None of less than two."""
    logs = [math.log(treatment / baseline) for baseline, treatment in pairs if min(baseline, treatment) > 0.0]
    if len(logs) < 2:
        return None

    mean, half = fmean(logs), stdev(logs) / math.sqrt(len(logs)) * quantile(len(logs) - 1, (1.0 + _CONFIDENCE) / 2.0)
    return Pace(ratio=math.exp(mean), low=math.exp(max(mean - half, -700.0)), high=math.exp(min(mean + half, 700.0)))
