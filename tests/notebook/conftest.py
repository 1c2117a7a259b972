"""A lab as it looks after an afternoon, filled through the functions that the real processes use, and its server."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from db.champions import add_champion
from db.clock import now
from db.events import add_event
from db.experiments import add_experiment, add_review, add_verdict, move_experiment, put_insight
from db.interactions import close_interaction, open_interaction
from db.lab import Lab
from db.queue import Claim, Outcome, Point, add_run, claim_run, finish_attempt, ingest
from db.records import Arm, Experiment, Runner
from db.runners import register_runner, start_runner
from db.store import Store

SENTENCE = "Routing each token to one expert instead of two is better by 0.0412 val_bpb over 3 pairs of seeds."
HOSTILE = "<script>alert('lab')</script> & \"quotes\""
STEPS = 40
_BASE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "lr": 0.003, "load_balance_weight": 0.01, "n_layers": 2}


Serve = Callable[[Path], AbstractContextManager[str]]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A filled lab, and the run in it that still trains."""

    lab: Lab
    running: Claim
    sentence: str = SENTENCE
    hostile: str = HOSTILE

    def advance(self, steps_done: int) -> None:
        """Commits the running run's points up to that step."""
        ingest(self.lab.store, self.running.attempt, points(steps_done, 2.6), 600, now(), lease_seconds=30)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sample]:
    filled = fill_lab(tmp_path_factory.mktemp("notebook") / "lab")
    yield filled
    filled.lab.close()


@pytest.fixture(scope="session")
def url(sample: Sample) -> Iterator[str]:
    """Where the sample is served, by a real process."""
    with serving(sample.lab.folder) as address:
        yield address


