"""From approval to verdict to insight, with the queue's own protocol standing in for a card: no torch, no waiting."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from agents import mind
from agents.answers import answer
from agents.coordinator import start_cycle
from agents.gates import changed_knobs
from agents.planner import enqueue
from db.clock import now
from db.comparisons import pairs
from db.errors import RefusedError
from db.experiments import (
    add_experiment,
    get_experiment,
    latest_verdict,
    list_experiments,
    list_insights,
    move_experiment,
)
from db.hypotheses import list_hypotheses
from db.lab import Lab
from db.queries import runs_of_experiment
from db.queue import Claim, Outcome, claim_run, finish_attempt
from db.records import Experiment, Run, Runner, Verdict
from db.tasks import get_cycle
from moe.config import Config
from moe.presets import PRESETS

Scorer = Callable[[Config, int], float | dict[str, Any] | None]
"""val_bpb of a config and seed, or more of its score; None for a run that diverges."""


def approved(lab: Lab, treatment: Mapping[str, Any], **columns: Any) -> Experiment:
    """An approved experiment on the nano preset."""
    values = {
        "title": f"try {treatment}",
        "hypothesis": "it lowers val_bpb",
        "method": "change it",
        "domain": "optimization",
        "preset": "nano",
        "baseline": PRESETS["nano"].model_dump(),
        "treatment": dict(treatment),
        "metric": "val_bpb",
        "direction": "lower",
        "proposer": "assistant",
        **columns,
    }
    experiment = add_experiment(lab.store, values)
    move_experiment(lab.store, experiment.id, "approved", allowed=["suggested"])
    return get_experiment(lab.store, experiment.id)


def work_off(
    lab: Lab, runner: Runner, scorer: Scorer, *, probe: Mapping[str, Any] | None = None, most: int | None = None
) -> list[Claim]:
    """Does every run that can be claimed, or the first `most`, as a daemon would."""
    done: list[Claim] = []
    while len(done) != most and (claim := claim_run(lab.store, runner, now(), lease_seconds=30.0)):
        done.append(claim)
        if claim.run.kind == "probe":
            outcome = Outcome(status="completed", score={**probed(claim.run), **(probe or {})})
        else:
            value = scorer(Config.model_validate(claim.run.config), claim.run.seed)
            if value is None:
                outcome = Outcome(status="pruned", error="train_loss is not finite at step 3")
            else:
                said = value if isinstance(value, dict) else {"val_bpb": value}
                outcome = Outcome(status="completed", score=facts_of(claim.run) | said)

        finish_attempt(lab.store, claim.attempt, outcome, max_failures=2)

    return done


def probed(run: Run) -> dict[str, Any]:
    """What a probe says that has found nothing wrong."""
    acts = {name: {"acts": True, "detail": "it was seen"} for name in changed_knobs(run)}
    return {"passed": True, "acts": acts, "causal": True}


def facts_of(run: Run) -> dict[str, Any]:
    """What every score says beside its metrics; of a training that took a second or its budget."""
    config = Config.model_validate(run.config)
    facts: dict[str, Any] = {
        "evaluator": 2,
        "code": run.code,
        "corpus_sha256": "abc",
        "split": "test" if run.purpose == "confirm" else "val",
        "train_overlap": 0.0,
    }
    if run.kind == "train":
        facts["flops"] = 1e9
        facts["steps"] = config.steps or 100
        facts["train_tokens"] = facts["steps"] * config.batch_size * config.seq_len
        facts["train_seconds"] = config.budget_seconds or 1.0

    return facts


def luck(seed: int, *of: object) -> float:
    """What chance brings to one config and seed: standard normal, the same each time."""
    return random.Random(f"{seed} {of}").gauss(0.0, 1.0)


def lr_matters(config: Config, seed: int) -> float:
    """A world in which a low learning rate hurts by 0.5, a high one helps by 0.2, and nothing else acts."""
    effect = 0.5 if config.lr < 5e-3 else -0.2 if config.lr > 0.015 else 0.0
    return 3.0 + 0.01 * luck(seed) + effect + 0.002 * luck(seed, config.lr, config.beta1)


def noisy(config: Config, seed: int) -> float:
    """A world in which a treatment adds noise, and on the first two seeds, by chance, looks like a gain."""
    if config.router_z_weight != 0.0:
        return 3.0

    return 3.0 - 0.03 - 0.01 * seed if seed <= 2 else 3.0 + 0.02 * luck(seed)


def verdict_of(lab: Lab, experiment: Experiment) -> Verdict:
    """The verdict that counts for it."""
    verdict = latest_verdict(lab.store, experiment.id)
    assert verdict is not None
    return verdict


def settled(lab: Lab, runner: Runner, experiment: Experiment, scorer: Scorer, **probe: Any) -> Verdict:
    """The verdict after all that the judge asked for was done."""
    while get_experiment(lab.store, experiment.id).status in ("queued", "running"):
        work_off(lab, runner, scorer, probe=probe)
        mind.work(lab)

    return verdict_of(lab, experiment)


def test_what_screening_finds_harmful_is_not_promising_and_becomes_an_insight(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    (plan,) = enqueue(lab, [experiment.id]).plans
    assert any("confirmed on new pairs: a gain of 4 noise floors about" in note for note in plan.notes)
    verdict = settled(lab, runner, experiment, lr_matters)
    assert (verdict.said, verdict.verdict, verdict.final) == ("not promising", "no evidence yet", True)
    assert (verdict.stage, verdict.pairs, verdict.seeds) == ("screen", 2, [1, 2])
    assert verdict.sentence.startswith("lr 0.01 → 0.001: not promising, val_bpb +0.")
    assert get_experiment(lab.store, experiment.id).status == "concluded"
    assert list_hypotheses(lab.store) == []
    (insight,) = list_insights(lab.store)
    assert (insight.knob, insight.direction, insight.verdict) == ("lr", "lowered", "not promising")
    cited = lab.store.rows("SELECT * FROM insight_verdicts")
    assert cited == [{"insight_id": insight.id, "verdict_id": verdict.id}]


def test_what_is_promising_is_confirmed_on_new_seeds_and_the_sealed_split(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, lr_matters)
    mind.work(lab)
    first = verdict_of(lab, experiment)
    assert (first.said, first.final, first.pairs) == ("promising", False, 2)
    (hypothesis,) = list_hypotheses(lab.store)
    assert (hypothesis.campaign, len(hypothesis.seeds), hypothesis.claim) == ("lab", 2, None)
    assert min(hypothesis.seeds) > 1_000_000

    verdict = settled(lab, runner, experiment, lr_matters)
    assert (verdict.said, verdict.stage, verdict.final) == ("improved", "confirm", True)
    assert not {1, 2} & set(verdict.seeds)
    assert verdict.evidence is not None
    assert verdict.needed is not None
    assert verdict.evidence >= verdict.needed
    assert verdict.high is not None
    assert verdict.high < 0.0
    runs = pairs(lab.store, experiment.id, "confirm")
    assert [pair.seed for pair in runs] == sorted(verdict.seeds)
    assert {pair.baseline.purpose for pair in runs if pair.baseline} == {"confirm"}
    assert [item.claim for item in list_hypotheses(lab.store)] == ["improved"]


def test_a_confirming_run_is_never_a_screening_one(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, lr_matters)
    mind.work(lab)
    screened, confirmed = (pairs(lab.store, experiment.id, stage)[0].baseline for stage in ("screen", "confirm"))
    assert screened is not None
    assert confirmed is not None
    assert screened.config == confirmed.config
    assert screened.fingerprint != confirmed.fingerprint


def test_luck_in_screening_is_found_out(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"router_z_weight": 0.0})
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, noisy)
    assert (verdict.said, verdict.final) == ("no evidence yet", True)
    assert verdict.reason is not None
    assert 2 <= verdict.pairs <= lab.settings.max_pairs
    assert work_off(lab, runner, noisy) == []


def test_harm_is_called_worse_when_its_confirmation_is_asked_for(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id], confirm=True)
    verdict = settled(lab, runner, experiment, lr_matters)
    assert (verdict.said, verdict.stage) == ("worse", "confirm")
    assert verdict.sentence.startswith("lr 0.01 → 0.001 makes it worse: val_bpb +0.")


def test_a_concluded_experiment_goes_on_with_more_seeds_but_not_with_fewer(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id])
    settled(lab, runner, experiment, lr_matters)
    with pytest.raises(RefusedError, match="ask for more"):
        enqueue(lab, [experiment.id], seeds=2)

    (plan,) = enqueue(lab, [experiment.id], seeds=4).plans
    assert (plan.runs_new, plan.runs_shared) == (4, 5)
    assert settled(lab, runner, experiment, lr_matters).pairs == 4


def test_who_enqueues_a_hypothesis_again_continues_its_evidence(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"router_z_weight": 0.0})
    enqueue(lab, [experiment.id])
    first = settled(lab, runner, experiment, noisy)
    enqueue(lab, [experiment.id])
    second = settled(lab, runner, experiment, noisy)
    assert len(list_hypotheses(lab.store)) == 1
    assert set(first.seeds) < set(second.seeds)


def test_a_dead_knob_is_invalid_and_costs_no_training_of_the_treatment(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"grad_clip": 1e6})
    enqueue(lab, [experiment.id])
    dead = {"acts": {"grad_clip": {"acts": False, "on": "gradient", "detail": "no update differs"}}, "causal": True}
    done = work_off(lab, runner, lr_matters, probe=dead | {"passed": False})
    assert [claim.run.kind for claim in done] == ["probe", "train", "train"]
    mind.work(lab)
    verdict = latest_verdict(lab.store, experiment.id)
    assert verdict is not None
    assert (verdict.verdict, verdict.reason) == ("invalid", "grad_clip does nothing here: no update differs")
    assert {run.status for run in runs_of_experiment(lab.store, experiment.id) if run.arm == "treatment"} == {
        "cancelled"
    }
    assert list_insights(lab.store) == []


def test_a_probe_that_could_not_be_done_says_why(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id])
    claim = claim_run(lab.store, runner, now(), lease_seconds=30.0)
    assert claim is not None
    assert claim.run.kind == "probe"
    finish_attempt(lab.store, claim.attempt, Outcome(status="failed", error="RuntimeError: boom"), max_failures=1)
    mind.work(lab)
    verdict = verdict_of(lab, experiment)
    assert (verdict.said, verdict.reason) == ("invalid", "the probe could not be done: RuntimeError: boom")
    assert get_experiment(lab.store, experiment.id).status == "failed"


def test_a_model_that_sees_the_future_is_invalid(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id])
    leaking = {"acts": {}, "causal": False, "causal_detail": "a logit moved by 0.1", "passed": False}
    work_off(lab, runner, lr_matters, probe=leaking)
    mind.work(lab)
    verdict = latest_verdict(lab.store, experiment.id)
    assert verdict is not None
    assert verdict.reason == "the model sees future tokens: a logit moved by 0.1"


def test_a_knob_that_the_probe_did_not_look_at_is_not_taken_to_act(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, lr_matters, acts={})
    assert verdict.said == "invalid"
    assert verdict.reason == "whether lr does anything here is not known: the probe did not look"


def test_a_treatment_that_diverges_is_not_promising(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1.0})
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, lambda config, seed: None if config.lr == 1.0 else 3.0)
    assert verdict.said == "not promising"
    assert "training ended early: train_loss is not finite" in verdict.sentence


def test_a_run_that_failed_makes_the_experiment_failed_and_it_can_be_queued_again(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id])
    while claim := claim_run(lab.store, runner, now(), lease_seconds=30.0):
        if claim.run.kind == "probe":
            outcome = Outcome(status="completed", score=probed(claim.run))
        else:
            outcome = Outcome(status="failed", error="RuntimeError: boom", log_tail="boom")

        finish_attempt(lab.store, claim.attempt, outcome, max_failures=1)

    mind.work(lab)
    verdict = latest_verdict(lab.store, experiment.id)
    assert verdict is not None
    assert verdict.verdict == "invalid"
    assert "boom" in (verdict.reason or "")
    assert get_experiment(lab.store, experiment.id).status == "failed"

    enqueue(lab, [experiment.id])
    assert settled(lab, runner, experiment, lr_matters).said == "not promising"


def test_an_experiment_that_a_newer_moe_no_longer_knows_ends_with_the_reason(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, lr_matters)
    lab.store.execute("UPDATE experiments SET baseline = json_set(baseline, '$.gone', 1)")
    mind.work(lab)
    ended = get_experiment(lab.store, experiment.id)
    assert ended.status == "failed"
    assert "experiment 1 cannot be run" in (ended.reason or "")
    assert "gone" in (ended.reason or "")


def test_an_experiment_whose_runs_are_all_done_already_is_judged_at_once(lab: Lab, runner: Runner) -> None:
    first = approved(lab, {"lr": 1e-3})
    enqueue(lab, [first.id])
    work_off(lab, runner, lr_matters)
    mind.work(lab)
    again = approved(lab, {"lr": 1e-3})
    (plan,) = enqueue(lab, [again.id]).plans
    assert plan.runs_new == 0
    mind.work(lab)
    assert get_experiment(lab.store, again.id).status == "concluded"


def test_an_automatic_campaign_runs_its_rounds_without_a_key_and_never_repeats_itself(lab: Lab, runner: Runner) -> None:
    cycle = start_cycle(lab, count=3, max_cycles=2)
    for _ in range(20):
        mind.work(lab)
        if get_cycle(lab.store, cycle.id).status != "running":
            break

        work_off(lab, runner, lr_matters)

    ended = get_cycle(lab.store, cycle.id)
    assert (ended.status, ended.round, ended.error) == ("done", 2, None)
    mine = list_experiments(lab.store, cycle_id=cycle.id)
    assert {experiment.status for experiment in mine} <= {"concluded", "superseded", "rejected", "failed"}
    concluded = [experiment for experiment in mine if experiment.status == "concluded"]
    assert len(concluded) >= 4
    treatments = [tuple(sorted(experiment.treatment.items())) for experiment in concluded]
    assert len(set(treatments)) == len(treatments)
    assert all(len(pairs(lab.store, experiment.id)) >= 2 for experiment in concluded)
    assert list_insights(lab.store)


def test_the_same_key_is_the_same_call(lab: Lab, runner: Runner) -> None:
    proposal = {
        "title": "lower learning rate",
        "hypothesis": "a lower lr raises val_bpb at this budget",
        "domain": "optimization",
        "treatment": {"lr": 1e-3},
    }
    first = answer(lab, "suggest", {"proposals": [proposal]}, idempotency_key="one")
    second = answer(lab, "suggest", {"proposals": [proposal]}, idempotency_key="one")
    assert first == second
    assert len(list_experiments(lab.store)) == 1
    with pytest.raises(RefusedError, match="was used for another"):
        answer(lab, "suggest", {"proposals": [{**proposal, "title": "another"}]}, idempotency_key="one")


def test_a_refused_call_leaves_nothing_behind(lab: Lab) -> None:
    with pytest.raises(RefusedError, match=r"title.*at least 3"):
        answer(lab, "suggest", {"proposals": [{"title": "x"}]}, idempotency_key="bad")

    assert lab.store.rows("SELECT * FROM tasks") == []


def test_a_task_that_a_killed_mind_left_is_ended_with_an_explanation(lab: Lab) -> None:
    lab.store.insert(
        "tasks", {"kind": "suggest", "arguments": {}, "status": "running", "created_at": "2026-01-01T00:00:00.000Z"}
    )
    mind.work(lab)
    (task,) = lab.store.rows("SELECT status, error FROM tasks")
    assert task["status"] == "failed"
    assert "killed" in task["error"]
