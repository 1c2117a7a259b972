"""Which trained weights are wanted, and that a row never promises weights that are gone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from db.clock import now
from db.experiments import add_verdict, move_experiment, plan_experiment
from db.queue import Outcome, claim_run, finish_attempt
from db.records import Arm, Experiment
from db.weights import (
    delete_weights,
    drop_weights,
    forget_weights,
    free_identity,
    has_weights,
    held_bytes,
    list_weights,
    note_bytes,
    unmeasured_attempts,
)

if TYPE_CHECKING:
    from tests.db.conftest import Filled

VERDICT: dict[str, Any] = {
    "final": True,
    "sentence": "s",
    "method": "m",
    "metric": "val_bpb",
    "pairs": 2,
    "seeds": "[1, 2]",
    "cost_seconds": 1.0,
}


def done(filled: Filled, experiment: Experiment, seed: int, **columns: Any) -> int:
    """A completed training run that holds 100 bytes, 80 of them weights; the attempt's id."""
    columns.setdefault("fingerprint", f"{experiment.id}")
    filled.run(experiment, seed, **columns)
    claim = claim_run(filled.store, filled.runner(), now(), lease_seconds=60)
    assert claim is not None
    finish_attempt(filled.store, claim.attempt, Outcome(status="completed", score={"val_bpb": 1.0}), max_failures=1)
    directory = filled.lab.runs_folder / claim.attempt.directory
    directory.mkdir()
    (directory / "checkpoint.pt").write_bytes(bytes(80))
    (directory / "log.txt").write_bytes(bytes(20))
    note_bytes(filled.store, claim.attempt.id, directory)
    return claim.attempt.id


def conclude(filled: Filled, experiment: Experiment, verdict: str, *, final: bool = True) -> None:
    move_experiment(filled.store, experiment.id, "concluded", allowed=["queued", "running"])
    add_verdict(filled.store, VERDICT | {"experiment_id": experiment.id, "verdict": verdict, "final": final})


def wanted(filled: Filled) -> dict[int, str | None]:
    return {item.attempt_id: item.wanted_for for item in list_weights(filled.store)}


@pytest.mark.parametrize(
    ("verdict", "treatment"),
    [("improved", "improved"), ("improved but not causal", "improved"), ("worse", None), ("no evidence yet", None)],
)
def test_baselines_and_what_improved_are_kept_when_an_experiment_is_over(
    filled: Filled, verdict: str, treatment: str | None
) -> None:
    experiment = filled.experiment()
    base = done(filled, experiment, 1, arm="baseline")
    treated = done(filled, experiment, 2)
    assert wanted(filled) == {base: "open", treated: "open"}
    conclude(filled, experiment, verdict)
    assert wanted(filled) == {base: "baseline", treated: treatment}


def test_of_a_screening_on_a_part_of_the_budget_nothing_stays(filled: Filled) -> None:
    experiment = filled.experiment()
    plan_experiment(filled.store, experiment.id, screen_share=0.25)
    short = [done(filled, experiment, 1, arm="baseline", fingerprint="short"), done(filled, experiment, 1)]
    whole = (
        done(filled, experiment, 2, arm="baseline", purpose="confirm"),
        done(filled, experiment, 3, purpose="confirm"),
    )
    assert set(wanted(filled).values()) == {"open"}
    conclude(filled, experiment, "improved")
    assert wanted(filled) == dict.fromkeys(short) | dict(zip(whole, ("baseline", "improved"), strict=True))


def test_what_a_queued_run_reads_is_never_dropped(filled: Filled) -> None:
    experiment = filled.experiment()
    treated = done(filled, experiment, 1)
    conclude(filled, experiment, "worse")
    reader = filled.run(experiment, 1, arm="ablation", kind="ablate", needs_run_id=1).run
    assert wanted(filled) == {treated: "queued"}
    assert drop_weights(filled.store, [treated], also=["improved", "baseline"]) == []
    assert has_weights(filled.store, 1)
    filled.store.execute("UPDATE runs SET status = 'completed' WHERE id = ?", (reader.id,))
    assert wanted(filled) == {treated: None}
    assert held_bytes(filled.store) == 100
    dropped = drop_weights(filled.store, [treated])
    assert [(item.directory, item.bytes) for item in dropped] == [("1-1", 80)]
    assert not has_weights(filled.store, 1)
    assert [attempt.id for attempt in unmeasured_attempts(filled.store, limit=10)] == [treated]
    delete_weights(filled.store, filled.lab.runs_folder, dropped)
    assert not (filled.lab.runs_folder / "1-1" / "checkpoint.pt").exists()
    assert unmeasured_attempts(filled.store, limit=10) == []
    assert held_bytes(filled.store) == 20
    assert drop_weights(filled.store, [treated]) == []


def test_a_model_is_kept_for_what_was_said_of_its_post_runs(filled: Filled) -> None:
    experiment = filled.experiment()
    trained = [done(filled, experiment, seed, arm="checkpoint", fingerprint="t") for seed in (1, 2)]
    arms: list[tuple[int, Arm]] = [(1, "baseline"), (2, "treatment")]
    for run_id, arm in arms:
        filled.run(experiment, run_id, arm=arm, kind="post", fingerprint=arm, needs_run_id=run_id)

    filled.store.execute("UPDATE runs SET status = 'completed' WHERE kind = 'post'")
    conclude(filled, experiment, "improved")
    assert wanted(filled) == dict(zip(trained, ("baseline", "improved"), strict=True))


def test_baselines_go_only_when_they_are_named(filled: Filled) -> None:
    experiment = filled.experiment()
    base = done(filled, experiment, 1, arm="baseline")
    conclude(filled, experiment, "worse")
    assert drop_weights(filled.store, [base]) == []
    assert [item.attempt_id for item in drop_weights(filled.store, [base], also=["baseline"])] == [base]


def test_a_run_whose_weights_are_gone_is_done_again_under_its_own_identity(filled: Filled) -> None:
    experiment, later = filled.experiment(), filled.experiment()
    done(filled, experiment, 1, fingerprint="f")
    identity = {"kind": "train", "fingerprint": "f", "seed": 1}
    assert not free_identity(filled.store, identity)
    forget_weights(filled.store, 1)
    assert free_identity(filled.store, identity)
    again = filled.run(later, 1, fingerprint="f")
    assert (again.new, again.run.id) == (True, 2)
    first = filled.store.row("SELECT fingerprint, status, val_bpb FROM runs WHERE id = 1")
    assert first == {"fingerprint": "f~1", "status": "completed", "val_bpb": 1.0}
    assert not free_identity(filled.store, identity)  # the new one is not done yet
