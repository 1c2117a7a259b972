"""Experiments that are judged by a text set of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agents.admission import NotAdmittedError, admit
from agents.planner import enqueue
from agents.preflight import base_of
from agents.proposals import Proposal
from db.errors import RefusedError
from db.experiments import get_experiment, move_experiment
from db.lab import Lab
from db.records import Experiment, Runner, Verdict
from moe.config import Config
from moe.presets import PRESETS
from moe.texts import BENCHMARKS, hash_set
from tests.agents.test_research import Scorer, approved, luck, settled

ASKED = Proposal(
    title="A higher learning rate for code",
    hypothesis="benchmark_code falls because more is learned in the same tokens",
    domain="optimization",
    treatment={"lr": 0.02},
    metric="benchmark_code",
)
JUDGED: dict[str, Any] = {"metric": "benchmark_code", "guard_metric": "val_bpb", "guard_margin": 0.02}


@pytest.fixture
def code(lab: Lab) -> Path:
    """The text set `code` of the lab."""
    path = lab.data_folder / BENCHMARKS / "code.txt"
    path.parent.mkdir(parents=True)
    path.write_text("def double(x):\n    return 2 * x\n")
    return path


def scored(lab: Lab, *, overlap: float | None = 0.0, text: str | None = None) -> Scorer:
    """A world in which a high learning rate helps with code and with nothing else."""
    sha256 = text or hash_set(lab.data_folder / BENCHMARKS, "code")

    def score(config: Config, seed: int) -> dict[str, Any]:
        gain = 0.2 if config.lr > 0.015 else 0.0
        return {
            "val_bpb": 3.0 + 0.001 * luck(seed, config.lr),
            "benchmark_code": 2.0 - gain + 0.01 * luck(seed) + 0.002 * luck(seed, config.lr, config.beta1),
            "benchmarks": {"code": {"sha256": sha256, "train_overlap": overlap}},
        }

    return score


def judged(lab: Lab, runner: Runner, experiment: Experiment, scorer: Scorer) -> Verdict:
    enqueue(lab, [experiment.id])
    return settled(lab, runner, experiment, scorer)


def test_a_set_of_the_lab_may_be_the_metric_and_others_are_refused_with_those_known(lab: Lab) -> None:
    base = base_of(lab)
    known = r"known: val_bpb, .*decode_batch_tokens_per_second; a text set NAME in .*benchmarks adds benchmark_NAME$"
    with pytest.raises(NotAdmittedError, match=known):
        admit(lab, base, ASKED, proposer="assistant")

    folder = lab.data_folder / BENCHMARKS
    (folder / "prose").mkdir(parents=True)
    with pytest.raises(NotAdmittedError, match="decode_batch_tokens_per_second, benchmark_prose; a text set NAME"):
        admit(lab, base, ASKED, proposer="assistant")

    (folder / "code.txt").write_text("x = 1\n")
    admitted = admit(lab, base, ASKED, proposer="assistant")
    assert (admitted.metric, admitted.direction, admitted.guard_metric) == ("benchmark_code", "lower", "val_bpb")
    move_experiment(lab.store, admitted.id, "approved", allowed=["suggested"])
    (folder / "code.txt").unlink()
    with pytest.raises(RefusedError, match="no runner is known yet"):
        enqueue(lab, [admitted.id])


def test_a_gain_on_it_is_claimed_of_the_whole_set(lab: Lab, runner: Runner, code: Path) -> None:
    by_val = approved(lab, {"lr": 0.02})
    enqueue(lab, [by_val.id])
    settled(lab, runner, by_val, lambda _, seed: 3.0 + 0.01 * luck(seed))

    # Those baselines were scored when nobody asked for the set, so they are none of this experiment's.
    first, second = approved(lab, {"lr": 0.02}, **JUDGED), approved(lab, {"beta1": 0.8}, **JUDGED)
    plans = enqueue(lab, [first.id, second.id]).plans
    assert [plan.runs_shared for plan in plans] == [1, 2]  # the probe of the same treatment; the baselines
    assert "judged by the whole text set 'code' in both stages: nothing of it is sealed" in plans[0].notes
    assert get_experiment(lab.store, first.id).metric_text == hash_set(code.parent, "code")[:16]

    verdict = settled(lab, runner, first, scored(lab))
    assert (verdict.verdict, verdict.stage, verdict.metric) == ("improved", "confirm", "benchmark_code")
    assert verdict.sentence.startswith("lr 0.01 → 0.02 improves benchmark_code -0.")
    assert verdict.method.endswith("benchmark_code is that of the whole text set: nothing of it is sealed.")


def test_a_set_that_was_changed_or_is_trained_on_settles_nothing(lab: Lab, runner: Runner, code: Path) -> None:
    other = judged(lab, runner, approved(lab, {"lr": 0.02}, **JUDGED), scored(lab, text="0" * 64))
    assert other.verdict == "invalid"
    assert "was scored on a text set 'code' that had changed since the experiment was queued" in other.sentence

    baseline = PRESETS["nano"].model_dump() | {"weight_decay": 0.0}
    known = approved(lab, {"lr": 0.02}, **JUDGED, baseline=baseline)
    verdict = judged(lab, runner, known, scored(lab, overlap=0.5))
    assert verdict.verdict == "invalid"
    assert "has 50% of the text set 'code' in its training text" in verdict.sentence

    baseline = PRESETS["nano"].model_dump() | {"weight_decay": 0.05}
    unsaid = approved(lab, {"lr": 0.02}, **JUDGED, baseline=baseline)
    verdict = judged(lab, runner, unsaid, scored(lab, overlap=None))
    assert verdict.verdict == "invalid"
    assert "benchmarks.code.train_overlap of run " in verdict.sentence

    code.write_text("def triple(x):\n    return 3 * x\n")
    with pytest.raises(RefusedError, match="the text set 'code' has changed since experiment 1 was queued"):
        enqueue(lab, [approved(lab, {"beta1": 0.8}, **JUDGED).id])

    code.unlink()
    with pytest.raises(RefusedError, match="there is no text set 'code'"):
        enqueue(lab, [approved(lab, {"beta1": 0.85}, **JUDGED).id])
