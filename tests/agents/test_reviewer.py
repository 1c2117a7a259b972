"""Scores, and where each of them leads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from agents.domains import in_order, load_domains
from agents.improver import improve
from agents.llm import LLMError
from agents.proposals import GivenReview, Proposal
from agents.reviewer import WEIGHTS, brief, review, score_of
from agents.suggester import suggest
from db.errors import NotFoundError, RefusedError
from db.experiments import get_experiment, latest_review, move_experiment
from db.lab import Lab
from db.records import Experiment, ExperimentStatus

if TYPE_CHECKING:
    from tests.agents.conftest import ScriptedModel


def given(score: float = 8.0, **scores: Any) -> GivenReview:
    return GivenReview(**{**dict.fromkeys(WEIGHTS, score), "feedback": "as it is", **scores})


def propose(lab: Lab, treatment: dict[str, Any] | None = None, **fields: Any) -> Experiment:
    values = {
        "title": "A higher learning rate",
        "hypothesis": "Raising lr lowers val_bpb, because the run is short. A higher one would count against it.",
        "domain": "optimization",
        "treatment": treatment or {"lr": 0.02},
        **fields,
    }
    made = suggest(lab, count=1, proposals=[Proposal(**values)])
    assert made.refused == []
    return made.experiments[0]


def revised(lab: Lab, times: int) -> Experiment:
    experiment = propose(lab)
    for step in range(times):
        review(lab, [experiment.id], given=given(6.0))
        revision = Proposal(
            title=f"Revision {step + 1}",
            hypothesis="Raising lr lowers val_bpb, because the run is short.",
            domain="optimization",
            treatment={"lr": 0.02},
        )
        improved = improve(lab, experiment.id, revision=revision).experiment
        assert improved is not None
        experiment = improved

    return experiment


@pytest.mark.parametrize("revision", [0, 1, 2])
def test_every_score_from_1_to_10_leads_somewhere(lab: Lab, revision: int) -> None:
    experiment = revised(lab, revision)
    for tenths in range(10, 101):
        score = tenths / 10
        if get_experiment(lab.store, experiment.id).status == "rejected":
            move_experiment(lab.store, experiment.id, "suggested", allowed=["rejected"])

        written = review(lab, [experiment.id], given=given(score)).reviews[0]
        expected: tuple[str, ExperimentStatus]
        if score >= 7.0:
            expected = ("approve", "approved")
        elif revision == 2:
            expected = ("reject", "rejected")
        elif score >= 5.0:
            expected = ("refine", "needs_work")
        else:
            expected = ("rewrite", "needs_work")

        assert written.score == pytest.approx(score)
        assert (written.decision, get_experiment(lab.store, experiment.id).status) == expected


def test_the_weights_are_the_five_of_the_design() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1.0)
    assert score_of(given(novelty=10, feasibility=6, impact=8, clarity=4, efficiency=2)) == pytest.approx(
        0.25 * 10 + 0.20 * 6 + 0.20 * 8 + 0.15 * 4 + 0.20 * 2
    )


def test_the_thresholds_are_the_configured_ones(configured: Callable[[str], Lab]) -> None:
    lab = configured("auto_review_threshold = 9.0\nauto_improve_threshold = 8.0\nmax_improvement_rounds = 0\n")
    assert review(lab, [propose(lab).id], given=given(9.0)).reviews[0].decision == "approve"
    assert review(lab, [propose(lab, {"lr": 0.001}).id], given=given(8.9)).reviews[0].decision == "reject"


def test_a_given_review_is_stored_whole_with_the_facts(lab: Lab) -> None:
    experiment = propose(lab)
    written = review(lab, [experiment.id], given=given(8.0, success_probability=0.4)).reviews[0]
    assert written == latest_review(lab.store, experiment.id)
    assert (written.reviewer, written.feedback, written.success_probability) == ("assistant", "as it is", 0.4)
    assert written.facts["treatment"]["active_parameters"] == 148_800
    assert written.facts["changes"][0] == {
        "knob": "lr",
        "before": 0.006,
        "after": 0.02,
        "direction": "raised",
        "distance": pytest.approx(0.211, abs=1e-3),
    }


def test_no_review_approves_what_cannot_run(lab: Lab, configured: Callable[[str], Lab]) -> None:
    experiment = propose(lab, {"num_experts": 16}, domain="moe_architecture")
    smaller = configured("[gpu_optimization]\nmax_experts = 12\n")
    for opinion in (given(10.0), None):
        written = review(smaller, [experiment.id], given=opinion).reviews[0]
        assert written.decision in ("refine", "rewrite")
        assert written.feasibility <= 2.0
        assert "num_experts=16 is over the limit 12" in written.feedback
        assert get_experiment(lab.store, experiment.id).status == "needs_work"


def test_an_experiment_written_for_other_knobs_is_reviewed_as_impossible(lab: Lab) -> None:
    experiment = propose(lab)
    lab.store.execute("UPDATE experiments SET treatment = '{\"gone\": 1}'")
    written = review(lab, [experiment.id]).reviews[0]
    assert written.decision == "rewrite"
    assert "unknown knob 'gone'" in written.feedback


def test_an_approved_one_can_be_reviewed_again_and_lose_its_approval(lab: Lab) -> None:
    experiment = propose(lab)
    review(lab, [experiment.id], given=given(9.0))
    review(lab, [experiment.id], given=given(4.0))
    assert get_experiment(lab.store, experiment.id).status == "needs_work"


@pytest.mark.parametrize("status", ["queued", "running", "concluded", "rejected", "superseded", "failed", "cancelled"])
def test_what_is_under_way_or_over_cannot_be_reviewed_and_nothing_is_written(
    lab: Lab, status: ExperimentStatus
) -> None:
    fresh, experiment = propose(lab, {"lr": 0.001}), propose(lab)
    move_experiment(lab.store, experiment.id, status, allowed=["suggested"])
    with pytest.raises(RefusedError, match=f"experiment {experiment.id} is {status}; only suggested, needs_work, app"):
        review(lab, [fresh.id, experiment.id])

    assert latest_review(lab.store, fresh.id) is None


def test_an_unknown_experiment_is_not_found(lab: Lab) -> None:
    with pytest.raises(NotFoundError, match="there is no experiment 7"):
        review(lab, [7])


def test_one_given_review_is_of_one_experiment(lab: Lab) -> None:
    ids = [propose(lab).id, propose(lab, {"lr": 0.001}).id]
    with pytest.raises(RefusedError, match="exactly one experiment, not of 2"):
        review(lab, ids, given=given())


@pytest.mark.parametrize("preset", ["nano", "micro", "t4"])
def test_the_rubric_approves_the_catalog(configured: Callable[[str], Lab], preset: str) -> None:
    lab = configured(f'preset = "{preset}"\nmax_experiments_per_suggestion = 50\n')
    made = [item for _ in range(2) for item in suggest(lab, count=50, proposer="catalog").experiments]
    assert len(made) >= sum(1 for _ in in_order(load_domains(lab))) - 2
    for written in review(lab, [item.id for item in made]).reviews:
        assert written.decision == "approve", written.feedback
        assert written.success_probability is not None
        assert written.facts["missing"] == [], get_experiment(lab.store, written.experiment_id).title


def test_the_rubric_gives_every_score_a_reason_and_is_deterministic(lab: Lab) -> None:
    experiment = propose(lab)
    first = review(lab, [experiment.id]).reviews[0]
    assert [line.split(" ")[0] for line in first.feedback.split("\n")] == list(WEIGHTS)
    again = review(lab, [experiment.id]).reviews[0]
    assert again.model_dump(exclude={"id", "created_at"}) == first.model_dump(exclude={"id", "created_at"})
    assert first.reviewer == "rubric"


def test_the_rubric_sends_the_optimizers_bare_idea_back_for_a_mechanism(lab: Lab) -> None:
    experiment = suggest(lab, count=1, proposer="optimizer").experiments[0]
    written = review(lab, [experiment.id]).reviews[0]
    assert written.decision == "refine"
    assert "does not say the mechanism" in written.feedback


@pytest.mark.parametrize(
    ("treatment", "hypothesis", "reason"),
    [
        ({"lr": 0.0065}, "Raising lr lowers val_bpb, because runs are short.", "too small to be told apart"),
        ({"lr": 0.02}, "This may well turn out to be interesting.", "no result could answer"),
        (
            {"lr": 0.02},
            "A fine idea that will help the model a lot, because it is good.",
            "does not say the knob, the metric",
        ),
    ],
)
def test_the_rubric_sends_back_what_no_result_could_answer(
    lab: Lab, treatment: dict[str, Any], hypothesis: str, reason: str
) -> None:
    experiment = propose(lab, treatment, title="An idea", hypothesis=hypothesis)
    written = review(lab, [experiment.id]).reviews[0]
    assert written.decision in ("refine", "rewrite")
    assert reason in written.feedback


def test_past_verdicts_on_the_same_move_set_novelty_impact_and_probability(
    lab: Lab, conclude: Callable[..., None]
) -> None:
    for value, word in ((0.012, "worse"), (0.016, "worse")):
        conclude(lab, propose(lab, {"lr": value}).id, word, 0.1)

    written = review(lab, [propose(lab, {"lr": 0.025}).id]).reviews[0]
    assert written.novelty < 7
    assert "improved the metric in 0 of 2" in written.feedback
    assert written.success_probability == pytest.approx(2 * 0.35 / (2 + 2))  # the catalog's prior counts as two
    opposite = review(lab, [propose(lab, {"lr": 0.001}).id]).reviews[0]
    assert opposite.novelty > written.novelty
    assert opposite.decision == "approve"


def test_a_prior_and_the_labs_own_verdicts_are_weighed_together(lab: Lab, conclude: Callable[..., None]) -> None:
    conclude(lab, propose(lab, {"lr": 0.0105}).id, "improved", -0.1)
    written = review(lab, [propose(lab, {"lr": 0.013}).id]).reviews[0]
    assert written.facts["prior"]["title"] == "Twice the learning rate"
    assert written.success_probability == pytest.approx((2 * 0.35 + 1) / 3)


def test_with_a_key_the_model_reviews_with_the_facts_before_it(lab: Lab, model: ScriptedModel) -> None:
    experiment = propose(lab)
    model.says(given(6.0, feedback="Say how large.").model_dump())
    written = review(lab, [experiment.id]).reviews[0]
    assert (written.reviewer, written.decision, written.feedback) == ("llm", "refine", "Say how large.")
    row = lab.store.rows("SELECT id, agent, experiment_id, prompt FROM interactions")[0]
    assert (row["id"], row["agent"], row["experiment_id"]) == (written.interaction_id, "reviewer", experiment.id)
    assert row["prompt"] == brief(lab, experiment.id) == model.prompts[0]
    for part in ("lr 0.006 → 0.02", '"cost_ratio":1.0', "novelty 0.25", '"success_probability"'):
        assert part in row["prompt"]


def test_a_model_that_fails_writes_no_review_and_those_before_it_stand(lab: Lab, model: ScriptedModel) -> None:
    first, second = propose(lab), propose(lab, {"lr": 0.001})
    model.says(given(8.0).model_dump())
    model.fails(402, "no credit")
    with pytest.raises(LLMError, match=f"no credit.*already reviewed in this call: {first.id}"):
        review(lab, [first.id, second.id])

    assert get_experiment(lab.store, first.id).status == "approved"
    assert get_experiment(lab.store, second.id).status == "suggested"
    assert latest_review(lab.store, second.id) is None


def test_the_rubric_can_be_asked_for_with_a_key(lab: Lab, model: ScriptedModel) -> None:
    assert review(lab, [propose(lab).id], reviewer="rubric").reviews[0].reviewer == "rubric"
    assert model.requests == []
