"""Makes a better experiment from one that needs work: a new row in place of its parent, reviewed on its own merits.

The assistant's revision, the language model's, or a repair that follows from the facts of the review. Where it knows
no repair it refuses and says who could.
"""

from __future__ import annotations

import json
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agents.admission import admit
from agents.briefing import baseline_line, knob_table, limits_line
from agents.facts import latest_facts
from agents.llm import ask, has_model
from agents.preflight import Base, base_of
from agents.prompts import render
from agents.proposals import Improved, Proposal
from agents.repair import repair
from agents.treatments import show
from db.errors import RefusedError
from db.experiments import get_experiment, latest_review, move_experiment
from db.lab import Lab
from db.queries import lineage
from db.records import Experiment, ExperimentStatus, Proposer, Review

_FROM: tuple[ExperimentStatus, ...] = ("needs_work",)

_INSTEAD: dict[ExperimentStatus, str] = {
    "suggested": "review it first",
    "approved": "it can be enqueued as it is",
    "superseded": "improve the experiment that replaced it",
    "rejected": "suggest a new one",
}


class Revision(BaseModel):
    """The improved experiment, whole, and what was changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    proposal: Proposal
    changes: Annotated[str, Field(min_length=3, max_length=2000, description="what was changed, and why")]


class _Draft(NamedTuple):
    proposer: Proposer
    proposal: Proposal
    changes: str


def improve(lab: Lab, experiment_id: int, *, revision: Proposal | None = None, task_id: int | None = None) -> Improved:
    """Replaces an experiment that needs work by a better one; after the last round, rejects it instead.

    Args:
        revision: the assistant's own; otherwise the model's where there is a key, otherwise a repair from the facts.

    Raises:
        NotFoundError, RefusedError: it does not need work, no repair is known, or the revision cannot be admitted.
        LLMError: the model gave no usable revision.
    """
    parent = get_experiment(lab.store, experiment_id)
    if parent.status != "needs_work":
        instead = _INSTEAD.get(parent.status, "suggest a new one")
        raise RefusedError(f"experiment {parent.id} is {parent.status}, not needs_work; {instead}")

    if parent.revision >= lab.settings.max_improvement_rounds:
        reason = f"improved {parent.revision} times already (max_improvement_rounds)"
        move_experiment(lab.store, parent.id, "rejected", allowed=_FROM, reason=reason)
        return Improved(parent_id=parent.id, experiment=None, changes=f"rejected: {reason}")

    base = base_of(lab)
    draft = _draft(lab, base, parent, revision, task_id)
    with lab.store.transaction():
        improved = admit(
            lab,
            base,
            draft.proposal,
            proposer=draft.proposer,
            parent=parent,
            cycle_id=parent.cycle_id,
            ignore=lineage(lab.store, parent.id),
        )
        reason = f"improved as experiment {improved.id}"
        move_experiment(lab.store, parent.id, "superseded", allowed=_FROM, reason=reason)

    return Improved(parent_id=parent.id, experiment=improved, changes=draft.changes)


def brief(lab: Lab, experiment_id: int) -> str:
    """What is needed to improve an experiment, and the form of the answer."""
    experiment = get_experiment(lab.store, experiment_id)
    return _brief(lab, base_of(lab), experiment, Proposal)


def _draft(lab: Lab, base: Base, parent: Experiment, revision: Proposal | None, task_id: int | None) -> _Draft:
    if revision is not None:
        return _Draft("assistant", revision, _differences(parent, revision))

    if has_model(lab):
        answer = ask(
            lab,
            agent="improver",
            prompt=_brief(lab, base, parent, Revision),
            schema=Revision,
            experiment_id=parent.id,
            task_id=task_id,
        ).value
        _differences(parent, answer.proposal)
        return _Draft("llm", answer.proposal, answer.changes)

    fixed = repair(lab, base, parent, latest_facts(lab, parent))
    if fixed is None:
        raise RefusedError(
            f"experiment {parent.id} needs work that no rule can do: {_feedback(lab, parent)}\n"
            "Give a revision of your own (a whole proposal; the brief for it lists facts, knobs and the form), or set "
            "OPENROUTER_API_KEY"
        )

    return _Draft(parent.proposer, fixed.proposal, fixed.changes)


def _differences(parent: Experiment, revision: Proposal) -> str:
    found = []
    if dict(revision.treatment) != parent.treatment:
        found.append(
            "treatment now " + ", ".join(f"{name}={show(value)}" for name, value in revision.treatment.items())
        )

    for name in ("title", "hypothesis", "method", "domain", "focus_area", "source"):
        if getattr(revision, name) != getattr(parent, name):
            found.append(f"{name} rewritten")

    if not found:
        raise RefusedError(f"the revision of experiment {parent.id} changes nothing")

    return "; ".join(found)


def _feedback(lab: Lab, experiment: Experiment) -> str:
    review = latest_review(lab.store, experiment.id)
    return review.feedback if review else "it has no review"


def _brief(lab: Lab, base: Base, experiment: Experiment, schema: type[BaseModel]) -> str:
    review = latest_review(lab.store, experiment.id)
    return render(
        "improve",
        {
            "feedback": review.feedback if review else "(none)",
            "method": experiment.method or "(none given)",
            "facts": latest_facts(lab, experiment).model_dump_json(exclude_none=True),
        },
        title=experiment.title,
        hypothesis=experiment.hypothesis,
        domain=experiment.domain,
        treatment=json.dumps(experiment.treatment),
        metric=f"{experiment.metric} ({experiment.direction} is better)",
        review=_scores(review) if review else "(none)",
        baseline=baseline_line(base),
        preset=base.preset,
        limits=limits_line(lab),
        knobs=knob_table(lab, base, experiment.domain),
        task=(
            "Its method does not work: rewrite it."
            if review and review.decision == "rewrite"
            else "Its idea is sound: refine it."
        ),
        schema=json.dumps(schema.model_json_schema()),
    )


def _scores(review: Review) -> str:
    names = ("novelty", "feasibility", "impact", "clarity", "efficiency")
    return ", ".join(f"{name} {getattr(review, name):.1f}" for name in names) + f"; in all {review.score:.1f}"
