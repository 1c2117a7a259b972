"""How much one pair's difference varies when nothing is different: measured over the class, never assumed.

A class is model size, text, budget, evaluation, hardware and metric (db/comparisons.py); screenings on a part of the
budget are classes of their own. What it knows comes from all pairs of it. Those of a screening share baselines, so
their differences are not independent; _of_screening takes them apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from agents.noise import Noise, pool
from agents.pairs import trains_nothing
from db.comparisons import ScoredPair, scored_pairs
from db.lab import Lab
from db.records import Experiment, Stage

Scores = dict[int, float]
"""Of one config, by seed."""


def noise_here(lab: Lab, experiment: Experiment, metric: str, stage: Stage = "confirm") -> Noise | None:
    """How much a pair's difference of a stage varies in the experiment's class, its own confirmation left out.

    None for a confirmation while all that is known is the noise of shorter screenings: that is another one.
    """
    share = experiment.share_in(stage)
    found = scored_pairs(lab.store, experiment, metric, same_checkpoint=trains_nothing(experiment), share=share)
    return noise_of(found, apart_from=experiment.id)


def noise_of(pairs: Sequence[ScoredPair], *, apart_from: int | None = None) -> Noise | None:
    """The standard deviation of a pair's difference, and the degrees of freedom that it is known from.

    Args:
        pairs: all of the class.
        apart_from: an experiment whose confirmation is weighed against this noise and so must not be part of it.

    None before any config of the class was trained with two seeds on both sides. Screenings that got their second pair
    because of the first are left out: treatments picked for a good first run differ too little in it, by about a third
    of the variance.
    """
    groups = [*_of_screening(pair for pair in pairs if pair.stage == "screen" and not pair.extended)]
    confirmed: dict[int, list[float]] = defaultdict(list)
    for pair in pairs:
        if pair.stage == "confirm" and pair.experiment_id != apart_from:
            confirmed[pair.experiment_id].append(pair.treatment - pair.baseline)

    groups += confirmed.values()
    return pool([group for group in groups if len(group) >= 2])


def _of_screening(pairs: Iterable[ScoredPair]) -> Iterable[list[float]]:
    """Independent differences, each with the variance of a pair's, out of pairs that share baselines.

    With the scores of the arms y_0 (the baseline), y_1, ... of equal seeds, y_j less the mean of those before it is
    uncorrelated with every other such contrast (Helmert's), and its variance is (1 + 1/j) of a run's.
    """
    blocks: dict[str, dict[str, Scores]] = defaultdict(dict)
    for pair in pairs:
        arms = blocks[pair.baseline_fingerprint]
        arms.setdefault(pair.baseline_fingerprint, {})[pair.seed] = pair.baseline
        arms.setdefault(pair.treatment_fingerprint, {})[pair.seed] = pair.treatment

    for arms in blocks.values():
        scores = list(arms.values())
        for place, arm in enumerate(scores[1:], start=1):
            before = [earlier for earlier in scores[:place] if arm.keys() <= earlier.keys()]
            scale = math.sqrt(2.0 / (1.0 + 1.0 / len(before)))
            yield [scale * (value - fmean(item[seed] for item in before)) for seed, value in sorted(arm.items())]
