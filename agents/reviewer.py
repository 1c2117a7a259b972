"""Scores an experiment on five criteria, and says where the score leads. No score leads nowhere.

The reviewer is a language model, the assistant (a given review), or the rubric, which computes from facts alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from agents.facts import Facts, gather
from agents.llm import LLMError, ask, has_model
from agents.prompts import render
from agents.proposals import GivenReview, Reviewed
from agents.rubric import assess
from agents.treatments import describe
from db.errors import RefusedError
from db.experiments import add_review, get_experiment, move_experiment
from db.lab import Lab
from db.records import Decision, Experiment, ExperimentStatus, Review, Reviewer
from db.settings import Settings

WEIGHTS = {"novelty": 0.25, "feasibility": 0.20, "impact": 0.20, "clarity": 0.15, "efficiency": 0.20}

INFEASIBLE = 2.0
"""Feasibility is at most this while pre-flight has a problem."""

REVIEWABLE: tuple[ExperimentStatus, ...] = ("suggested", "needs_work", "approved")

_LEADS_TO: dict[Decision, ExperimentStatus] = {
    "approve": "approved",
    "refine": "needs_work",
    "rewrite": "needs_work",
    "reject": "rejected",
}


class _Opinion(NamedTuple):
    reviewer: Reviewer
    review: GivenReview
    interaction_id: int | None = None


def review(
    lab: Lab,
    experiment_ids: Sequence[int],
    *,
    given: GivenReview | None = None,
    reviewer: Literal["auto", "llm", "rubric"] = "auto",
    task_id: int | None = None,
) -> Reviewed:
    """Reviews experiments, each in a transaction of its own.

    Args:
        given: the assistant's own review, for exactly one experiment.
        reviewer: auto is the language model where there is a key, otherwise the rubric.

    Raises:
        NotFoundError, RefusedError: an experiment that does not exist or cannot be reviewed; then none was.
        LLMError: the model gave no usable review; those of the experiments before it stand.
    """
    experiments = [get_experiment(lab.store, key) for key in dict.fromkeys(experiment_ids)]
    if given is not None and len(experiments) != 1:
        raise RefusedError(f"a given review is of exactly one experiment, not of {len(experiments)}")

    for experiment in experiments:
        if experiment.status not in REVIEWABLE:
            raise RefusedError(
                f"experiment {experiment.id} is {experiment.status}; only {', '.join(REVIEWABLE)} ones can be reviewed"
            )

    reviews: list[Review] = []
    for experiment in experiments:
        facts = gather(lab, experiment)
        try:
            opinion = _form_opinion(lab, experiment, facts, given, reviewer, task_id)
        except LLMError as error:
            done = ", ".join(str(item.experiment_id) for item in reviews)
            raise LLMError(f"{error} (already reviewed in this call: {done})" if done else str(error)) from None

        reviews.append(_write(lab, experiment, facts, opinion))

    return Reviewed(reviews=reviews)


def brief(lab: Lab, experiment_id: int) -> str:
    """What a reviewer needs to know of an experiment, and the form of the answer; also the model's prompt."""
    experiment = get_experiment(lab.store, experiment_id)
    return _brief(lab, experiment, gather(lab, experiment))


def score_of(review: GivenReview) -> float:
    """The weighted mean of the five scores."""
    return sum(weight * float(getattr(review, name)) for name, weight in WEIGHTS.items())


def decide(settings: Settings, score: float, *, revision: int, problems: bool) -> Decision:
    """Where a score leads: approve, refine or rewrite, and after the last round of improvement reject."""
    score = round(score, 6)  # 7.0 in all five is 7.000000000000001 or 6.999999999999999
    if score >= settings.auto_review_threshold and not problems:
        return "approve"

    if revision >= settings.max_improvement_rounds:
        return "reject"

    return "refine" if score >= settings.auto_improve_threshold else "rewrite"


def _form_opinion(
    lab: Lab, experiment: Experiment, facts: Facts, given: GivenReview | None, reviewer: str, task_id: int | None
) -> _Opinion:
    if given is not None:
        return _Opinion("assistant", given)

    if reviewer == "llm" or (reviewer == "auto" and has_model(lab)):
        answer = ask(
            lab,
            agent="reviewer",
            prompt=_brief(lab, experiment, facts),
            schema=GivenReview,
            experiment_id=experiment.id,
            task_id=task_id,
        )
        return _Opinion("llm", answer.value, answer.interaction_id)

    return _Opinion("rubric", assess(facts))


def _write(lab: Lab, experiment: Experiment, facts: Facts, opinion: _Opinion) -> Review:
    scores = opinion.review
    if facts.problems:
        scores = scores.model_copy(
            update={
                "feasibility": min(scores.feasibility, INFEASIBLE),
                "feedback": f"Cannot be approved: {'; '.join(facts.problems)}\n{scores.feedback}",
            }
        )

    score = round(score_of(scores), 6)
    decision = decide(lab.settings, score, revision=experiment.revision, problems=bool(facts.problems))
    with lab.store.transaction():
        move_experiment(
            lab.store,
            experiment.id,
            _LEADS_TO[decision],
            allowed=REVIEWABLE,
            reason=_reason(lab.settings, decision, score, experiment, facts),
        )
        return add_review(
            lab.store,
            {
                "experiment_id": experiment.id,
                "reviewer": opinion.reviewer,
                **scores.model_dump(),
                "score": score,
                "decision": decision,
                "facts": facts.model_dump(),
                "interaction_id": opinion.interaction_id,
            },
        )


def _reason(settings: Settings, decision: Decision, score: float, experiment: Experiment, facts: Facts) -> str:
    said = f"scored {score:.1f} of 10, approval begins at {settings.auto_review_threshold:g}"
    if facts.problems:
        said += f"; {facts.problems[0]}"

    if decision == "reject":
        said += f"; improved {experiment.revision} times already (max_improvement_rounds)"

    return said


def _brief(lab: Lab, experiment: Experiment, facts: Facts) -> str:
    return render(
        "review",
        {
            "facts": facts.model_dump_json(exclude_none=True),
            "method": experiment.method or "(none given)",
        },
        title=experiment.title,
        hypothesis=experiment.hypothesis,
        domain=experiment.domain,
        proposer=experiment.proposer,
        source=experiment.source or "(none)",
        revision=str(experiment.revision),
        changes=describe(facts.changes) or json.dumps(experiment.treatment),
        metric=f"{experiment.metric} ({experiment.direction} is better)",
        threshold=f"{lab.settings.auto_review_threshold:g}",
        weights=", ".join(f"{name} {weight:.2f}" for name, weight in WEIGHTS.items()),
        schema=json.dumps(GivenReview.model_json_schema()),
    )
