"""Screening on a rung: complete trainings on a part of the budget, to rank more ideas in the same time.

What ranks first after a short training need not after a long one, so a rung claims nothing, its effects are never taken
for those of the whole budget, and how well it foretells them is measured (docs/evidence.md, the report of a lab).
"""

from __future__ import annotations

from dataclasses import dataclass

from agents.pairs import configs_of
from db.errors import RefusedError
from db.formats import part
from db.lab import Lab
from db.records import Experiment
from moe.post.stages import needs_post


@dataclass(frozen=True, kw_only=True)
class Rung:
    """The part of the budget that an experiment is screened at; `note` says why it is not what the setting asks for."""

    share: float
    note: str | None = None


def rung_for(lab: Lab, experiment: Experiment) -> Rung:
    """Where an experiment is screened: where it was begun, or else where `screen_share` says, if that is possible."""
    share = lab.settings.screen_share
    if experiment.screen_share is not None:
        known = experiment.screen_share
        return Rung(share=known, note=None if known == share else f"its screening began at {_of_budget(known)}")

    if share == 1.0:
        return Rung(share=share)

    if needs_post(experiment.metric, *configs_of(experiment)):
        why = "what is done to trained weights is measured on models that are trained through"
        return Rung(share=1.0, note=f"screened at the whole budget: {why}")

    try:
        configs_of(experiment.model_copy(update={"screen_share": share}), "screen")
    except RefusedError as error:
        return Rung(share=1.0, note=f"screened at the whole budget, {_of_budget(share)} is too little: {error}")

    return Rung(share=share)


def rung_notes(experiment: Experiment, rung: Rung, pairs: int) -> list[str]:
    """What is to be said of it before anything runs; nothing where screening trains for the whole budget as usual."""
    notes = [] if rung.note is None else [rung.note]
    if rung.share < 1.0:
        config, _ = configs_of(experiment, "screen")
        size = f"{config.budget_tokens:,} tokens" if config.budget_tokens else f"{config.budget_seconds:g} s"
        noun = "pair" if pairs == 1 else "pairs"
        notes.append(f"screened on {pairs} {noun} at {_of_budget(rung.share)} ({size} a run): that ranks, no more")

    return notes


def _of_budget(share: float) -> str:
    return "the whole budget" if share == 1.0 else f"{part(share)} of the budget"
