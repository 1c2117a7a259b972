"""Improvement: a new experiment in place of its parent, or an honest refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from agents import reviewer
from agents.improver import brief, improve
from agents.llm import LLMError
from agents.prompts import BRIEF_MOST
from agents.proposals import GivenReview, Improved, Proposal
from agents.reviewer import WEIGHTS, review
from agents.suggester import suggest
from agents.treatments import change_of
from db.errors import NotFoundError, RefusedError
from db.experiments import get_experiment, list_experiments, move_experiment
from db.lab import Lab
from db.records import Experiment, ExperimentStatus
from db.tasks import add_cycle

if TYPE_CHECKING:
    from tests.agents.conftest import ScriptedModel

CLEAR = "Raising lr lowers val_bpb, because the run is short. A higher one would count against it."


def idea(treatment: dict[str, Any] | None = None, **fields: Any) -> Proposal:
    return Proposal(
        **{
            "title": "An idea",
            "hypothesis": CLEAR,
            "domain": "optimization",
            "treatment": treatment or {"lr": 0.02},
            **fields,
        }
    )


def needs_work(
    lab: Lab, treatment: dict[str, Any] | None = None, *, score: float | None = 6.0, **fields: Any
) -> Experiment:
    """An experiment that was sent back, by the rubric or by a given score."""
    cycle = add_cycle(
        lab.store,
        {"domain": None, "focus_area": None, "count": 1, "max_cycles": 1, "start_runner": False},
    )
    made = suggest(lab, count=1, proposals=[idea(treatment, **fields)], cycle_id=cycle.id)
    assert made.refused == []
    given = None if score is None else GivenReview(**dict.fromkeys(WEIGHTS, score), feedback="Needs work.")
    review(lab, [made.experiments[0].id], given=given)
    experiment = get_experiment(lab.store, made.experiments[0].id)
    assert experiment.status == "needs_work"
    return experiment


def check_replaced(lab: Lab, parent: Experiment, improved: Improved) -> Experiment:
    child = improved.experiment
    assert child is not None
    assert improved.parent_id == child.parent_id == parent.id
    assert child.revision == parent.revision + 1
    assert child.cycle_id == parent.cycle_id
    assert child.status == "suggested"
    after = get_experiment(lab.store, parent.id)
    assert (after.status, after.reason) == ("superseded", f"improved as experiment {child.id}")
    return child


def test_a_revision_takes_its_parents_place(lab: Lab) -> None:
    parent = needs_work(lab)
    improved = improve(lab, parent.id, revision=idea({"lr": 0.012}, title="A better idea"))
    child = check_replaced(lab, parent, improved)
    assert (child.proposer, child.treatment) == ("assistant", {"lr": 0.012})
    assert improved.changes == "treatment now lr=0.012; title rewritten"


def test_a_revision_may_keep_the_treatment_and_say_it_better(lab: Lab) -> None:
    parent = needs_work(lab)
    child = check_replaced(lab, parent, improve(lab, parent.id, revision=idea(title="Said better")))
    assert child.treatment == parent.treatment


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        (idea(), "changes nothing"),
        (idea({"lr": "high"}), "lr='high'"),
        (idea({"lr": 0.006}), "the baseline's own value"),
        (idea({"num_experts": 99}), "over the limit 16"),
        (idea({"speed": 1}), "unknown knob 'speed'"),
        (idea({"lr": 0.001}), "asked before: experiment 2"),
        (idea(domain="alchemy"), "no domain 'alchemy'"),
    ],
)
def test_a_revision_that_cannot_be_admitted_leaves_the_parent_as_it_was(
    lab: Lab, revision: Proposal, said: str
) -> None:
    parent = needs_work(lab)
    suggest(lab, count=1, proposals=[idea({"lr": 0.001})])
    with pytest.raises(RefusedError, match=said):
        improve(lab, parent.id, revision=revision)

    assert get_experiment(lab.store, parent.id).status == "needs_work"
    assert len(list_experiments(lab.store)) == 2


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("suggested", "review it first"),
        ("approved", "it can be enqueued"),
        ("superseded", "improve the experiment that replaced it"),
        ("rejected", "suggest a new one"),
        ("concluded", "suggest a new one"),
    ],
)
def test_only_what_needs_work_is_improved(lab: Lab, status: ExperimentStatus, said: str) -> None:
    parent = needs_work(lab)
    move_experiment(lab.store, parent.id, status, allowed=["needs_work"])
    with pytest.raises(RefusedError, match=f"is {status}, not needs_work; {said}"):
        improve(lab, parent.id)


def test_an_unknown_experiment_is_not_found(lab: Lab) -> None:
    with pytest.raises(NotFoundError):
        improve(lab, 3)


def test_after_the_last_round_the_idea_is_rejected(configured: Callable[[str], Lab]) -> None:
    lab = configured("")
    parent = needs_work(lab)
    improved = improve(configured("max_improvement_rounds = 0\n"), parent.id, revision=idea(title="Too late"))
    assert improved.experiment is None
    assert "max_improvement_rounds" in improved.changes
    assert get_experiment(lab.store, parent.id).status == "rejected"


@pytest.mark.parametrize(
    "treatment",
    [
        {"lr": 0.0065},
        {"lr": 0.0055},
        {"batch_size": 9},
        {"d_expert": 130},
        {"beta1": 0.901},
        {"warmup_fraction": 0.101},
        {"rope_base": 9_000.0},
        {"lr": 0.0061, "beta2": 0.951},
    ],
)
def test_a_tweak_too_small_to_be_seen_goes_on_in_its_direction(lab: Lab, treatment: dict[str, Any]) -> None:
    parent = needs_work(lab, treatment, score=None)
    improved = improve(lab, parent.id)
    child = check_replaced(lab, parent, improved)
    assert "too near to the baseline's" in improved.changes
    for name, value in child.treatment.items():
        before, after = (change_of(name, parent.baseline[name], end) for end in (treatment[name], value))
        assert after.direction == before.direction
        assert after.resolvable

    assert child.proposer == parent.proposer
    assert review(lab, [child.id]).reviews[0].decision == "approve"


def test_what_is_over_a_limit_becomes_a_new_experiment_at_the_limit(lab: Lab, configured: Callable[[str], Lab]) -> None:
    made = suggest(lab, count=1, proposals=[idea({"num_experts": 16}, domain="moe_architecture")]).experiments[0]
    smaller = configured("[gpu_optimization]\nmax_experts = 12\n")
    review(smaller, [made.id])
    improved = improve(smaller, made.id)
    assert improved.experiment is not None
    assert improved.experiment.treatment == {"num_experts": 12}
    assert "num_experts 16 is over the limit; a new experiment at the limit, 12 (max_experts)" in improved.changes
    assert review(smaller, [improved.experiment.id]).reviews[0].decision == "approve"


def test_a_vague_hypothesis_is_restated_from_what_is_known_of_the_knob(lab: Lab) -> None:
    parent = needs_work(lab, hypothesis="This may well turn out to be interesting.", score=None)
    improved = improve(lab, parent.id)
    child = check_replaced(lab, parent, improved)
    assert child.treatment == parent.treatment
    assert child.hypothesis.startswith("Raising lr from 0.006 to 0.02 lowers val_bpb, through what is moved: lr (peak")
    assert child.hypothesis.endswith("First put as: This may well turn out to be interesting.")
    assert improved.changes.startswith("now says what the hypothesis did not: the knob, the metric, ")
    assert review(lab, [child.id]).reviews[0].decision == "approve"


@pytest.mark.parametrize(
    ("claim", "restated"),
    [
        ("Raising lr a little leaves val_bpb equivalent.", "leaves val_bpb equivalent, through"),
        ("Raising lr a little raises val_bpb.", "raises val_bpb, through"),
        ("Raising lr a little makes val_bpb worse.", "raises val_bpb, through"),
        ("Raising lr a little lowers val_bpb.", "lowers val_bpb, through"),
    ],
)
def test_a_repair_claims_what_the_idea_claimed(lab: Lab, claim: str, restated: str) -> None:
    child = improve(lab, needs_work(lab, {"lr": 0.0065}, hypothesis=claim, score=None).id).experiment
    assert child is not None
    assert restated in child.hypothesis


def test_a_hypothesis_that_only_lacks_a_refutation_keeps_its_words(lab: Lab) -> None:
    hypothesis = "Raising lr lowers val_bpb, because the run is short."
    child = improve(lab, needs_work(lab, hypothesis=hypothesis).id).experiment
    assert child is not None
    assert child.hypothesis == hypothesis
    assert "would count against it" in child.method


def test_what_was_written_for_other_knobs_cannot_be_repaired_by_rule(lab: Lab) -> None:
    parent = needs_work(lab)
    lab.store.execute("UPDATE experiments SET treatment = '{\"gone\": 1}'")
    review(lab, [parent.id])
    with pytest.raises(RefusedError, match="no rule can do: Cannot be approved: unknown knob 'gone'"):
        improve(lab, parent.id)


def test_the_optimizers_bare_idea_is_approved_once_it_is_restated(lab: Lab) -> None:
    for experiment in suggest(lab, count=5, proposer="optimizer").experiments:
        if review(lab, [experiment.id]).reviews[0].decision == "approve":
            continue

        improved = improve(lab, experiment.id).experiment
        assert improved is not None
        assert improved.proposer == "optimizer"
        assert review(lab, [improved.id]).reviews[0].decision == "approve"


def test_what_was_tried_meanwhile_moves_to_the_untried_side(lab: Lab, conclude: Callable[..., None]) -> None:
    parent = needs_work(lab, {"lr": 0.012})
    lab.store.execute("UPDATE experiments SET status = 'failed' WHERE id = ?", (parent.id,))
    twin = suggest(lab, count=1, proposals=[idea({"lr": 0.0121})]).experiments[0]
    conclude(lab, twin.id, "worse", 0.1)
    lab.store.execute("UPDATE experiments SET status = 'needs_work' WHERE id = ?", (parent.id,))
    improved = improve(lab, parent.id)
    child = check_replaced(lab, parent, improved)
    assert child.treatment == {"lr": 0.003}
    assert f"experiment {twin.id} tried that already; moved to the untried lr 0.006 → 0.003" in improved.changes


def test_a_direction_that_never_improved_is_turned_round(lab: Lab, conclude: Callable[..., None]) -> None:
    for value in (0.01, 0.02):
        conclude(lab, suggest(lab, count=1, proposals=[idea({"lr": value})]).experiments[0].id, "worse", 0.1)

    parent = needs_work(lab, {"lr": 0.03}, score=None)
    improved = improve(lab, parent.id)
    child = check_replaced(lab, parent, improved)
    assert float(str(child.treatment["lr"])) < 0.006
    assert "has not improved val_bpb in 2 verdicts" in improved.changes


def test_where_no_repair_is_known_it_refuses_and_says_who_could(lab: Lab) -> None:
    parent = needs_work(lab, score=6.0)
    with pytest.raises(RefusedError, match=r"no rule can do: Needs work\.\nGive a revision of your own"):
        improve(lab, parent.id)

    assert get_experiment(lab.store, parent.id).status == "needs_work"
    assert len(list_experiments(lab.store)) == 1


def test_with_a_key_the_model_revises_with_review_and_facts_before_it(lab: Lab, model: ScriptedModel) -> None:
    parent = needs_work(lab)
    model.says({"proposal": idea({"lr": 0.012}).model_dump(), "changes": "halved the move"})
    improved = improve(lab, parent.id)
    child = check_replaced(lab, parent, improved)
    assert (child.proposer, improved.changes) == ("llm", "halved the move")
    for part in ("Needs work.", "refine it", "lr = 0.006", '"cost_ratio"', '"changes"', "in all 6.0"):
        assert part in model.prompts[0]


def test_a_model_that_changes_nothing_or_fails_leaves_the_parent_as_it_was(lab: Lab, model: ScriptedModel) -> None:
    parent = needs_work(lab)
    model.says({"proposal": idea().model_dump(), "changes": "nothing really"})
    with pytest.raises(RefusedError, match="changes nothing"):
        improve(lab, parent.id)

    model.fails(401, "no")
    with pytest.raises(LLMError):
        improve(lab, parent.id)

    assert get_experiment(lab.store, parent.id).status == "needs_work"
    assert len(list_experiments(lab.store)) == 1


def test_a_rewrite_is_asked_for_below_the_lower_threshold(lab: Lab) -> None:
    assert "rewrite it" in brief(lab, needs_work(lab, score=3.0).id)
    assert "refine it" in brief(lab, needs_work(lab, {"lr": 0.001}, score=6.0).id)


def test_the_brief_asks_an_assistant_for_a_whole_proposal(lab: Lab) -> None:
    text = brief(lab, needs_work(lab).id)
    assert '"title": "Proposal"' in text
    assert "Needs work." in text


def test_a_brief_stays_whole_however_much_was_written(lab: Lab) -> None:
    long = "long words " * 300
    parent = needs_work(lab, title="t" * 200, hypothesis=(CLEAR + long)[:2000], method=(long * 2)[:4000])
    review(lab, [parent.id], given=GivenReview(**dict.fromkeys(WEIGHTS, 6.0), feedback=(long * 2)[:4000]))
    for text in (brief(lab, parent.id), reviewer.brief(lab, parent.id)):
        assert 8_000 < len(text) <= BRIEF_MOST
        assert text.rstrip().endswith('"type": "object"}')
