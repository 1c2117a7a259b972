"""What must hold of a pair before its numbers count, and that it must be known to hold."""

from __future__ import annotations

from typing import Any

import pytest

from agents import mind
from agents.planner import enqueue
from db.comparisons import pairs
from db.hypotheses import list_hypotheses
from db.lab import Lab
from db.records import Experiment, Runner, Verdict
from db.store import to_column
from moe.config import Config, apply
from moe.presets import PRESETS
from tests.agents.test_judge import promising
from tests.agents.test_research import Scorer, approved, lr_matters, settled, verdict_of, work_off


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
        ({"train_overlap": 0.5}, "50% of the sentences that score"),
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
    verdict = settled(lab, runner, experiment, lambda config, seed: {"val_bpb": lr_matters(config, seed), fact: None})
    first = pairs(lab.store, experiment.id)[0].baseline
    assert first is not None
    said = f"{fact} of run {first.id} (baseline, seed 1) is not known: its score does not say it, so that gate is not"
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
