"""Whatever one does to an experiment, its evidence goes on or stays where it is: nothing is drawn a second time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agents import mind
from agents.admission import NotAdmittedError, admit, check
from agents.judge import judge_experiment
from agents.planner import enqueue
from agents.preflight import Base
from agents.proposals import Proposal
from db.clock import now
from db.comparisons import pairs
from db.errors import RefusedError
from db.experiments import add_experiment, get_experiment, latest_verdict, move_experiment
from db.hypotheses import list_hypotheses
from db.lab import Lab
from db.queue import Outcome, cancel_experiment_runs, claim_run, finish_attempt
from db.records import Experiment, Runner
from moe.config import Config
from moe.presets import PRESETS
from tests.agents.test_research import approved, luck, noisy, settled, verdict_of, work_off

BASE = Base(preset="nano", config=PRESETS["nano"])
AGAIN = Proposal(
    title="Z loss off once more",
    hypothesis="the z loss is not needed, so val_bpb falls",
    domain="moe_architecture",
    treatment={"router_z_weight": 0.0},
)


def confirming(lab: Lab, runner: Runner, *, confirm: bool = False) -> Experiment:
    """An experiment whose first confirming pairs are done, and not yet looked at."""
    experiment = approved(lab, {"router_z_weight": 0.0})
    enqueue(lab, [experiment.id], confirm=confirm)
    work_off(lab, runner, noisy)
    mind.work(lab)
    work_off(lab, runner, noisy)
    return experiment


def cancel(lab: Lab, experiment: Experiment) -> None:
    with lab.store.transaction():
        move_experiment(lab.store, experiment.id, "cancelled", allowed=["queued", "running"])
        cancel_experiment_runs(lab.store, experiment.id)


def made_with_an_older_moe(lab: Lab, experiment: Experiment, *seeds: int) -> None:
    """As if moe/ had been changed after these pairs, or after all of them."""
    for pair in pairs(lab.store, experiment.id):
        for run in (pair.baseline, pair.treatment):
            if run is not None and (not seeds or pair.seed in seeds):
                lab.store.execute("UPDATE runs SET code = 'older', fingerprint = id WHERE id = ?", (run.id,))
                lab.store.execute("UPDATE runs SET score = json_set(score, '$.code', code) WHERE id = ?", (run.id,))


def test_what_was_cancelled_goes_on_with_all_its_seeds_and_cannot_be_asked_afresh(lab: Lab, runner: Runner) -> None:
    experiment = confirming(lab, runner)
    cancel(lab, experiment)
    (before,) = list_hypotheses(lab.store)
    with pytest.raises(NotAdmittedError, match=r"it has evidence, which goes on with enqueue\(experiment_ids=\[1\]\)"):
        admit(lab, BASE, AGAIN, proposer="assistant")

    done = {pair.seed: pair for pair in pairs(lab.store, experiment.id, "confirm")}
    enqueue(lab, [experiment.id])
    verdict = settled(lab, runner, experiment, noisy)
    (after,) = list_hypotheses(lab.store)
    assert set(before.seeds) < set(after.seeds)
    assert sorted(verdict.seeds) == sorted(after.seeds)
    for pair in pairs(lab.store, experiment.id, "confirm"):
        assert done.get(pair.seed, pair) == pair


def test_what_was_cancelled_before_it_was_registered_may_be_asked_again(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"router_z_weight": 0.0})
    enqueue(lab, [experiment.id])
    cancel(lab, experiment)
    assert admit(lab, BASE, AGAIN, proposer="assistant").status == "suggested"


@pytest.mark.parametrize("concluded", [True, False])
def test_evidence_of_another_moe_is_not_made_again_but_the_question_may_be_registered_anew(
    lab: Lab, runner: Runner, concluded: bool
) -> None:
    experiment = confirming(lab, runner)
    if concluded:
        settled(lab, runner, experiment, noisy)
    else:
        cancel(lab, experiment)

    made_with_an_older_moe(lab, experiment)
    with pytest.raises(RefusedError, match="its evidence was made with version older of moe/, and here it is"):
        enqueue(lab, [experiment.id])

    again = admit(lab, BASE, AGAIN, proposer="assistant")
    move_experiment(lab.store, again.id, "approved", allowed=["suggested"])
    enqueue(lab, [again.id], confirm=True)
    settled(lab, runner, again, noisy)
    assert [item.experiment_id for item in list_hypotheses(lab.store)] == [experiment.id, again.id]


def test_what_is_generated_is_not_asked_all_over_again_after_an_upgrade(lab: Lab, runner: Runner) -> None:
    experiment = confirming(lab, runner)
    settled(lab, runner, experiment, noisy)
    made_with_an_older_moe(lab, experiment)
    with pytest.raises(NotAdmittedError, match="asked before"):
        check(lab, BASE, AGAIN)

    with pytest.raises(NotAdmittedError, match="asked before"):
        admit(lab, BASE, AGAIN, proposer="llm")


def test_other_hardware_makes_no_second_evidence_either(lab: Lab, runner: Runner) -> None:
    experiment = confirming(lab, runner)
    cancel(lab, experiment)
    lab.store.execute("UPDATE runs SET hardware_class = 'cuda Tesla T4', fingerprint = id")
    with pytest.raises(RefusedError, match="was made with cuda Tesla T4, and here runs go to cpu a CPU"):
        enqueue(lab, [experiment.id])


def test_where_moe_has_changed_between_two_pairs_no_more_is_asked_for(lab: Lab, runner: Runner) -> None:
    experiment = confirming(lab, runner)
    made_with_an_older_moe(lab, experiment)
    mind.work(lab)
    verdict = verdict_of(lab, experiment)
    assert (verdict.said, verdict.stage, verdict.final) == ("no evidence yet", "confirm", True)
    assert "its evidence was made with version older of moe/" in (verdict.reason or "")


def test_pairs_of_two_versions_are_not_added_up(lab: Lab, runner: Runner) -> None:
    experiment = confirming(lab, runner)
    (hypothesis,) = list_hypotheses(lab.store)
    made_with_an_older_moe(lab, experiment, hypothesis.seeds[0])
    mind.work(lab)
    verdict = verdict_of(lab, experiment)
    assert verdict.said == "invalid"
    assert "differ in the version of moe/ that trained them" in (verdict.reason or "")


def test_what_a_gate_has_stopped_leaves_no_evidence_behind(lab: Lab, runner: Runner) -> None:
    experiment = confirming(lab, runner, confirm=True)
    mind.work(lab)
    (before,) = list_hypotheses(lab.store)
    assert before.improved > 0.0
    work_off(lab, runner, noisy)
    made_with_an_older_moe(lab, experiment, before.seeds[0])
    mind.work(lab)
    (after,) = list_hypotheses(lab.store)
    assert (after.improved, after.worse, after.equivalent) == (0.0, 0.0, 0.0)


def test_a_screening_that_is_repeated_with_another_moe_counts_its_newest_runs(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id])

    def harmful(config: Config, seed: int) -> float:
        return 3.0 + (0.5 if config.lr < 5e-3 else 0.0) + 0.002 * luck(seed, config.lr)

    settled(lab, runner, experiment, harmful)
    made_with_an_older_moe(lab, experiment)
    enqueue(lab, [experiment.id], seeds=3)
    verdict = settled(lab, runner, experiment, lambda config, seed: harmful(config, seed) + 1.0)
    assert verdict.pairs == 3
    assert verdict.baseline_mean == pytest.approx(4.0, abs=0.01)


def test_what_failed_because_moe_had_changed_is_done_by_queueing_it_again(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"router_z_weight": 0.0})
    enqueue(lab, [experiment.id])
    while claim := claim_run(lab.store, runner, now(), lease_seconds=30.0):
        lab.store.execute("UPDATE runs SET code = 'older', fingerprint = id WHERE id = ?", (claim.run.id,))
        stale = Outcome(status="failed", error="moe/ has changed since this run was queued; enqueue it again")
        finish_attempt(lab.store, claim.attempt, stale, max_failures=1)

    mind.work(lab)
    assert "moe/ has changed" in (verdict_of(lab, experiment).reason or "")
    enqueue(lab, [experiment.id])
    work_off(lab, runner, noisy)
    mind.work(lab)
    assert verdict_of(lab, experiment).said == "promising"


def test_who_goes_back_to_an_older_moe_finds_its_results_again(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"router_z_weight": 0.0})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, noisy)
    later = {**lab.store.rows("SELECT * FROM runs WHERE kind = 'train' AND seed = 1")[0], "status": "cancelled"}
    del later["id"]
    key = lab.store.insert("runs", later | {"code": "newer", "fingerprint": "newer"})
    lab.store.execute("INSERT INTO experiment_runs VALUES (?, ?, 'baseline')", (experiment.id, key))
    mind.work(lab)
    assert verdict_of(lab, experiment).said == "promising"


def test_an_experiment_that_was_cancelled_while_it_was_found_due_is_left_alone(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"router_z_weight": 0.0})
    enqueue(lab, [experiment.id])
    work_off(lab, runner, noisy)
    due = get_experiment(lab.store, experiment.id)
    cancel(lab, experiment)
    assert judge_experiment(lab, due) is None
    assert latest_verdict(lab.store, experiment.id) is None
    assert list_hypotheses(lab.store) == []


def test_the_same_treatment_is_known_again_however_much_was_asked_of_its_knob_since(
    lab: Lab, runner: Runner, conclude: Callable[..., None]
) -> None:
    first = approved(lab, {"router_z_weight": 0.0}, title="a", hypothesis="b", method="c")
    conclude(lab, first.id)
    with lab.store.transaction():
        values = first.model_dump(include={"method", "domain", "preset", "baseline", "metric", "direction", "proposer"})
        for number in range(201):
            named = {"title": f"{number}", "hypothesis": "z loss", "treatment": {"router_z_weight": 1.0 + number}}
            add_experiment(lab.store, values | named)

    with pytest.raises(NotAdmittedError, match="asked before: experiment 1 "):
        check(lab, BASE, AGAIN)
