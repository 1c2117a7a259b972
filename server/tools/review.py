"""review: scores on the five criteria, which approve an experiment or send it back."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agents.proposals import GivenReview, Reviewed
from agents.reviewer import brief
from db.errors import RefusedError
from db.experiments import get_experiment
from db.formats import cut
from db.lab import Lab
from server.calls import PATIENCE_SECONDS, Asking, IdempotencyKey
from server.views import ReviewView, StillWorking, View, review_view, still_working


class Reviews(View):
    """The reviews written by this call."""

    reviews: list[ReviewView]
    brief: str | None
    """where the rubric reviewed one experiment: its facts and criteria, for judging it yourself with `review`"""
    working: StillWorking | None = None
    next: str


def review(
    lab: Lab,
    *,
    experiment_id: Annotated[
        int | None, Field(ge=1, description="the experiment to review; otherwise the oldest that wait for a review")
    ] = None,
    limit: Annotated[int, Field(ge=1, le=10, description="without experiment_id: how many")] = 5,
    review: Annotated[
        GivenReview | None, Field(description="your own scores and feedback; needs experiment_id")
    ] = None,
    idempotency_key: IdempotencyKey = None,
    patience: float = PATIENCE_SECONDS,
) -> Reviews:
    """Reviews suggested experiments: novelty, feasibility, impact, clarity, efficiency, each from 1 to 10.

    Use it after `suggest`. A weighted mean of 7 or more approves; below it the experiment needs work. Give `review` to
    judge one yourself, on the rubric in `brief`; otherwise the lab's reviewer does, a language model where it has a
    key, else a rubric over facts (fit, time, nearest past work). Comes back with scores, feedback and the new status;
    then `enqueue` what is approved and `improve` what needs work.
    """
    if review is not None and experiment_id is None:
        raise RefusedError("a review of your own belongs to one experiment: give experiment_id too")

    ids = [] if experiment_id is None else [experiment_id]
    return review_many(lab, ids, limit=limit, given=review, idempotency_key=idempotency_key, patience=patience)


def review_many(
    lab: Lab,
    experiment_ids: list[int],
    *,
    limit: int = 5,
    given: GivenReview | None = None,
    idempotency_key: str | None = None,
    patience: float = PATIENCE_SECONDS,
) -> Reviews:
    """The same for several named experiments."""
    task = Asking(lab, idempotency_key, patience).ask(
        "review",
        {
            "experiment_ids": experiment_ids,
            "limit": limit,
            "given": given.model_dump(mode="json") if given else None,
        },
    )
    if (working := still_working(task)) is not None:
        return Reviews(
            reviews=[],
            brief=None,
            working=working,
            next=f"an agent is still answering: status(task_id={working.task_id}, wait_seconds=20)",
        )

    views = [
        review_view(get_experiment(lab.store, item.experiment_id), item)
        for item in Reviewed.model_validate(task.result).reviews
    ]
    return Reviews(reviews=views, brief=_brief(lab, views), next=_next(views))


def _brief(lab: Lab, views: list[ReviewView]) -> str | None:
    if len(views) != 1 or views[0].reviewer != "rubric":
        return None

    return cut(brief(lab, views[0].experiment_id), 10_000)


def _next(views: list[ReviewView]) -> str:
    approved = [view.experiment_id for view in views if view.decision == "approve"]
    wanting = [view.experiment_id for view in views if view.decision in ("refine", "rewrite")]
    parts = []
    if approved:
        parts.append(f"enqueue(experiment_ids={approved})")

    if wanting:
        parts.append(
            f"improve(experiment_id={wanting[0]})" + (f", and the same for {wanting[1:]}" * (len(wanting) > 1))
        )

    return "; ".join(parts) or "suggest() something else"