@pytest.fixture(scope="session")
def browse(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def serve() -> Serve:
    return serving


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """`python -m db.notebook` on a free port, ended by SIGTERM, which must end it cleanly."""
    command = [sys.executable, "-m", "db.notebook", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=20)

    assert "Traceback" not in errors


def fill_lab(folder: Path) -> Sample:
    """Experiments 1 improved, 2 worse, 3 equivalent, 4 hostile text, 5 running at seed 1, 6 failed, 7 improving 4."""
    lab = Lab(folder)
    store = lab.store
    runner = _runner(store)
    improved = _experiment(store, "One expert a token", {"top_k": 1}, "catalog")
    worse = _experiment(store, "A ten times smaller learning rate", {"lr": 0.0003}, "optimizer")
    equal = _experiment(store, "Half the load-balancing weight", {"load_balance_weight": 0.005}, "optimizer")
    hostile = _experiment(store, HOSTILE, {"expert_kind": "mlp"}, "assistant", hypothesis=HOSTILE, method=HOSTILE)
    running = _experiment(store, "Eight narrower experts", {"num_experts": 8}, "llm")
    failed = _experiment(store, "Twelve layers", {"n_layers": 12}, "llm")
    for experiment in (improved, worse, equal, running, failed):
        _review(store, experiment, 7.6, "approve", "Clear and cheap; name the expected size of the effect.")
        move_experiment(store, experiment.id, "queued", allowed=["suggested"])

    _review(store, hostile, 4.2, "rewrite", HOSTILE)
    move_experiment(store, hostile.id, "superseded", allowed=["suggested"], reason=HOSTILE)
    _experiment(store, "Experts without a gate", {"expert_kind": "mlp"}, "llm", parent_id=hostile.id, revision=1)

    for experiment, shift in ((improved, -0.0412), (worse, 0.19), (equal, 0.0011)):
        for seed in (0, 1, 2):
            train(store, runner, experiment, "baseline", seed, 2.62 + 0.006 * seed)
            train(store, runner, experiment, "treatment", seed, 2.62 + 0.006 * seed + shift * (1 + 0.1 * seed))

    verdicts = [
        _verdict(store, improved, "improved", SENTENCE, -0.0412, 0.0150),
        _verdict(store, worse, "worse", "A smaller learning rate is worse by 0.1904 val_bpb.", 0.1904, 0.041),
        _verdict(store, equal, "equivalent", "Half the weight makes no difference over 0.01.", 0.0011, 0.0042),
    ]
    put_insight(
        store,
        knob="top_k",
        direction="lower",
        preset="micro",
        metric="val_bpb",
        statement="Fewer experts a token helps at this budget.",
        verdict="improved",
        effect=-0.0412,
        verdict_ids=verdicts[:1],
    )
    _crown(store, improved)
    _fail(store, runner, failed)
    claim = begin(store, runner, running, seed=1, steps_done=25)
    interaction = open_interaction(
        store,
        {"agent": "suggester", "model": "a/model", "prompt": HOSTILE, "usd": 0.05, "experiment_id": running.id},
    )
    close_interaction(
        store,
        interaction,
        {"status": "answered", "answer": "{}", "prompt_tokens": 900, "completion_tokens": 120, "usd": 0.0123},
    )
    return Sample(lab=lab, running=claim)


def _crown(store: Store, experiment: Experiment) -> None:
    """The experiment's config becomes the champion over its baseline."""
    kind = {"preset": experiment.preset, "hardware_class": "cpu-x86_64"}
    root = add_champion(store, {**kind, "parent_id": None, "experiment_id": None, "config": _BASE, "gain": 0.0})
    config = experiment.baseline | experiment.treatment
    add_champion(
        store, {**kind, "parent_id": root.id, "experiment_id": experiment.id, "config": config, "gain": 0.0389}
    )


def train(store: Store, runner: Runner, experiment: Experiment, arm: Arm, seed: int, score: float) -> None:
    """One whole training run."""
    config = experiment.baseline | (experiment.treatment if arm == "treatment" else {})
    queued = add_run(store, experiment.id, arm, _run(config, seed))
    if not queued.new:
        return

    claim = _claim(store, runner)
    ingest(store, claim.attempt, points(STEPS, score), 1000, now(), lease_seconds=30)
    result = {
        "val_bpb": score,
        "tokens": 65_536,
        "parameters": 412_000,
        "active_parameters": 260_000,
        "flops": 1.3e11,
    } | {
        "bpb_by_topic": {"History": {"bpb": 2.25, "bytes": 812}, "Arts": {"bpb": 2.5, "bytes": 1044}},
        "layers": [{"layer": 0, "router_margin": 0.125, "load": [3, 5]}],
    }
    finish_attempt(store, claim.attempt, Outcome(status="completed", score=result, exit_code=0), max_failures=2)


def begin(store: Store, runner: Runner, experiment: Experiment, *, seed: int, steps_done: int) -> Claim:
    """A treatment run that is left in mid-training."""
    add_run(store, experiment.id, "treatment", _run(experiment.baseline | experiment.treatment, seed))
    add_run(store, experiment.id, "baseline", _run({**experiment.baseline, "lr": 0.0031}, seed))
    move_experiment(store, experiment.id, "running", allowed=["queued", "running"])
    claim = _claim(store, runner)
    ingest(store, claim.attempt, points(STEPS, 2.6)[:steps_done], 500, now(), lease_seconds=30)
    return claim


def points(steps: int, score: float) -> list[Point]:
    """A learning curve that ends at `score`."""
    curve = []
    for step in range(1, steps + 1):
        loss = score * 0.69 + 3.0 * math.exp(-step / 6) + 0.03 * math.sin(7.0 * step + 50.0 * score)
        values: dict[str, float | None] = {"train_loss": loss, "tokens_per_second": 9800.0 + step}
        if step % 8 == 0:
            values["val_bpb"] = score + 1.5 * math.exp(-step / 8)
            values["val_tokens"] = 8192.0

        curve.append(Point(step=step, tokens=2048 * step, seconds=0.2 * step, values=values))

    return curve


def _runner(store: Store) -> Runner:
    described = {
        "hostname": "t4box",
        "device": "cpu",
        "device_name": "x86_64 CPU",
        "device_key": "cpu",
        "precision": "fp32",
        "torch": "2.13.0",
        "hardware_class": "cpu-x86_64",
        "memory_bytes": 24 * 2**30,
        "threads": 2,
        "message": None,
    }
    runner = register_runner(store, described)
    start_runner(store, runner.id, pid=1, boot_id=now().boot_id, message="works")
    return runner


def _experiment(store: Store, title: str, treatment: dict[str, Any], proposer: str, **changes: Any) -> Experiment:
    values = {
        "title": title,
        "hypothesis": f"{title} lowers val_bpb at equal budget.",
        "method": "Train both arms on the same tokens in the same order, over paired seeds.",
        "domain": "moe_architecture",
        "preset": "micro",
        "baseline": _BASE,
        "treatment": treatment,
        "metric": "val_bpb",
        "direction": "lower",
        "proposer": proposer,
        "source": "Switch Transformer, arXiv:2101.03961" if proposer == "catalog" else None,
        "hardware_class": "cpu-x86_64",
    }
    return add_experiment(store, values | changes)


def _review(store: Store, experiment: Experiment, score: float, decision: str, feedback: str) -> None:
    criteria = {"novelty": score - 2, "feasibility": 9.0, "impact": score, "clarity": score, "efficiency": 8.0}
    add_review(
        store,
        {
            "experiment_id": experiment.id,
            "reviewer": "rubric",
            **criteria,
            "score": score,
            "decision": decision,
            "feedback": feedback,
            "success_probability": 0.4,
            "facts": {},
        },
    )


def _verdict(store: Store, experiment: Experiment, word: str, sentence: str, effect: float, half: float) -> int:
    verdict = add_verdict(
        store,
        {
            "experiment_id": experiment.id,
            "verdict": word,
            "final": True,
            "sentence": sentence,
            "reason": None,
            "method": "Paired differences by seed, Student's t.",
            "metric": "val_bpb",
            "pairs": 3,
            "seeds": [0, 1, 2],
            "baseline_mean": 2.626,
            "treatment_mean": 2.626 + effect,
            "effect": effect,
            "low": effect - half,
            "high": effect + half,
            "confidence": 0.95,
            "noise": 0.006,
            "baseline_parameters": 412_000,
            "treatment_parameters": 412_000,
            "baseline_active_parameters": 260_000,
            "treatment_active_parameters": 190_000,
            "baseline_flops": 1.3e11,
            "treatment_flops": 0.95e11,
            "cost_seconds": 51.2,
        },
    )
    move_experiment(store, experiment.id, "concluded", allowed=["queued", "running"])
    return verdict.id


def _fail(store: Store, runner: Runner, experiment: Experiment) -> None:
    add_run(store, experiment.id, "treatment", _run(experiment.baseline | experiment.treatment, 0))
    claim = _claim(store, runner)
    log = f"Traceback (most recent call last):\n  {HOSTILE}\ntorch.OutOfMemoryError: 3.1 GiB more is needed"
    outcome = Outcome(status="failed", error="out_of_memory: 3.1 GiB more is needed", log_tail=log, exit_code=1)
    finish_attempt(store, claim.attempt, outcome, max_failures=1)
    move_experiment(store, experiment.id, "failed", allowed=["queued", "running"], reason="its only run failed")
    add_event(store, "note", HOSTILE, experiment_id=experiment.id)


def _run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    fingerprint = "-".join(f"{name}{value}" for name, value in sorted(config.items()))
    return {
        "kind": "train",
        "fingerprint": fingerprint,
        "seed": seed,
        "hardware_class": "cpu-x86_64",
        "code": "c",
        "config": config,
        "priority": 0,
        "steps": STEPS,
    }


def _claim(store: Store, runner: Runner) -> Claim:
    claim = claim_run(store, runner, now(), lease_seconds=30)
    assert claim is not None
    return claim
