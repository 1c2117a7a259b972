"""Questions about trained weights: what is queued for them, and what may be called a gain."""

from __future__ import annotations

import re
from typing import Any

import pytest

from agents import mind
from agents.admission import NotAdmittedError, admit
from agents.planner import enqueue
from agents.preflight import Base
from agents.proposals import Proposal
from db.comparisons import pairs, scored_pairs
from db.errors import RefusedError
from db.experiments import get_experiment, latest_verdict, list_insights
from db.lab import Lab
from db.queries import runs_of_experiment, trained_runs
from db.queue import get_run
from db.records import Experiment, Runner, Verdict
from db.weights import forget_weights
from moe.config import Config, apply
from moe.presets import PRESETS
from tests.agents.test_research import Scorer, approved, lr_matters, luck, settled, work_off

SMALLER: dict[str, Any] = {
    "metric": "weight_bytes",
    "direction": "lower",
    "guard_metric": "val_bpb",
    "guard_margin": 0.02,
}
CAUSAL_LABEL = "not causal: the treatment can look at later tokens, so the score is no likelihood of text"


def served(loss: float, *, noise: float = 0.0) -> Scorer:
    """A world in which int8 takes a quarter of the bytes and costs `loss` bits per byte."""

    def score(config: Config, seed: int) -> dict[str, float]:
        quantized = config.quantize != "none"
        val_bpb = 3.0 + 0.01 * luck(seed) + (loss + noise * luck(seed, loss) if quantized else 0.0)
        return {"val_bpb": val_bpb, "weight_bytes": 25_000.0 if quantized else 100_000.0}

    return score


def judged(lab: Lab, runner: Runner, experiment: Experiment, scorer: Scorer, **probe: Any) -> Verdict:
    """The verdict after all that the judge asked for was done."""
    enqueue(lab, [experiment.id])
    return settled(lab, runner, experiment, scorer, **probe)


def test_both_sides_are_made_of_the_same_checkpoints_and_train_once(lab: Lab, runner: Runner) -> None:
    first = approved(lab, {"quantize": "int8"}, **SMALLER)
    second = approved(lab, {"quantize": "int4"}, **SMALLER)
    plans = enqueue(lab, [first.id, second.id]).plans
    assert [(plan.runs_new, plan.runs_shared) for plan in plans] == [(7, 0), (3, 4)]
    assert any("trains nothing of its own" in note for note in plans[0].notes)
    done = [(claim.run.kind, claim.run.config["quantize"]) for claim in work_off(lab, runner, served(0.0))]
    assert done[:4] == [("probe", "int8"), ("probe", "int4"), ("train", "none"), ("train", "none")]
    assert sorted(done[4:]) == [("post", kind) for kind in ("int4", "int4", "int8", "int8", "none", "none")]
    for pair in pairs(lab.store, first.id):
        assert pair.baseline is not None
        assert pair.treatment is not None
        assert pair.baseline.needs_run_id == pair.treatment.needs_run_id != None  # noqa: E711
    assert [run.arm for run in runs_of_experiment(lab.store, first.id)] == [
        "probe",
        *["checkpoint", "baseline", "treatment"] * 2,
    ]


def test_fewer_bytes_are_a_gain_while_the_guard_stays_within_its_margin(lab: Lab, runner: Runner) -> None:
    verdict = judged(lab, runner, approved(lab, {"quantize": "int8"}, **SMALLER), served(0.001))
    assert (verdict.verdict, verdict.effect) == ("improved", -75_000)
    assert verdict.guard_effect == pytest.approx(0.001)
    assert verdict.sentence == (
        "quantize none → int8 improves weight_bytes -75,000 [-75,000, -75,000] over 2 new pairs; "
        "val_bpb +0.00100 [+0.00100, +0.00100] is within the margin of 0.02."
    )


def test_beyond_the_margin_they_are_not(lab: Lab, runner: Runner) -> None:
    verdict = judged(lab, runner, approved(lab, {"quantize": "int8"}, **SMALLER), served(0.05))
    assert (verdict.said, verdict.pairs) == ("not promising", 2)
    assert "is beyond the margin of 0.02" in verdict.sentence


def test_near_the_margin_more_pairs_are_asked_for(lab: Lab, runner: Runner) -> None:
    verdict = judged(lab, runner, approved(lab, {"quantize": "int8"}, **SMALLER), served(0.0195, noise=0.004))
    assert (verdict.said, verdict.pairs) == ("no evidence yet", lab.settings.max_pairs)
    assert "is not surely within the margin of 0.02" in verdict.sentence
    # Bytes are counted; what the guard lost is written to the digits of its own noise.
    assert re.search(r"weight_bytes -75,000 .* val_bpb \+0\.\d{4} \[", verdict.sentence)


def test_a_gain_in_bytes_that_surely_costs_more_than_the_margin_is_worse(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"quantize": "int8"}, **SMALLER)
    enqueue(lab, [experiment.id], confirm=True)
    verdict = settled(lab, runner, experiment, served(0.05, noise=0.002))
    assert (verdict.said, verdict.stage) == ("worse", "confirm")
    assert "is beyond the margin of 0.02" in verdict.sentence


