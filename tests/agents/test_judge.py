"""The gates of the judge, its budget of error over many hypotheses, and that nothing drops out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agents import mind
from agents.admission import NotAdmittedError, admit
from agents.planner import enqueue
from agents.preflight import Base
from agents.proposals import Proposal
from db.comparisons import pairs
from db.experiments import get_experiment
from db.hypotheses import list_hypotheses
from db.lab import Lab
from db.records import OUT_OF_TIME, Experiment, Runner, Verdict
from db.store import to_column
from moe.accounting import account
from moe.config import Config, apply
from moe.presets import PRESETS
from tests.agents.test_research import Scorer, approved, lr_matters, luck, settled, verdict_of, work_off


def scored(**changes: Any) -> Scorer:
    """A world in which lr 0.02 helps; `changes` are those of what the treatment's scores say beside that."""

    def score(config: Config, seed: int) -> dict[str, Any]:
        return {"val_bpb": lr_matters(config, seed), **(changes if config.lr == 0.02 else {})}

    return score


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"evaluator": 3}, "differ in the version of the evaluator: 2 and 3"),
        ({"corpus_sha256": "abd"}, "differ in the text"),
        ({"code": "tampered"}, "was scored by another moe/ than the one that it was queued for"),
        ({"split": "val"}, "was scored on val, a confirmation counts on the sealed test split alone"),
        ({"train_overlap": 0.5}, "50% of the text that scores"),
        ({"train_tokens": 10}, "was trained on 10 tokens, not on the"),
    ],
)
def test_what_makes_a_pair_no_fair_comparison_is_said_and_nothing_counts(
    lab: Lab, runner: Runner, changes: dict[str, Any], reason: str
) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, scored())
    mind.work(lab)
    assert verdict_of(lab, experiment).said == "promising"
    verdict = settled(lab, runner, experiment, scored(**changes))
    assert verdict.said == "invalid"
    assert reason in (verdict.reason or "")


def test_a_fair_comparison_passes_all_gates(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    assert settled(lab, runner, experiment, scored()).said == "improved"


@pytest.mark.parametrize("fact", ["evaluator", "code", "corpus_sha256", "split", "train_overlap", "train_tokens"])
def test_a_gate_that_has_nothing_to_look_at_is_not_passed(lab: Lab, runner: Runner, fact: str) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, scored(**{fact: None}))
    treated = pairs(lab.store, experiment.id)[0].treatment
    assert treated is not None
    said = (
        f"{fact} of run {treated.id} (treatment, seed 1) is not known: its score does not say it, so that gate is not"
    )
    assert (verdict.said, verdict.reason) == ("invalid", f"{said} passed")


@pytest.mark.parametrize("fact", ["train_seconds", "steps"])
def test_a_budget_in_seconds_is_known_to_have_been_kept_or_nothing_counts(lab: Lab, runner: Runner, fact: str) -> None:
    base = apply(PRESETS["nano"], {"budget_tokens": None, "budget_seconds": 60.0})
    experiment = approved(lab, {"lr": 0.02}, baseline=base.model_dump())
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, scored(**{fact: None, "train_tokens": None}))
    assert (verdict.reason or "").startswith(f"{fact} of run ")


def older_version(lab: Lab, runner: Runner, *, but_one: bool) -> Verdict:
    """The verdict of a screening by a moe/ of which no score, or one score alone, says train_overlap."""
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, scored())
    lab.store.execute("UPDATE runs SET code = 'older', score = json_set(score, '$.code', 'older')")
    lab.store.execute("UPDATE runs SET score = json_remove(score, '$.train_overlap') WHERE id > ?", (2 * but_one,))
    mind.work(lab)
    return verdict_of(lab, experiment)


def test_what_a_version_never_measured_is_said_to_be_unknown(lab: Lab, runner: Runner) -> None:
    verdict = older_version(lab, runner, but_one=False)
    assert verdict.said == "promising"
    assert (
        "; train_overlap of 4 of the runs is not known, as version older of moe/ never measured it;" in verdict.sentence
    )


def test_what_a_version_did_measure_is_missed(lab: Lab, runner: Runner) -> None:
    verdict = older_version(lab, runner, but_one=True)
    assert verdict.said == "invalid"
    assert "is not known: its score does not say it" in verdict.sentence


def test_a_seed_that_somebody_dropped_is_missed(lab: Lab, runner: Runner) -> None:
    experiment = promising(lab, runner)
    work_off(lab, runner, lr_matters)
    gone = pairs(lab.store, experiment.id, "confirm")[0]
    for run in (gone.baseline, gone.treatment):
        assert run is not None
        lab.store.execute("DELETE FROM experiment_runs WHERE run_id = ?", (run.id,))

    mind.work(lab)
    assert verdict_of(lab, experiment).reason == f"the pair of seed {gone.seed} was drawn and its runs are gone"


