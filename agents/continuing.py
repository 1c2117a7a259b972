"""A retry continues its evidence, never restarts it: when an experiment can go on here, and when it may be asked anew.

Evidence is added up only where one version of moe/ and one kind of hardware made all of it. Had a lab that has changed
its pairs trained again, a result that was seen would be thrown away for a new draw. So a hypothesis goes on where its
evidence was made, or is asked anew and registered anew: that costs a position among all that is registered, and what
was found before stays in the lab.
"""

from __future__ import annotations

from db.comparisons import origins
from db.hypotheses import get_hypothesis
from db.store import Store
from moe.fingerprint import code_hash


def evidence_elsewhere(store: Store, experiment_id: int, hardware_class: str | None) -> str | None:
    """What made confirming evidence of an experiment, where it is not what would make more; None where it is.

    Args:
        hardware_class: of the runner that would make more; None where none is known.
    """
    code = code_hash()
    for made in origins(store, experiment_id, "confirm"):
        if made.code != code:
            return _elsewhere(f"version {made.code[:12]} of moe/, and here it is {code[:12]}")

        if hardware_class not in (None, made.hardware_class):
            return _elsewhere(f"{made.hardware_class}, and here runs go to {hardware_class}")

    return None


def can_go_on(store: Store, experiment_id: int, hardware_class: str | None) -> bool:
    """Whether a failed or cancelled experiment still is what its question belongs to: it was registered, and its
    evidence can grow here.
    """
    return (
        get_hypothesis(store, experiment_id) is not None
        and evidence_elsewhere(store, experiment_id, hardware_class) is None
    )


def was_answered_elsewhere(store: Store, experiment_id: int, hardware_class: str | None) -> bool:
    """Whether it has results, all of them of another version of moe/ or of other hardware."""
    made = origins(store, experiment_id)
    here = code_hash()
    return bool(made) and not any(item.code == here and hardware_class in (None, item.hardware_class) for item in made)


def _elsewhere(what: str) -> str:
    return (
        f"its evidence was made with {what}; it goes on where that is so again, or is proposed once more, as a "
        "hypothesis of its own"
    )