def test_a_treatment_of_training_may_be_judged_by_what_is_served(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"num_experts": 2}, **SMALLER)
    assert enqueue(lab, [experiment.id]).plans[0].runs_new == 9

    def score(config: Config, seed: int) -> dict[str, float]:
        return {"val_bpb": 3.0, "weight_bytes": 1000.0 * config.num_experts}

    done = work_off(lab, runner, score)
    assert [claim.run.kind for claim in done].count("train") == 4
    mind.work(lab)
    verdict = settled(lab, runner, experiment, score)
    assert (verdict.verdict, verdict.effect) == ("improved", -2000.0)


@pytest.mark.parametrize(
    ("lr", "treatment", "word"), [(0.01, {"lr": 1.0}, "not promising"), (1.0, {"beta1": 0.8}, "invalid")]
)
def test_without_a_checkpoint_nothing_waits_forever(
    lab: Lab, runner: Runner, lr: float, treatment: dict[str, Any], word: str
) -> None:
    baseline = apply(PRESETS["nano"], {"lr": lr}).model_dump()
    experiment = approved(lab, treatment, **SMALLER | {"baseline": baseline})
    calm = served(0.0)
    verdict = judged(lab, runner, experiment, lambda config, seed: None if config.lr == 1.0 else calm(config, seed))
    assert verdict.said == word
    assert "left no checkpoint: train_loss is not finite at step 3" in verdict.sentence


def test_a_speed_that_was_measured_on_a_disturbed_card_is_none(lab: Lab, runner: Runner) -> None:
    faster = {**SMALLER, "metric": "decode_tokens_per_second", "direction": "higher"}
    experiment = approved(lab, {"quantize": "int8"}, **faster)
    enqueue(lab, [experiment.id])
    work_off(lab, runner, lambda config, seed: {"val_bpb": 3.0, "decode_tokens_per_second": 100.0})
    lab.store.execute("UPDATE runs SET disturbance = 'throttled' WHERE kind = 'post'")
    mind.work(lab)
    verdict = latest_verdict(lab.store, experiment.id)
    assert verdict is not None
    assert "was disturbed, and time is what is compared: throttled" in (verdict.reason or "")


def test_a_score_without_the_metric_is_no_result(lab: Lab, runner: Runner) -> None:
    verdict = judged(lab, runner, approved(lab, {"quantize": "int8"}, **SMALLER), lambda *_: {"val_bpb": 3.0})
    assert verdict.verdict == "invalid"
    assert "has no weight_bytes" in verdict.sentence


def test_a_model_that_looks_ahead_and_says_so_never_simply_improves(lab: Lab, runner: Runner) -> None:
    def better(config: Config, seed: int) -> float:
        return 3.0 + 0.01 * luck(seed) - (0.0 if config.causal else 0.5 + 0.001 * luck(seed, "ahead"))

    experiment = approved(lab, {"routing": "expert_choice"})
    verdict = judged(lab, runner, experiment, better, causal=False, declared_causal=False)
    assert verdict.verdict == "improved but not causal"
    assert verdict.sentence.endswith(f"; {CAUSAL_LABEL}.")


def test_one_that_claims_to_be_causal_and_is_not_is_invalid(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 0.02})
    verdict = judged(lab, runner, experiment, lambda *_: 3.0, causal=False, declared_causal=True, passed=False)
    assert verdict.verdict == "invalid"