def test_a_seed_that_the_lab_did_not_draw_does_not_count(lab: Lab, runner: Runner) -> None:
    experiment = promising(lab, runner)
    work_off(lab, runner, lr_matters)
    (hypothesis,) = list_hypotheses(lab.store)
    lab.store.execute("UPDATE hypotheses SET seeds = ?", (to_column(hypothesis.seeds[:1]),))
    mind.work(lab)
    assert "was not drawn by the lab" in (verdict_of(lab, experiment).reason or "")


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("code", "the two sides of seed 1 differ in the version of moe/ that trained them: other and "),
        ("hardware_class", "the two sides of seed 1 differ in the kind of hardware: other and "),
    ],
)
def test_the_sides_of_a_screening_pair_are_made_alike_too(lab: Lab, runner: Runner, column: str, reason: str) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, lr_matters)
    run = pairs(lab.store, experiment.id)[0].baseline
    assert run is not None
    lab.store.execute(f"UPDATE runs SET {column} = 'other' WHERE id = ?", (run.id,))
    lab.store.execute("UPDATE runs SET score = json_set(score, '$.code', code) WHERE id = ?", (run.id,))
    mind.work(lab)
    assert (verdict_of(lab, experiment).reason or "").startswith(reason)


def test_both_sides_of_a_screening_are_scored_on_one_split(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])

    def world(config: Config, seed: int) -> dict[str, Any]:
        return {"val_bpb": 3.0, "split": "test" if config.lr == 0.02 else "val"}

    work_off(lab, runner, world)
    mind.work(lab)
    assert verdict_of(lab, experiment).reason == "the two sides of seed 1 differ in the split: val and test"


def test_who_trained_for_longer_than_its_seconds_has_had_another_budget(lab: Lab, runner: Runner) -> None:
    base = apply(PRESETS["nano"], {"budget_tokens": None, "budget_seconds": 60.0})
    experiment = approved(lab, {"lr": 0.02}, baseline=base.model_dump())
    enqueue(lab, [experiment.id])

    def world(config: Config, seed: int) -> dict[str, Any]:
        return {"val_bpb": 3.0, "train_seconds": 63.0 if config.lr == 0.02 else 61.0, "steps": 100}

    work_off(lab, runner, world)
    mind.work(lab)
    assert "was trained for 63.0 s, not for the 60 s of its budget" in (verdict_of(lab, experiment).reason or "")


def test_a_baseline_that_diverges_leaves_nothing_to_compare_with(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, lambda config, seed: 3.0 if config.lr == 0.02 or seed == 1 else None)
    assert verdict.said == "invalid"
    assert "the baseline itself did not finish with seed 2: train_loss is not finite" in (verdict.reason or "")


def test_two_kinds_of_hardware_never_meet_in_a_pair(lab: Lab, runner: Runner) -> None:
    experiment = promising(lab, runner)
    work_off(lab, runner, lr_matters)
    run = pairs(lab.store, experiment.id, "confirm")[0].baseline
    assert run is not None
    lab.store.execute("UPDATE runs SET hardware_class = 'another card' WHERE id = ?", (run.id,))
    mind.work(lab)
    assert "differ in the kind of hardware: another card and" in (verdict_of(lab, experiment).reason or "")


def test_a_run_that_was_stopped_because_it_cannot_win_is_not_called_diverged(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, lambda config, seed: None if config.lr == 0.02 else 3.0)
    said = "stopped at step 10 of 40: val_bpb 4.100 is 1.000 behind run 2, the baseline of seed 1"
    found = pairs(lab.store, experiment.id)
    for pair in found:
        assert pair.treatment is not None
        assert pair.baseline is not None
        values = (said, pair.baseline.id, pair.treatment.id)
        lab.store.execute("UPDATE runs SET error = ?, beaten_by = ? WHERE id = ?", values)

    mind.work(lab)
    verdict = verdict_of(lab, experiment)
    assert (verdict.said, verdict.final, verdict.reason) == ("not promising", True, said)


THROTTLED = "the card was throttled in 3 of 5 looks (power cap)"


def disturb(lab: Lab, experiment: Experiment) -> None:
    """The card is throttled while the first treatment trains."""
    run = pairs(lab.store, experiment.id)[0].treatment
    assert run is not None
    lab.store.execute("UPDATE runs SET disturbance = ? WHERE id = ?", (THROTTLED, run.id))


