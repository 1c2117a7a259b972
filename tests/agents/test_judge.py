"""The judge's budget of error over many hypotheses, its words for costs, and that nothing drops out."""

from __future__ import annotations

from collections.abc import Callable

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
from db.records import OUT_OF_TIME, Experiment, Runner
from moe.accounting import account
from moe.config import Config, apply
from moe.presets import PRESETS
from tests.agents.test_research import approved, lr_matters, luck, settled, verdict_of, work_off


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