def test_the_trained_models_of_a_concluded_experiment_can_be_taken_apart(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    with pytest.raises(RefusedError, match="is approved with 0 trained models"):
        enqueue(lab, [experiment.id], ablate=True)

    before = judged(lab, runner, experiment, lr_matters)
    [plan] = enqueue(lab, [experiment.id], ablate=True).plans
    assert (plan.runs_new, plan.seeds) == (4, [1, 2])
    done = work_off(lab, runner, lambda *_: {"val_bpb": 3.0, "layer_delta_max": 0.7})
    assert [claim.run.kind for claim in done] == ["ablate"] * 4
    assert {claim.run.needs_run_id for claim in done} == {run.id for run in trained_runs(lab.store, experiment.id)}
    mind.work(lab)
    assert latest_verdict(lab.store, experiment.id) == before
    assert enqueue(lab, [experiment.id], ablate=True).plans[0].runs_new == 0
    assert enqueue(lab, [experiment.id], seeds=3).plans[0].runs_new == 2


def test_models_whose_weights_were_dropped_are_trained_anew_to_be_taken_apart(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    before = judged(lab, runner, experiment, lr_matters)
    first, *_, last = trained_runs(lab.store, experiment.id)
    for run in (first, last):
        forget_weights(lab.store, run.id)

    [plan] = enqueue(lab, [experiment.id], ablate=True).plans
    assert any("2 of them are trained anew" in note for note in plan.notes)
    done = work_off(lab, runner, lambda *_: {"val_bpb": 3.0, "layer_delta_max": 0.7})
    kinds = [claim.run.kind for claim in done]
    assert (kinds.count("train"), kinds.count("ablate")) == (2, 4)
    anew = {claim.run.id for claim in done if claim.run.kind == "train"}
    assert anew < {claim.run.needs_run_id for claim in done if claim.run.kind == "ablate"}
    assert get_run(lab.store, first.id).score == first.score
    assert latest_verdict(lab.store, experiment.id) == before


def test_a_post_run_never_waits_for_weights_that_were_dropped(lab: Lab, runner: Runner) -> None:
    judged(lab, runner, approved(lab, {"lr": 1e-3}), lr_matters)
    trained = lab.store.rows("SELECT id, seed FROM runs WHERE kind = 'train'")
    for row in trained:
        forget_weights(lab.store, row["id"])

    served_too = approved(lab, {"quantize": "int8"}, **SMALLER)
    assert enqueue(lab, [served_too.id]).plans[0].runs_new == 7
    done = work_off(lab, runner, served(0.05))
    needed = {claim.run.needs_run_id for claim in done if claim.run.kind == "post"}
    assert needed == {claim.run.id for claim in done if claim.run.kind == "train"}
    mind.work(lab)
    assert enqueue(lab, [served_too.id], seeds=3).plans[0].runs_new == 3  # what is done is not done again


def test_what_no_disk_can_hold_is_refused_with_the_numbers(lab: Lab, runner: Runner) -> None:
    runner_settings = lab.settings.runner.model_copy(update={"max_disk_gib": 1e-6})
    lab.settings = lab.settings.model_copy(update={"runner": runner_settings})
    with pytest.raises(RefusedError, match=r"writes up to 1\.4 MiB to disk, over max_disk_gib = 1e-06"):
        enqueue(lab, [approved(lab, {"lr": 1e-3}).id])


def proposed(treatment: dict[str, Any], metric: str | None = None) -> Proposal:
    return Proposal(
        title="Serve it smaller",
        hypothesis="weight_bytes fall and val_bpb stays",
        domain="efficiency",
        treatment=treatment,
        metric=metric,
    )


def test_each_proposal_is_judged_by_what_it_is_about(lab: Lab) -> None:
    base = Base(preset="nano", config=PRESETS["nano"])
    found = [
        admit(lab, base, proposed(treatment, metric), proposer="assistant")
        for treatment, metric in (
            ({"quantize": "int8"}, None),
            ({"quantize": "int8"}, "decode_tokens_per_second"),
            ({"top_k": 1}, None),
            ({"top_k": 1}, "calibration_error"),
        )
    ]
    assert [(item.metric, item.direction, item.guard_metric) for item in found] == [
        ("weight_bytes", "lower", "val_bpb"),
        ("decode_tokens_per_second", "higher", "val_bpb"),
        ("val_bpb", "lower", None),
        ("calibration_error", "lower", "val_bpb"),
    ]
    with pytest.raises(NotAdmittedError, match="asked before"):
        admit(lab, base, proposed({"quantize": "int8"}), proposer="assistant")

    with pytest.raises(NotAdmittedError, match="'elegance' is no metric to judge by; known: val_bpb"):
        admit(lab, base, proposed({"top_k": 1}, "elegance"), proposer="assistant")


def test_a_model_that_cannot_generate_is_not_served(lab: Lab) -> None:
    base = Base(preset="nano", config=apply(PRESETS["nano"], {"routing": "expert_choice"}))
    with pytest.raises(NotAdmittedError, match="cannot generate"):
        admit(lab, base, proposed({"quantize": "int8"}), proposer="assistant")


def test_noise_is_pooled_only_over_sides_of_the_same_making(lab: Lab, runner: Runner) -> None:
    by_loss = SMALLER | {"metric": "val_bpb", "guard_metric": None}
    served_only = [approved(lab, {"quantize": kind}, **by_loss) for kind in ("int8", "int4")]
    trained = approved(lab, {"lr": 1e-3})
    for experiment in served_only:
        judged(lab, runner, experiment, served(0.001))

    judged(lab, runner, trained, lr_matters)
    asked = get_experiment(lab.store, trained.id)
    apart = scored_pairs(lab.store, asked, "val_bpb", same_checkpoint=False)
    assert {pair.experiment_id for pair in apart} == {trained.id}
    together = scored_pairs(lab.store, asked, "val_bpb", same_checkpoint=True)
    assert {pair.experiment_id for pair in together} == {item.id for item in served_only}


def test_insights_keep_metrics_apart(lab: Lab, runner: Runner) -> None:
    judged(lab, runner, approved(lab, {"quantize": "int8"}, **SMALLER), served(0.001))
    judged(lab, runner, approved(lab, {"quantize": "int8"}, **SMALLER | {"metric": "val_bpb"}), served(0.001))
    assert sorted((item.metric, item.effect) for item in list_insights(lab.store)) == [
        ("val_bpb", pytest.approx(0.001)),
        ("weight_bytes", -75_000.0),
    ]
