"""Where ideas come from, and which of them become experiments."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from agents.llm import LLMError
from agents.prompts import BRIEF_MOST
from agents.proposals import Proposal, Suggested
from agents.suggester import brief, suggest
from db.errors import RefusedError
from db.experiments import list_experiments, move_experiment
from db.lab import Lab

if TYPE_CHECKING:
    from tests.agents.conftest import ScriptedModel


def idea(treatment: dict[str, Any] | None = None, **fields: Any) -> Proposal:
    return Proposal(
        **{
            "title": "A higher learning rate",
            "hypothesis": "Raising lr lowers val_bpb, because the run is short.",
            "domain": "optimization",
            "treatment": treatment or {"lr": 0.02},
            **fields,
        }
    )


def propose(lab: Lab, *ideas: Proposal) -> Any:
    return suggest(lab, count=1, proposals=ideas)


def test_without_a_key_five_ideas_are_four_of_the_catalog_and_one_of_the_optimizer(lab: Lab) -> None:
    made = suggest(lab, count=5)
    assert [item.proposer for item in made.experiments] == ["catalog"] * 4 + ["optimizer"]
    assert [item.treatment for item in made.experiments[:2]] == [{"optimizer": "muon"}, {"lr": 0.0006}]
    assert made.refused == []
    assert list_experiments(lab.store, oldest_first=True) == made.experiments


def test_an_experiment_holds_all_that_the_comparison_needs(lab: Lab) -> None:
    row = (
        suggest(lab, count=1, focus_area="learning rate")
        .experiments[0]
        .model_dump(exclude={"created_at", "updated_at"})
    )
    baseline = row.pop("baseline")
    assert baseline["lr"] == 0.006
    assert baseline["budget_tokens"] == 512_000
    hypothesis, method = row.pop("hypothesis"), row.pop("method")
    assert "val_bpb" in hypothesis
    assert "lr 0.006 → 0.0006" in method
    assert row == {
        "id": 1,
        "title": "A tenth of the learning rate",
        "domain": "optimization",
        "focus_area": "learning rate",
        "preset": "micro",
        "treatment": {"lr": 0.0006},
        "metric": "val_bpb",
        "direction": "lower",
        "guard_metric": None,
        "guard_margin": None,
        "proposer": "catalog",
        "source": "Scaling optimal LR across token horizons, arXiv:2409.19913; Small-scale proxies for large-scale "
        "Transformer training instabilities, arXiv:2309.14322",
        "parent_id": None,
        "revision": 0,
        "cycle_id": None,
        "status": "suggested",
        "reason": None,
        "priority": 0,
        "seeds": 0,
        "confirm": "promising",
        "equal_flops": False,
        "screen_share": None,
        "on_champion_id": None,
        "combines_id": None,
        "metric_text": None,
        "hardware_class": None,
    }


def test_the_catalog_is_gone_through_once_and_then_the_optimizer_goes_on(configured: Callable[[str], Lab]) -> None:
    lab = configured("max_experiments_per_suggestion = 50\n")
    first = suggest(lab, count=40, proposer="catalog")
    rest = suggest(lab, count=40, proposer="catalog")
    assert len(first.experiments) == 40
    assert 8 <= len(rest.experiments) < 20
    assert "the catalog had no more" in rest.refused[0].reason
    assert {item.proposer for item in suggest(lab, count=3).experiments} == {"optimizer"}


def test_domain_and_focus_area_choose(lab: Lab) -> None:
    made = suggest(lab, count=2, domain="moe_architecture", focus_area="load balancing", proposer="catalog")
    assert {item.focus_area for item in made.experiments} == {"load balancing"}
    assert {item.domain for item in made.experiments} == {"moe_architecture"}


def test_a_domain_that_does_not_exist_is_refused(lab: Lab) -> None:
    with pytest.raises(RefusedError, match="known: efficiency"):
        suggest(lab, count=1, domain="alchemy")


@pytest.mark.parametrize("count", [0, -1, 6])
def test_no_more_are_generated_than_configured(lab: Lab, count: int) -> None:
    with pytest.raises(RefusedError, match=r"outside 1 to 5 \(max_experiments_per_suggestion\)"):
        suggest(lab, count=count)


def test_the_assistants_ideas_are_its_own_in_any_number(lab: Lab) -> None:
    ideas = [idea({"lr": 0.001 * 1.5**step}) for step in range(7) if step != 4]
    made = propose(lab, *ideas)
    assert [item.proposer for item in made.experiments] == ["assistant"] * 6
    assert made.refused == []


@pytest.mark.parametrize(
    ("proposal", "reason"),
    [
        (idea(domain="alchemy"), "no domain 'alchemy'; known: efficiency"),
        (idea({"learning_rate": 1.0}), "unknown knob 'learning_rate'; did you mean 'lr'?"),
        (idea({"lr": 5.0}), "lr=5.0"),
        (idea({"lr": "high"}), "lr='high'"),
        (idea({"budget_tokens": 1000}), "budget_tokens is budget"),
        (idea({"lr": 0.006}), "the baseline's own value"),
        (idea({"num_experts": 64}), r"num_experts=64 is over the limit 16 \(max_experts"),
        (idea({"seq_len": 2048}), "seq_len=2048 is over the limit 1024"),
        (idea({"top_k": 9}), "top_k=9 is more than num_experts=8"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason_and_the_rest_is_kept(
    lab: Lab, proposal: Proposal, reason: str
) -> None:
    made = propose(lab, proposal, idea())
    assert [item.title for item in made.experiments] == ["A higher learning rate"]
    assert len(made.refused) == 1
    assert re.search(reason, made.refused[0].reason)
    assert made.refused[0].duplicate_of is None


def test_the_same_question_is_refused_whatever_its_words(lab: Lab) -> None:
    first = propose(lab, idea({"lr": 0.02, "beta1": 0.8})).experiments[0]
    other = idea({"beta1": 0.8, "lr": 0.0202}, title="Quick steps", hypothesis="Momentum matters less than haste does.")
    made = propose(lab, other)
    assert made.experiments == []
    assert made.refused[0].duplicate_of == first.id
    assert "beta1 0.9 → 0.8, lr 0.006 → 0.02" in made.refused[0].reason


def test_the_same_words_are_no_duplicate_if_the_question_is_another(lab: Lab) -> None:
    assert len(propose(lab, idea({"lr": 0.02}), idea({"batch_size": 16}), idea({"lr": 0.001})).experiments) == 3


def test_two_equal_ideas_in_one_call_are_one_experiment(lab: Lab) -> None:
    made = propose(lab, idea(), idea(title="Once more"))
    assert len(made.experiments) == 1
    assert made.refused[0].duplicate_of == made.experiments[0].id


def test_a_question_that_was_never_answered_may_be_asked_again(lab: Lab) -> None:
    first = propose(lab, idea()).experiments[0]
    move_experiment(lab.store, first.id, "failed", allowed=["suggested"])
    assert len(propose(lab, idea()).experiments) == 1


def test_another_baseline_is_another_question(lab: Lab, configured: Callable[[str], Lab]) -> None:
    propose(lab, idea())
    assert len(propose(configured("baseline = { weight_decay = 0.2 }\n"), idea()).experiments) == 1


def test_the_baseline_of_the_configuration_is_stored_whole(configured: Callable[[str], Lab]) -> None:
    lab = configured('preset = "nano"\nbaseline = { budget_tokens = 40960 }\n')
    made = propose(lab, idea({"lr": 0.02})).experiments[0]
    assert (made.preset, made.baseline["budget_tokens"]) == ("nano", 40960)


def test_one_call_is_one_transaction(lab: Lab) -> None:
    lab.store.execute(
        "CREATE TRIGGER bombs BEFORE INSERT ON experiments WHEN new.title = 'bomb' BEGIN SELECT raise(ABORT, 'no'); END"
    )
    with pytest.raises(Exception, match="no"):
        propose(lab, idea(), idea({"lr": 0.001}, title="bomb"))

    assert list_experiments(lab.store) == []


def test_with_a_key_the_model_proposes_from_the_brief(lab: Lab, model: ScriptedModel) -> None:
    model.says({"proposals": [idea().model_dump(), idea({"lr": 0.001}, title="A lower one").model_dump()]})
    made = suggest(lab, count=2, domain="optimization", focus_area="learning rate")
    assert [(item.proposer, item.treatment) for item in made.experiments] == [
        ("llm", {"lr": 0.02}),
        ("llm", {"lr": 0.001}),
    ]
    prompt = model.prompts[0]
    for part in ("exactly 2 ideas", "Focus on: learning rate", "- lr = 0.006", "num_experts at most 16", '"proposals"'):
        assert part in prompt

    assert lab.store.value("SELECT agent FROM interactions") == "suggester"


def test_a_models_bad_idea_is_refused_like_any_other(lab: Lab, model: ScriptedModel) -> None:
    model.says({"proposals": [idea({"experts": 3}).model_dump(), idea().model_dump()]})
    made = suggest(lab, count=2)
    assert len(made.experiments) == 1
    assert "unknown knob 'experts'" in made.refused[0].reason


def test_a_model_that_gives_too_few_is_said_to(lab: Lab, model: ScriptedModel) -> None:
    model.says({"proposals": [idea().model_dump()]})
    assert suggest(lab, count=3).refused[0].title == "2 of 3 ideas"


def test_a_failed_call_raises_and_invents_nothing(lab: Lab, model: ScriptedModel) -> None:
    model.fails(401, "no")
    with pytest.raises(LLMError):
        suggest(lab, count=5)

    assert list_experiments(lab.store) == []


def test_the_llm_cannot_be_asked_for_without_a_key(lab: Lab) -> None:
    with pytest.raises(LLMError, match="OPENROUTER_API_KEY"):
        suggest(lab, count=1, proposer="llm")


def test_the_brief_tells_what_was_tried_and_learnt_and_stays_short(
    configured: Callable[[str], Lab], conclude: Callable[..., None]
) -> None:
    lab = configured("max_experiments_per_suggestion = 50\n")
    for item in suggest(lab, count=29, proposer="catalog").experiments:
        conclude(lab, item.id, "worse", 0.12)

    ideas = [
        idea({"lr": 0.01, "n_heads": 1, "rope_base": 10 * 1.5**step}, title=f"{step} {'long ' * 30}")
        for step in range(30)
    ]
    newest = propose(lab, *ideas).experiments[-1]

    text = brief(lab, "optimization", None)
    assert len(text) <= BRIEF_MOST
    assert "worse (val_bpb +0.12)" in brief(lab, "evaluation", None)
    assert f"- {newest.id}. " in text
    assert '"hypothesis"' in text


def test_two_calls_at_once_make_no_duplicates(lab: Lab) -> None:
    def call(_: int) -> Suggested:
        try:
            return suggest(lab, count=5)
        finally:
            lab.close()  # this thread's connection

    lab.store.data_version()  # the database exists
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(call, range(4)))

    treatments = [str(item.treatment) for suggested in made for item in suggested.experiments]
    assert len(set(treatments)) == len(treatments) >= 5
    for refusal in (item for suggested in made for item in suggested.refused):
        assert refusal.duplicate_of is not None