def test_a_disturbed_run_makes_equal_seconds_no_fair_comparison(lab: Lab, runner: Runner) -> None:
    base = apply(PRESETS["nano"], {"budget_tokens": None, "budget_seconds": 60.0})
    experiment = approved(lab, {"lr": 0.02}, baseline=base.model_dump())
    enqueue(lab, [experiment.id])
    disturb(lab, experiment)
    verdict = settled(lab, runner, experiment, lr_matters)
    assert (verdict.said, verdict.reason) == (
        "invalid",
        f"the treatment run with seed 1 was disturbed, and time is what is compared: {THROTTLED}",
    )


def test_a_disturbed_run_of_equal_tokens_is_named_and_counts(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    disturb(lab, experiment)
    work_off(lab, runner, lr_matters)
    mind.work(lab)
    verdict = verdict_of(lab, experiment)
    assert verdict.said == "promising"
    assert "the card was disturbed during 1 of the runs" in verdict.sentence


def test_a_pair_that_diverged_counts_at_the_worst(lab: Lab, runner: Runner) -> None:
    experiment = promising(lab, runner)
    (hypothesis,) = list_hypotheses(lab.store)
    bad = hypothesis.seeds[0]

    def sometimes(config: Config, seed: int) -> float | None:
        return None if seed == bad and config.lr == 0.02 else lr_matters(config, seed)

    verdict = settled(lab, runner, experiment, sometimes)
    assert verdict.said == "no evidence yet"
    assert "1 of which did not finish" in verdict.sentence
    assert verdict.effect is not None
    assert verdict.effect > 0.0


def test_a_treatment_that_runs_out_of_time_counts_at_the_worst(lab: Lab, runner: Runner) -> None:
    experiment = promising(lab, runner)
    work_off(lab, runner, lr_matters)
    slow = pairs(lab.store, experiment.id, "confirm")[0].treatment
    assert slow is not None
    said = f"{OUT_OF_TIME}: it ran for more than 60 s (runner.max_run_seconds)"
    lab.store.execute("UPDATE runs SET status = 'failed', score = NULL, error = ? WHERE id = ?", (said, slow.id))
    mind.work(lab)
    verdict = verdict_of(lab, experiment)
    assert (verdict.said, verdict.pairs) == ("no evidence yet", 2)
    assert "1 of which did not finish" in verdict.sentence
    assert verdict.effect is not None
    assert verdict.effect > 0.0


def test_more_compute_is_named(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"num_experts": 8, "top_k": 4})
    enqueue(lab, [experiment.id])

    def world(config: Config, seed: int) -> float:
        return 3.0 - (0.1 if config.top_k == 4 else 0.0) + 0.003 * luck(seed, config.top_k)

    verdict = settled(lab, runner, experiment, world)
    assert verdict.said == "improved"
    assert "times the FLOPs a token (whether compute alone brought it: ask again with equal_flops)" in verdict.sentence


def test_a_bigger_model_of_the_same_compute_is_named_too(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"num_experts": 8})
    enqueue(lab, [experiment.id])

    def world(config: Config, seed: int) -> float:
        return 3.0 - (0.1 if config.num_experts == 8 else 0.0) + 0.003 * luck(seed, config.num_experts)

    verdict = settled(lab, runner, experiment, world)
    assert verdict.said == "improved"
    assert verdict.treatment_parameters is not None
    assert verdict.baseline_parameters is not None
    ratio = verdict.treatment_parameters / verdict.baseline_parameters
    assert ratio > 1.3
    assert f", with {ratio:.2f} times the parameters" in verdict.sentence


def test_compute_can_be_taken_out_of_a_comparison(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"num_experts": 8, "top_k": 4}, equal_flops=True)
    enqueue(lab, [experiment.id])
    trained: dict[int, int | None] = {}

    def world(config: Config, seed: int) -> float:
        trained[config.top_k] = config.budget_tokens
        return 3.0 - (0.1 if config.top_k == 4 else 0.0) + 0.003 * luck(seed, config.top_k)

    verdict = settled(lab, runner, experiment, world)
    assert verdict.said == "improved"
    assert "at equal FLOPs: 0." in verdict.sentence
    more, fewer = trained[2], trained[4]
    assert more is not None
    assert fewer is not None
    cost = account(apply(PRESETS["nano"], {"num_experts": 8, "top_k": 4})).flops_per_token
    assert verdict.treatment_flops == pytest.approx(verdict.baseline_flops, rel=0.05)
    assert fewer * cost == pytest.approx(more * account(PRESETS["nano"]).flops_per_token, rel=0.05)


def test_equal_flops_of_equal_costs_are_no_question_of_their_own(lab: Lab) -> None:
    base = Base(preset="nano", config=PRESETS["nano"])
    idea = Proposal(
        title="Muon", hypothesis="it lowers val_bpb", domain="optimization", treatment={"lr": 0.02}, equal_flops=True
    )
    with pytest.raises(NotAdmittedError, match="equal_flops changes nothing here"):
        admit(lab, base, idea, proposer="assistant")

    wider = idea.model_copy(update={"treatment": {"top_k": 3}})
    admit(lab, base, wider, proposer="assistant")
    admit(lab, base, wider.model_copy(update={"equal_flops": False}), proposer="assistant")
    with pytest.raises(NotAdmittedError, match="asked before"):
        admit(lab, base, wider, proposer="assistant")


