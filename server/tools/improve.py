"""improve: a new experiment in place of one that needs work."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from agents.improver import brief
from agents.llm import has_model
from agents.proposals import Improved, Improvements, Proposal
from db.errors import RefusedError
from db.experiments import get_experiment, list_experiments
from db.formats import cut
from db.lab import Lab
from server.calls import PATIENCE_SECONDS, Asking, IdempotencyKey
from server.views import StillWorking, SuggestedLine, View, still_working, suggested_line


class Improvement(View):
    """What became of one experiment that needed work."""

    parent_id: int
    parent_status: str
    experiment: SuggestedLine | None
    """the new experiment, not yet reviewed; null when the parent was rejected"""
    changes: str
    """what was changed, or why nothing was"""


class ImprovementsView(View):
    """What this call made."""

    improvements: list[Improvement]
    brief: str | None
    """where the lab has no model: the review to answer and the knobs, for revising it yourself with `revision`"""
    working: StillWorking | None = None
    next: str


def improve(
    lab: Lab,
    *,
    experiment_id: Annotated[
        int | None, Field(ge=1, description="the experiment to improve; otherwise the oldest that need work")
    ] = None,
    limit: Annotated[int, Field(ge=1, le=10, description="without experiment_id: how many")] = 5,
    revision: Annotated[
        Proposal | None, Field(description="your own improved version of it; needs experiment_id")
    ] = None,
    idempotency_key: IdempotencyKey = None,
    patience: float = PATIENCE_SECONDS,
) -> ImprovementsView:
    """Improves experiments that a review sent back: each gets a successor, which is reviewed on its own merits.

    Use it after `review` said refine or rewrite. Give `revision` to rewrite one yourself, answering its feedback;
    otherwise the lab's improver does what it can. Comes back with the successors (status suggested; their parents are
    superseded) or with the reason for giving up, and a `brief` where your own revision would help. Then `review` them.
    """
    if revision is not None and experiment_id is None:
        raise RefusedError("a revision of your own belongs to one experiment: give experiment_id too")

    ids = [] if experiment_id is None else [experiment_id]
    return improve_many(lab, ids, limit=limit, revision=revision, idempotency_key=idempotency_key, patience=patience)


def improve_many(
    lab: Lab,
    experiment_ids: list[int],
    *,
    limit: int = 5,
    revision: Proposal | None = None,
    idempotency_key: str | None = None,
    patience: float = PATIENCE_SECONDS,
) -> ImprovementsView:
    """The same for several named experiments."""
    asking = Asking(lab, idempotency_key, patience)
    arguments: dict[str, Any] = {"revision": revision.model_dump(mode="json") if revision else None}
    if revision is None and not has_model(lab):
        return _by_rules(lab, asking, experiment_ids or _waiting(lab, limit))

    task = asking.ask("improve", {"experiment_ids": experiment_ids, "limit": limit, **arguments})
    if (working := still_working(task)) is not None:
        return ImprovementsView(
            improvements=[],
            brief=None,
            working=working,
            next=f"an agent is still answering: status(task_id={working.task_id}, wait_seconds=20)",
        )

    made = [_view(lab, item) for item in Improvements.model_validate(task.result).improvements]
    return ImprovementsView(improvements=made, brief=None, next=_next(made))


def _by_rules(lab: Lab, asking: Asking, experiment_ids: list[int]) -> ImprovementsView:
    # One by one: an experiment that no rule can mend shall not hold back the others.
    made: list[Improvement] = []
    helpless: list[int] = []
    for key in experiment_ids:
        try:
            task = asking.ask("improve", {"experiment_ids": [key], "limit": None, "revision": None}, step=str(key))
            made += [_view(lab, item) for item in Improvements.model_validate(task.result).improvements]
        except RefusedError as error:
            if get_experiment(lab.store, key).status != "needs_work":
                raise

            helpless.append(key)
            made.append(Improvement(parent_id=key, parent_status="needs_work", experiment=None, changes=str(error)))

    advice = cut(brief(lab, helpless[0]), 12_000) if helpless else None
    return ImprovementsView(improvements=made, brief=advice, next=_next(made))


def _waiting(lab: Lab, limit: int) -> list[int]:
    found = list_experiments(lab.store, status="needs_work", oldest_first=True, limit=limit)
    if not found:
        raise RefusedError("no experiment is needs_work now, so there is nothing to improve; see status")

    return [experiment.id for experiment in found]


def _view(lab: Lab, item: Improved) -> Improvement:
    return Improvement(
        parent_id=item.parent_id,
        parent_status=get_experiment(lab.store, item.parent_id).status,
        experiment=suggested_line(lab, get_experiment(lab.store, item.experiment.id)) if item.experiment else None,
        changes=cut(item.changes, 1000),
    )


def _next(made: list[Improvement]) -> str:
    new = [item.experiment.id for item in made if item.experiment]
    parts = []
    if new:
        parts.append(f"review(experiment_id={new[0]})" if len(new) == 1 else "review() reviews the new ones")

    if left := [item.parent_id for item in made if item.parent_status == "needs_work"]:
        parts.append(f"improve(experiment_id={left[0]}, revision=...) with a version of your own, following brief")

    return "; ".join(parts) or "suggest() something else"
