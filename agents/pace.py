"""Whether training a treatment takes clearly longer than training its baseline, on machines that are never quiet.

Seconds are no property of a config, as FLOPs are: whatever else a machine does goes into them. Here, screenings of
nulls on two shared cores came out at .7 to 2.5 times the seconds of baselines that had been trained at another hour,
and runs of one config, minutes apart, at up to 6 times each other's. So nothing is said of a screening, which may share
such baselines, and nothing that the runs of one side could have done among themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

LEAST = 1.1
"""A smaller ratio is not worth a word, however clear it is."""


def pace(baseline: Sequence[float], treatment: Sequence[float]) -> float | None:
    """How many times as long the treatment takes, of the seconds of each side's runs; None where it is not clear.

    Clear is a ratio of medians, up or down, that exceeds the one of the slowest to the fastest run of either side.
    """
    if min(len(baseline), len(treatment)) < 2 or min(*baseline, *treatment) <= 0.0:
        return None

    ratio = median(treatment) / median(baseline)
    spread = max(max(side) / min(side) for side in (baseline, treatment))
    return ratio if max(ratio, 1.0 / ratio) > max(spread, LEAST) else None
