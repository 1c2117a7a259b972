"""The verbs through a real client, over stdio, in both protocol eras, and what they answer to nonsense."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from db.experiments import get_experiment, move_experiment
from db.lab import Lab
from db.queue import add_run, prioritize_experiment
from db.runners import register_runner
from tests.server.conftest import ERAS, IDEA, RUNNER, Session, connect, put_experiment, put_run

VERBS = ["suggest", "review", "improve", "enqueue", "run", "status", "report"]
GOOD_REVIEW = {
    "novelty": 8,
    "feasibility": 9,
    "impact": 7,
    "clarity": 9,
    "efficiency": 8,
    "feedback": "Sound, and cheap to find out.",
}


def test_both_eras_see_the_same_tools(sessions: dict[str, Session]) -> None:
    assert [sessions[era].version for era in ERAS] == ["2025-11-25", "2026-07-28"]
    for era in ERAS:
        assert [tool.name for tool in sessions[era].tools()] == VERBS


def test_from_an_idea_to_runs_in_the_queue(session: Session) -> None:
    idea = {**IDEA, "treatment": {"top_k": 1, "lr": 0.0123 + len(session.version) / 1000}}
    if session.version == "2026-07-28":
        idea |= {"title": "Plain experts instead of gated ones", "treatment": {"expert_kind": "mlp"}}

    made = session.call("suggest", proposals=[idea])
    assert made["refused"] == []
    [experiment] = made["experiments"]
    assert (experiment["status"], experiment["proposer"]) == ("suggested", "assistant")
    assert made["brief"] is None
    assert f"review(experiment_id={experiment['id']})" in made["next"]

    reviewed = session.call("review", experiment_id=experiment["id"], review=GOOD_REVIEW)
    [review] = reviewed["reviews"]
    assert (review["reviewer"], review["decision"], review["status"]) == ("assistant", "approve", "approved")

    queued = session.call("enqueue", experiment_ids=[experiment["id"]], seeds=2)
    [plan] = queued["plans"]
    assert plan["seeds"] == [1, 2]
    assert plan["runs_new"] + plan["runs_shared"] == 5
    assert "run()" in queued["next"]

    seen = session.call("status", experiment_id=experiment["id"])["experiment"]
    assert seen["status"] == "queued"
    assert sorted(run["arm"] for run in seen["runs"]) == ["baseline", "baseline", "probe", "treatment", "treatment"]
    assert seen["baseline"].keys() == seen["treatment"].keys()

    gone = session.call("run", action="cancel", experiment_id=experiment["id"])
    assert "is cancelled" in gone["done"]
    assert session.call("status", experiment_id=experiment["id"])["experiment"]["status"] == "cancelled"


def test_without_ideas_the_lab_has_some_and_hands_out_the_brief(either: Session) -> None:
    made = either.call("suggest", count=2, idempotency_key="two ideas")
    assert len(made["experiments"]) == 2
    assert {item["proposer"] for item in made["experiments"]} <= {"catalog", "optimizer"}
    assert "top_k" in made["brief"]
    assert len(json.dumps(made)) < 20_000

    again = either.call("suggest", count=2, idempotency_key="two ideas")
    assert [item["id"] for item in again["experiments"]] == [item["id"] for item in made["experiments"]]
    assert "was used for another" in either.refusal("suggest", count=3, idempotency_key="two ideas")


def test_reviewing_without_a_model_scores_by_rubric(either: Session, shared_lab: Lab) -> None:
    [made] = either.call("suggest", count=1)["experiments"]
    answer = either.call("review", experiment_id=made["id"])
    [review] = answer["reviews"]
    assert review["reviewer"] == "rubric"
    assert answer["brief"]
    assert get_experiment(shared_lab.store, made["id"]).status == review["status"]


def test_add_to_queue_goes_all_the_way(either: Session) -> None:
    idea = {**IDEA, "title": "A much larger load-balancing weight", "treatment": {"load_balance_weight": 0.4}}
    made = either.call("suggest", proposals=[idea], add_to_queue=True, idempotency_key="all the way")
    [experiment] = made["experiments"]
    [review] = made["reviews"]
    assert experiment["status"] == ("queued" if review["decision"] == "approve" else review["status"])
    assert len(made["plans"]) == (review["decision"] == "approve")
    again = either.call("suggest", proposals=[idea], add_to_queue=True, idempotency_key="all the way")
    assert again["experiments"][0]["id"] == experiment["id"]
    assert again["plans"] == made["plans"]


def test_what_no_rule_can_improve_comes_back_with_the_brief(either: Session, shared_lab: Lab) -> None:
    poor = put_experiment(shared_lab, title="Try something", hypothesis="It may be better somehow, who knows.")
    low = {**GOOD_REVIEW, "novelty": 3, "clarity": 2, "impact": 3, "feedback": "Say what is expected, and why."}
    [review] = either.call("review", experiment_id=poor.id, review=low)["reviews"]
    assert review["status"] == "needs_work"

    answer = either.call("improve", experiment_id=poor.id)
    [item] = answer["improvements"]
    if item["experiment"] is None:
        assert item["parent_status"] == "needs_work"
        assert "top_k" in answer["brief"]
        revision = {**IDEA, "title": "A tenth of the learning rate", "treatment": {"lr": 0.0011}}
        [item] = either.call("improve", experiment_id=poor.id, revision=revision)["improvements"]

    assert item["experiment"]["parent_id"] == poor.id
    assert get_experiment(shared_lab.store, poor.id).status == "superseded"


@pytest.mark.parametrize("name", VERBS)
def test_an_unknown_argument_is_named_with_the_nearest_known_one(session: Session, name: str) -> None:
    known = {"suggest": "count", "enqueue": "seeds", "status": "limit"}.get(name, "experiment_id")
    text = session.refusal(name, **{known + "x": 1})
    assert f"unknown argument '{known}x'; did you mean '{known}'?" in text
    assert "errors.pydantic.dev" not in text


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("suggest", {"count": 0}, "count: Input should be greater than or equal to 1"),
        ("suggest", {"count": 40}, "max_experiments_per_suggestion"),
        ("suggest", {"domain": "astrology"}, "astrology"),
        ("suggest", {"proposer": "oracle"}, "proposer: Input should be 'auto'"),
        ("suggest", {"proposals": [{**IDEA, "titel": "x"}]}, "unknown argument 'proposals.0.titel'; did you mean 'tit"),
        ("suggest", {"proposals": [{**IDEA, "treatment": {}}]}, "proposals.0.treatment"),
        ("suggest", {"proposals": [{**IDEA, "treatment": {"lr": float("inf")}}]}, "treatment.lr"),
        (
            "suggest",
            {"proposals": [{**IDEA, "treatment": {"lr": None}}]},
            "boolean or a valid integer or a valid number",
        ),
        ("suggest", {"proposals": []}, "proposals"),
        ("suggest", {"proposals": [{**IDEA, "title": "a\0b"}]}, "proposals.0.title: it has control characters"),
        ("review", {"experiment_id": 99_999}, "there is no experiment 99999"),
        ("review", {"experiment_id": -1}, "experiment_id: Input should be greater"),
        ("review", {"review": GOOD_REVIEW}, "give experiment_id too"),
        ("review", {"experiment_id": 1, "review": {**GOOD_REVIEW, "impact": 11}}, "review.impact"),
        ("improve", {"experiment_id": 99_999}, "there is no experiment 99999"),
        ("improve", {"revision": dict(IDEA)}, "give experiment_id too"),
        ("enqueue", {}, "experiment_ids is missing"),
        ("enqueue", {"experiment_ids": []}, "experiment_ids"),
        ("enqueue", {"experiment_ids": [99_999]}, "there is no experiment 99999"),
        ("enqueue", {"experiment_ids": [1], "seeds": 1}, "seeds"),
        ("enqueue", {"experiment_ids": [2**70]}, "a number that is too large for an id"),
        ("enqueue", {"experiment_ids": "one"}, "experiment_ids: Input should be a valid list"),
        ("run", {"action": "explode"}, "action: Input should be 'start', 'stop', 'restart', 'pause'"),
        ("run", {"action": "cancel"}, "needs experiment_id"),
        ("run", {"experiment_id": 99_999}, "there is no experiment 99999"),
        ("status", {"experiment_id": 1, "run_id": 1}, "one of experiment_id, run_id"),
        ("status", {"experiment_id": 99_999}, "there is no experiment 99999"),
        ("status", {"run_id": 99_999}, "there is no run 99999; "),
        ("status", {"task_id": 99_999}, "there is no task 99999; "),
        ("status", {"cycle_id": 99_999}, "there is no cycle 99999; there is none yet"),
        ("status", {"experiment_id": 2**63}, "a number that is too large for an id"),
        ("status", {"wait_seconds": 21}, "wait_seconds: Input should be less than or equal to 20"),
    ],
)
def test_bad_input_is_refused_in_words(either: Session, name: str, arguments: dict[str, Any], words: str) -> None:
    text = either.refusal(name, **arguments)
    assert words in text
    assert "Error executing tool" not in text


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("suggest", {"domain": "x" * 1_000_000}),
        ("suggest", {"proposals": [{**IDEA, "title": "x" * 1_000_000}]}),
        ("suggest", {"proposals": [{**IDEA, "treatment": {"x" * 1_000_000: 1}}]}),
        ("suggest", {"idempotency_key": "x" * 1_000_000}),
        ("review", {"experiment_id": 1, "review": {**GOOD_REVIEW, "feedback": "x" * 1_000_000}}),
        ("improve", {"experiment_id": 1, "revision": {**IDEA, "hypothesis": "x" * 1_000_000}}),
        ("run", {"action": "x" * 1_000_000}),
        ("status", {"x" * 1_000_000: 1}),
    ],
)
def test_a_megabyte_is_refused_briefly(either: Session, name: str, arguments: dict[str, Any]) -> None:
    assert len(either.refusal(name, **arguments)) < 3000


def test_an_unknown_knob_is_refused_with_the_nearest(either: Session) -> None:
    made = either.call("suggest", proposals=[{**IDEA, "treatment": {"top_q": 1}}])
    assert made["experiments"] == []
    [refusal] = made["refused"]
    assert "top_k" in refusal["reason"]
    assert "suggest again" in made["next"]


def test_what_is_run_next_without_a_runner_is_the_runner(either: Session) -> None:
    assert either.call("run", action="resume")["next"] == "run() starts the runner"


def test_status_waits_until_something_changes(either: Session, shared_lab: Lab) -> None:
    experiment = put_experiment(shared_lab)
    other = put_experiment(shared_lab)
    seen = either.call("status", experiment_id=experiment.id)
    begin = time.monotonic()
    either.call("status", experiment_id=experiment.id, wait_seconds=0.6)
    assert 0.6 <= time.monotonic() - begin < 3.0

    move_experiment(shared_lab.store, other.id, "approved", allowed=["suggested"])
    move_experiment(shared_lab.store, experiment.id, "approved", allowed=["suggested"])
    begin = time.monotonic()
    news = either.call("status", experiment_id=experiment.id, wait_seconds=20, since_event=seen["event_id"])
    assert time.monotonic() - begin < 3.0
    assert [event["kind"] for event in news["events"]] == ["approved"]
    assert news["experiment"]["status"] == "approved"


def test_status_does_not_wait_for_what_is_over(either: Session, shared_lab: Lab) -> None:
    experiment = put_experiment(shared_lab)
    move_experiment(shared_lab.store, experiment.id, "cancelled", allowed=["suggested"])
    begin = time.monotonic()
    either.call("status", experiment_id=experiment.id, wait_seconds=20)
    assert time.monotonic() - begin < 3.0


def test_a_full_lab_still_fits_into_an_answer(either: Session, shared_lab: Lab) -> None:
    long = "An idea that needs many words to be said, and says them all. " * 3
    for number in range(45):
        made = put_experiment(shared_lab, title=long, hypothesis=long * 10, treatment={"lr": 0.001 + number / 1e6})

    for seed in range(30):
        put_run(shared_lab, made.id, seed)

    overview = either.call("status", limit=40)
    assert overview["overview"]["truncated"]
    assert len(overview["overview"]["newest"]) == 40
    assert len(json.dumps(overview)) < 24_000
    assert len(json.dumps(either.call("status"))) < 20_000
    one = either.call("status", experiment_id=made.id)
    assert one["experiment"]["runs_truncated"]
    assert len(json.dumps(one)) < 20_000


def test_status_shows_who_is_next_and_why(lab: Lab) -> None:
    register_runner(lab.store, RUNNER)
    first, second = (put_experiment(lab) for _ in range(2))
    waiting, preferred = put_run(lab, first.id), put_run(lab, second.id)
    needs = {"kind": "post", "fingerprint": "p", "seed": 1, "hardware_class": RUNNER["hardware_class"], "code": "c"}
    needs |= {"config": {}, "priority": 0, "needs_run_id": waiting.id}
    post = add_run(lab.store, first.id, "treatment", needs).run
    prioritize_experiment(lab.store, second.id)
    with connect(lab.folder, ERAS[1]) as session:
        up_next = session.call("status")["overview"]["up_next"]
        assert [place["run_id"] for place in up_next] == [preferred.id, waiting.id]
        assert up_next[0]["why"].startswith("priority 1, 0.25 improvements expected for about ")
        shown = session.call("status", run_id=waiting.id)["run"]
        assert (shown["place"], shown["needs_run_id"]) == (up_next[1], None)
        behind = session.call("status", run_id=post.id)["run"]
        assert (behind["place"], behind["needs_run_id"]) == (None, waiting.id)
