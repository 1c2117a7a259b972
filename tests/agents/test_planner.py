"""What enqueueing makes of an experiment: runs in the queue, or a refusal that says why."""

from __future__ import annotations

import pytest

from agents import mind
from agents.planner import enqueue
from db.errors import RefusedError
from db.experiments import get_experiment
from db.lab import Lab
from db.queries import runs_of_experiment
from db.records import Runner
from moe.presets import PRESETS
from tests.agents.test_research import approved, lr_matters, noisy, work_off


def test_enqueue_queues_a_probe_and_pairs_and_shares_the_baselines(lab: Lab, runner: Runner) -> None:
    first, second = approved(lab, {"lr": 1e-3}), approved(lab, {"beta1": 0.8})
    plans = enqueue(lab, [first.id, second.id]).plans
    assert [(plan.runs_new, plan.runs_shared) for plan in plans] == [(5, 0), (3, 2)]
    assert [run.arm for run in runs_of_experiment(lab.store, first.id)] == [
        "probe",
        "baseline",
        "treatment",
        "baseline",
        "treatment",
    ]
    assert get_experiment(lab.store, first.id).status == "queued"


def test_probes_come_first_then_baselines_and_a_treatment_waits_for_its_probe(lab: Lab, runner: Runner) -> None:
    enqueue(lab, [approved(lab, {"lr": 1e-3}).id])
    order = [claim.run.kind for claim in work_off(lab, runner, lr_matters)]
    assert order == ["probe", "train", "train", "train", "train"]


def test_a_treatment_over_a_limit_is_refused_with_the_number_and_nothing_is_queued(lab: Lab, runner: Runner) -> None:
    fine, over = approved(lab, {"lr": 1e-3}), approved(lab, {"num_experts": 32})
    with pytest.raises(RefusedError, match=r"num_experts=32 is over the limit 16 \(max_experts"):
        enqueue(lab, [fine.id, over.id])

    assert get_experiment(lab.store, fine.id).status == "approved"
    assert runs_of_experiment(lab.store, fine.id) == []


def test_own_text_is_pinned_when_it_is_queued_for_all_seeds_to_come(lab: Lab, runner: Runner) -> None:
    text = lab.data_folder / "texts" / "mine.txt"
    own = PRESETS["nano"].model_dump() | {"corpus": "mine"}
    asked = approved(lab, {"router_z_weight": 0.0}, baseline=own)
    with pytest.raises(RefusedError, match=r"has no text to train on: corpus 'mine' is not known.*put mine\.txt"):
        enqueue(lab, [asked.id])

    text.parent.mkdir(parents=True)
    text.write_text("One text.")
    enqueue(lab, [asked.id])
    name, _, digest = str(get_experiment(lab.store, asked.id).baseline["corpus"]).partition("@")
    assert (name, len(digest)) == ("mine", 16)
    done = work_off(lab, runner, noisy)
    mind.work(lab)
    done += work_off(lab, runner, noisy)
    assert max(claim.run.seed for claim in done) > 1_000_000  # drawn for the confirmation
    assert {claim.run.config["corpus"] for claim in done} == {f"mine@{digest}"}

    text.write_text("Another text.")
    other = approved(lab, {"router_z_weight": 0.0}, baseline=own)
    assert [(plan.runs_new, plan.runs_shared) for plan in enqueue(lab, [other.id]).plans] == [(5, 0)]
    pinned = approved(lab, {"lr": 1e-3}, baseline=get_experiment(lab.store, asked.id).baseline)
    with pytest.raises(RefusedError, match=f"'mine' in .* has changed: it was {digest}"):
        enqueue(lab, [pinned.id])


def test_without_a_known_runner_enqueue_says_so(lab: Lab) -> None:
    with pytest.raises(RefusedError, match="no runner is known"):
        enqueue(lab, [approved(lab, {"lr": 1e-3}).id])


def test_what_is_not_approved_cannot_be_queued(lab: Lab, runner: Runner) -> None:
    experiment = approved(lab, {"lr": 1e-3})
    enqueue(lab, [experiment.id])
    with pytest.raises(RefusedError, match="in the queue already"):
        enqueue(lab, [experiment.id])
