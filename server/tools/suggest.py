"""suggest: new experiments, from the lab's proposers or from the caller."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from agents.llm import has_model
from agents.planner import Plan, Plans
from agents.proposals import Proposal, Refusal, Reviewed, Suggested
from agents.suggester import brief
from db.errors import RefusedError
from db.experiments import get_experiment
from db.formats import cut
from db.lab import Lab
from server.calls import PATIENCE_SECONDS, Asking, IdempotencyKey
from server.views import (
    ReviewView,
    StillWorking,
    SuggestedLine,
    View,
    review_view,
    still_working,
    suggested_line,
)


class Suggestion(View):
    """New experiments, and what became of them."""

    experiments: list[SuggestedLine]
    refused: list[Refusal]
    """proposals that did not become experiments: duplicates, knobs that do not exist, values out of bounds"""
    reviews: list[ReviewView]
    """with add_to_queue: how each was judged"""
    plans: list[Plan]
    """with add_to_queue: the runs queued for those approved"""
    brief: str | None
    """what to know for proposing experiments of your own: knobs with bounds, baseline, what was tried and learnt"""
    working: StillWorking | None = None
    next: str


def suggest(
    lab: Lab,
    *,
    count: Annotated[int, Field(ge=1, le=50, description="how many ideas")] = 3,
    domain: Annotated[
        str | None,
        Field(max_length=60, description="moe_architecture, optimization, evaluation, efficiency, or one of your own"),
    ] = None,
    focus_area: Annotated[str | None, Field(max_length=120, description="part of the domain, in a few words")] = None,
    proposer: Annotated[
        Literal["auto", "llm", "optimizer", "catalog"],
        Field(description="who has the ideas; auto: a language model where the lab has a key, else the other two"),
    ] = "auto",
    proposals: Annotated[
        list[Proposal] | None,
        Field(min_length=1, max_length=10, description="your own ideas; count and proposer are then of no account"),
    ] = None,
    add_to_queue: Annotated[
        bool, Field(description="also review them, and queue the runs of those that are approved")
    ] = False,
    idempotency_key: IdempotencyKey = None,
    patience: float = PATIENCE_SECONDS,
) -> Suggestion:
    """Brings new experiments into the lab: each a hypothesis and a treatment to compare with the baseline.

    Use it to begin. Give `proposals` to test ideas of your own or of the person you work for: they are checked
    against the knobs, their bounds and everything tried before, and each becomes an experiment or is refused with the
    reason. Without, the lab proposes: from a catalog of the literature, an optimizer over past results, or a language
    model. Comes back with experiments (status suggested) and, where the lab has no model, a `brief` for proposing
    better ones yourself. Then `review` them; or set add_to_queue to have that done in the same call.
    """
    asking = Asking(lab, idempotency_key, patience)
    task = asking.ask(
        "suggest",
        {
            "count": count,
            "domain": domain,
            "focus_area": focus_area,
            "proposer": proposer,
            "proposals": [proposal.model_dump(mode="json") for proposal in proposals or ()],
        },
    )
    if (working := still_working(task)) is not None:
        return _suggestion(lab, Suggested(experiments=[], refused=[]), working=working)

    made = Suggested.model_validate(task.result)
    own = bool(proposals) or has_model(lab)
    advice = None if own else cut(brief(lab, domain, focus_area), 12_000)
    if not add_to_queue or not made.experiments:
        return _suggestion(lab, made, advice=advice)

    return _queued(lab, asking, made, advice)


def _queued(lab: Lab, asking: Asking, made: Suggested, advice: str | None) -> Suggestion:
    ids = [experiment.id for experiment in made.experiments]
    task = asking.ask("review", {"experiment_ids": ids, "limit": None, "given": None}, step="review")
    if (working := still_working(task)) is not None:
        return _suggestion(lab, made, advice=advice, working=working)

    reviewed = Reviewed.model_validate(task.result)
    approved = [review.experiment_id for review in reviewed.reviews if review.decision == "approve"]
    plans: list[Plan] = []
    refused: list[Refusal] = []
    for key in approved:  # one by one: what does not fit the card shall not hold back the others
        try:
            task = asking.ask("enqueue", {"experiment_ids": [key], "seeds": None, "priority": 0}, step=f"enqueue-{key}")
            plans += Plans.model_validate(task.result).plans
        except RefusedError as error:
            title = get_experiment(lab.store, key).title
            refused.append(Refusal(title=title, reason=f"approved, but not queued: {error}"))

    made = made.model_copy(update={"refused": [*made.refused, *refused]})
    return _suggestion(lab, made, advice=advice, reviewed=reviewed, plans=plans)


def _suggestion(
    lab: Lab,
    made: Suggested,
    *,
    advice: str | None = None,
    reviewed: Reviewed | None = None,
    plans: list[Plan] | None = None,
    working: StillWorking | None = None,
) -> Suggestion:
    current = [get_experiment(lab.store, experiment.id) for experiment in made.experiments]
    return Suggestion(
        experiments=[suggested_line(lab, experiment) for experiment in current],
        refused=[_briefly(refusal) for refusal in made.refused[:20]],
        reviews=[
            review_view(get_experiment(lab.store, review.experiment_id), review)
            for review in (reviewed.reviews if reviewed else ())
        ],
        plans=plans or [],
        brief=advice,
        working=working,
        next=_next(current, plans, working, made.refused),
    )


def _briefly(refusal: Refusal) -> Refusal:
    return refusal.model_copy(update={"title": cut(refusal.title, 120), "reason": cut(refusal.reason, 2000)})


def _next(current: list[Any], plans: list[Plan] | None, working: StillWorking | None, refused: list[Refusal]) -> str:
    if working:
        return (
            f"an agent is still answering: status(task_id={working.task_id}, wait_seconds=20), "
            "or repeat this call with the same idempotency_key"
        )

    wanting = any(experiment.status == "needs_work" for experiment in current)
    if plans:
        return "run() starts the runner" + ("; improve() those that need work" if wanting else "")

    if not current:
        return "change the refused proposals and suggest again" if refused else "suggest proposals of your own"

    waiting = [experiment.id for experiment in current if experiment.status == "suggested"]
    if waiting:
        return f"review(experiment_id={waiting[0]}), or review() for all that wait"

    return "improve() those that need work"
