"""Confirmation: a promising experiment is registered as a hypothesis, and judged on new pairs alone.

Registering spends error: how much evidence a claim needs follows from the hypothesis's place among all that its
campaign has registered, and again among all of the lab's life (agents/discoveries.py). The lab draws the seeds, runs
both sides afresh at the full budget, and has them scored on the sealed test split. An experiment is registered once:
whoever queues it again continues its evidence.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from agents.class_noise import noise_here
from agents.discoveries import discoveries, level
from agents.noise import Noise
from agents.pairs import add_pairs
from agents.prospects import HOPED
from agents.screening import first_pairs
from db.experiments import get_experiment
from db.hypotheses import (
    add_hypothesis,
    extend_hypothesis,
    fix_noise,
    get_hypothesis,
    list_hypotheses,
    note_claim,
    open_hypotheses,
)
from db.lab import Lab
from db.queue import Queued
from db.records import Claim, Experiment, Hypothesis

CLAIMS: tuple[Claim, ...] = ("improved", "worse", "equivalent")
"""What can be claimed; each is a family of its own, of whose claims at most 5 % are false on average."""

_SEEDS = 2**31
_LOWEST = 1_000_000
"""Screening counts its seeds from 1; these can never be among them."""


def register(lab: Lab, experiment: Experiment) -> Hypothesis:
    """Registers a hypothesis, and queues its first pair; two while the noise is not known well.

    The noise is that of the whole budget: while all runs were shorter screenings none is known, and the pairs show it.
    """
    noise = noise_here(lab, experiment, experiment.metric)
    guard = None if experiment.guard_metric is None else noise_here(lab, experiment, experiment.guard_metric)
    hypothesis = add_hypothesis(
        lab.store,
        {
            "experiment_id": experiment.id,
            "campaign": _campaign_of(lab, experiment),
            "seeds": [],
            "max_pairs": lab.settings.max_pairs,
        },
    )
    at_first_look(lab, hypothesis, noise, guard)
    add_confirming_pairs(lab, experiment, first_pairs(noise))
    return hypothesis


def at_first_look(lab: Lab, hypothesis: Hypothesis, noise: Noise | None, guard: Noise | None) -> Hypothesis:
    """The hypothesis with the noise that it and its guard are weighed against from now on."""
    return fix_noise(lab.store, hypothesis, noise=_columns(noise), guard=_columns(guard))


def noise_known(hypothesis: Hypothesis) -> tuple[Noise | None, Noise | None]:
    """What was known of the noise of the metric, and of its guard, at the first look at the hypothesis's pairs."""
    return _noise(hypothesis.noise_sd, hypothesis.noise_df), _noise(hypothesis.guard_sd, hypothesis.guard_df)


def new_claims(lab: Lab, hypothesis: Hypothesis) -> list[Hypothesis]:
    """Notes which hypotheses may be claimed, given the evidence for all of them; those of the campaign that are new.

    Beside the one whose evidence has just grown, a claim may be one of those decided earlier: each further claim lowers
    what the others need. What is claimed over the lab's life is noted beside it.
    """
    before = {item.id for item in list_hypotheses(lab.store, hypothesis.campaign) if item.claim}
    for claim in CLAIMS:
        for item in _accepted(list_hypotheses(lab.store, hypothesis.campaign), claim):
            note_claim(lab.store, item, claim=claim)

        for item in _accepted(list_hypotheses(lab.store), claim):
            note_claim(lab.store, item, lab_claim=claim)

    return [item for item in list_hypotheses(lab.store, hypothesis.campaign) if item.claim and item.id not in before]


def needed(lab: Lab, hypothesis: Hypothesis) -> float:
    """The e-value at which the hypothesis can be claimed improved as things stand; each claim of others lowers it."""
    others = _others(lab, hypothesis)
    return 1.0 / level(_position(lab, hypothesis), sum(item.claim == "improved" for item in others))


def hoped_level(lab: Lab, hypothesis: Hypothesis) -> float:
    """The level to plan with: where some of the campaign's other open hypotheses are claimed improved as well."""
    others = _others(lab, hypothesis)
    open_still = open_hypotheses(lab.store)
    hoped = sum(1.0 if item.claim == "improved" else HOPED * (item.id in open_still) for item in others)
    return level(_position(lab, hypothesis), hoped)


def _position(lab: Lab, hypothesis: Hypothesis) -> int:
    return 1 + [item.id for item in list_hypotheses(lab.store, hypothesis.campaign)].index(hypothesis.id)


def _others(lab: Lab, hypothesis: Hypothesis) -> list[Hypothesis]:
    return [item for item in list_hypotheses(lab.store, hypothesis.campaign) if item.id != hypothesis.id]


def _accepted(registered: Sequence[Hypothesis], claim: Claim) -> list[Hypothesis]:
    accepted = discoveries([getattr(item, claim) for item in registered])
    return [item for item, is_accepted in zip(registered, accepted, strict=True) if is_accepted]


def add_confirming_pairs(lab: Lab, experiment: Experiment, count: int) -> list[Queued]:
    """Draws seeds and queues a pair for each."""
    hypothesis = get_hypothesis(lab.store, experiment.id)
    if hypothesis is None:
        raise ValueError(f"experiment {experiment.id} is no registered hypothesis")

    seeds = list(hypothesis.seeds)
    while len(seeds) < len(hypothesis.seeds) + count:
        seed = _LOWEST + secrets.randbelow(_SEEDS - _LOWEST)
        if seed not in seeds:
            seeds.append(seed)

    extend_hypothesis(lab.store, hypothesis, seeds=seeds, max_pairs=max(hypothesis.max_pairs, len(seeds)))
    return add_pairs(lab, experiment, seeds[-count:], "confirm")


def go_on(lab: Lab, experiment_id: int) -> list[Queued]:
    """Gives a registered hypothesis max_pairs more pairs, and queues the next one.

    Pairs of which a run was cancelled or has failed are taken up again: none drops out.
    """
    hypothesis = get_hypothesis(lab.store, experiment_id)
    if hypothesis is None:
        raise ValueError(f"experiment {experiment_id} is no registered hypothesis")

    most = len(hypothesis.seeds) + lab.settings.max_pairs
    extend_hypothesis(lab.store, hypothesis, seeds=hypothesis.seeds, max_pairs=most)
    experiment = get_experiment(lab.store, experiment_id)
    again = add_pairs(lab, experiment, hypothesis.seeds, "confirm")
    return again + add_confirming_pairs(lab, experiment, 1)


def _columns(noise: Noise | None) -> tuple[float, float] | None:
    return None if noise is None else (noise.sd, noise.df)


def _noise(sd: float | None, df: float | None) -> Noise | None:
    return None if sd is None or df is None else Noise(sd=sd, df=df)


def _campaign_of(lab: Lab, experiment: Experiment) -> str:
    if lab.settings.campaign != "cycle":
        return lab.settings.campaign

    return "lab" if experiment.cycle_id is None else f"cycle {experiment.cycle_id}"