def test_a_claim_stays_with_the_evidence_that_it_was_made_on(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    settled(lab, runner, experiment, lr_matters)
    (before,) = list_hypotheses(lab.store)
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, lambda config, seed: 3.0 + 0.01 * luck(seed, config.lr))
    (after,) = list_hypotheses(lab.store)
    assert (before.claim, after.claim, after.improved) == ("improved", "improved", before.improved)
    assert len(verdict.seeds) == len(before.seeds) + 1


def test_the_more_is_registered_the_more_a_claim_needs_and_each_claim_helps_the_next(lab: Lab, runner: Runner) -> None:
    def world(config: Config, seed: int) -> float:
        gain = 0.1 if config.beta1 == 0.8 else 0.04 if config.lr > 0.01 else 0.0
        return 3.0 + 0.01 * luck(seed) - gain + 0.01 * luck(seed, config.lr, config.beta1)

    asked = [approved(lab, {"lr": round(0.011 + 0.001 * number, 3)}) for number in range(4)]
    enqueue(lab, [item.id for item in asked], confirm=True)
    for item in asked:
        settled(lab, runner, item, world)

    strong = approved(lab, {"beta1": 0.8})
    enqueue(lab, [strong.id])
    assert settled(lab, runner, strong, world).said == "improved"
    registered = list_hypotheses(lab.store)
    assert len(registered) == 5
    assert registered[-1].claim == "improved"
    assert registered[-1].lab_claim == "improved"
    for hypothesis in registered:
        verdict = verdict_of(lab, get_experiment(lab.store, hypothesis.experiment_id))
        assert (hypothesis.claim or "no evidence yet") == verdict.said


def test_the_noise_is_fixed_at_the_first_look_at_new_pairs_by_all_that_is_known_then(lab: Lab, runner: Runner) -> None:
    """What the lab learns while the first new pairs train counts; what it learns after the first look does not."""
    first = promising(lab, runner)
    registered = list_hypotheses(lab.store)[0]
    assert registered.noise_df is not None
    for beta1 in (0.8, 0.85):
        enqueue(lab, [approved(lab, {"beta1": beta1}).id], priority=5)
        work_off(lab, runner, lr_matters, most=3)  # a probe and two treatments; the baselines are there
        mind.work(lab)

    work_off(lab, runner, lr_matters)
    mind.work(lab)
    looked = list_hypotheses(lab.store)[0]
    assert looked.noise_df is not None
    assert looked.noise_df > registered.noise_df
    verdict = verdict_of(lab, first)
    assert (verdict.stage, verdict.noise, verdict.noise_df) == ("confirm", looked.noise_sd, looked.noise_df)

    settled(lab, runner, first, lr_matters)
    enqueue(lab, [approved(lab, {"beta1": 0.7}).id])
    work_off(lab, runner, lr_matters)
    mind.work(lab)
    enqueue(lab, [first.id])
    settled(lab, runner, first, lr_matters)
    assert (list_hypotheses(lab.store)[0].noise_sd, verdict_of(lab, first).noise) == (looked.noise_sd, looked.noise_sd)


@pytest.mark.parametrize(("campaign", "names"), [("night 7", ["night 7"]), ("cycle", ["lab"])])
def test_a_campaign_has_the_name_that_the_configuration_gives_it(
    configured: Callable[[str], Lab], register: Callable[[Lab], Runner], campaign: str, names: list[str]
) -> None:
    lab = configured(f'campaign = "{campaign}"\n')
    promising(lab, register(lab))
    assert [item.campaign for item in list_hypotheses(lab.store)] == names


def promising(lab: Lab, runner: Runner) -> Experiment:
    """An experiment that screening has found promising, and whose first new pairs are queued."""
    experiment = approved(lab, {"lr": 0.02})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, lr_matters)
    mind.work(lab)
    assert verdict_of(lab, experiment).said == "promising"
    return experiment


def test_a_plan_quotes_the_noise_that_earlier_experiments_have_shown(lab: Lab, runner: Runner) -> None:
    first, second = approved(lab, {"beta1": 0.8}), approved(lab, {"beta1": 0.85})
    (plan,) = enqueue(lab, [first.id]).plans
    assert "the noise floor here is not measured yet" in plan.notes[-1]
    settled(lab, runner, first, lr_matters)
    (plan,) = enqueue(lab, [second.id]).plans
    assert "the noise floor here is 0.00" in plan.notes[-1]
    assert verdict_of(lab, first).noise
