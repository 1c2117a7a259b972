"""How large effects are in a class, and what to expect of one that was observed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from agents.class_noise import noise_of
from agents.pairs import trains_nothing
from agents.shrinkage import shrunk
from db.comparisons import ScoredPair, scored_pairs
from db.lab import Lab
from db.records import Experiment


def expected_effect(lab: Lab, experiment: Experiment, observed: float, pairs: int) -> float:
    """The true effect to expect: the one of all pairs so far, drawn toward what effects have been in this class.

    The noise is the one known by now, with the experiment's own pairs: the one that evidence is weighed against was
    fixed when less was known, and claims come sooner where it was taken for too small.

    Args:
        observed: the mean difference, which is the answer where no noise is known, or none there is.
        pairs: from which it is.
    """
    found = scored_pairs(lab.store, experiment, experiment.metric, same_checkpoint=trains_nothing(experiment))
    noise = noise_of(found)
    if noise is None or noise.sd <= 0.0:
        return observed

    effects = {key: (fmean(values), len(values)) for key, values in effects_of(found).items()}
    effect, n = effects.pop(experiment.id, (observed, pairs))
    return shrunk(effect, n, noise, list(effects.values()))


def effects_of(pairs: Sequence[ScoredPair]) -> dict[int, list[float]]:
    """The differences of each experiment, screening and confirmation together: how large effects are here.

    Together they need no correction for which experiments were picked for confirmation (docs/evidence.md).
    """
    effects: dict[int, list[float]] = defaultdict(list)
    for pair in pairs:
        effects[pair.experiment_id].append(pair.treatment - pair.baseline)

    return effects
