"""What a confirmation takes: pairs and time for gains of a given size, as quoted before anything runs."""

from __future__ import annotations

import math

from agents.class_noise import noise_here
from agents.noise import Noise
from agents.pairs import configs_of
from agents.preflight import preflight
from agents.prospects import pairs_needed
from db.hypotheses import list_hypotheses
from db.lab import Lab
from db.records import Experiment
from db.runners import list_runners

FLOORS = (4, 2, 1)
"""Sizes of gain that are quoted, in noise floors: standard deviations of one run over seeds."""


def what_it_takes(lab: Lab, experiment: Experiment, seconds: float | None) -> str:
    """A sentence such as "a gain of 4 noise floors needs about 3 pairs (2 min), ...".

    Args:
        seconds: what one run takes, as far as is known.
    """
    noise = noise_here(lab, experiment, experiment.metric)
    parts = []
    for floors in FLOORS:
        count = pairs_for(lab, floors / math.sqrt(2.0), noise)
        time = "" if seconds is None else f" ({minutes(2 * count * seconds)})"
        parts.append(f"{floors} noise floor{'s' * (floors > 1)} about {count} pairs{time}")

    floor = "not measured yet" if noise is None else f"{noise.sd / math.sqrt(2.0):.2g} {experiment.metric}"
    return f"a gain of {', of '.join(parts)}; the noise floor here is {floor}"


def quote(lab: Lab, experiment: Experiment, count: int) -> str:
    """What so many pairs take, such as "about 12 pairs, 40 min"."""
    runner = next((item for item in list_runners(lab.store) if item.hardware_class == experiment.hardware_class), None)
    seconds = preflight(lab, configs_of(experiment)[1], runner).seconds
    return f"about {count} pairs" + ("" if seconds is None else f", {minutes(2 * count * seconds)}")


def noise_ahead(lab: Lab, experiment: Experiment, screened: Noise) -> Noise:
    """The noise to plan a confirmation with: that of the whole budget, or where that is not known yet, a guess.

    Args:
        screened: the noise of the screening, which may have been shorter.
    """
    if experiment.share_in("screen") == 1.0:
        return screened

    return noise_here(lab, experiment, experiment.metric) or Noise(sd=screened.sd, df=0.0)


def pairs_for(lab: Lab, effect: float, noise: Noise | None) -> int:
    """Pairs until a hypothesis registered now is claimed, in the median; the effect in deviations of a pair."""
    return pairs_needed(effect, hypotheses=len(list_hypotheses(lab.store)) + 1, df=0.0 if noise is None else noise.df)


def minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"

    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
