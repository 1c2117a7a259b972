"""Whether an experiment that was run again came out the same, score by score and in its verdict.

On the same machine, with the same code, threads and a budget in tokens, a CPU gives the same bits, and anything else is
a failure. On other hardware, on a card (kernels may differ in the last bits), with other code, or with a budget in
seconds, scores must agree within the noise that was measured, and the verdict must come out as it did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from agents.confirmation import noise_known
from agents.noise import Noise
from agents.reproduction import Rerun
from agents.weighing import Weighed, floor_of, glance, weigh
from db.experiments import get_experiment, latest_verdict
from db.hypotheses import get_hypothesis
from db.lab import Lab
from db.queue import get_run
from db.records import Run, Verdict
from db.runners import list_runners

WITHIN = 4.0
"""Noise floors by which a score may differ where equal bits are not to be expected. Two runs differ by 1.4 floors
(standard deviation) if nothing but chance is between them, and by more than this in 1 of 200 cases."""


@dataclass(frozen=True, kw_only=True)
class Again:
    """One run and its second run; a value is None where it was not scored."""

    seed: int
    stage: str
    arm: str
    before: float | None
    after: float | None
    status_before: str
    status_after: str

    @property
    def same(self) -> bool:
        """Whether it came out the same to the last bit."""
        return self.status_before == self.status_after and self.before == self.after


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What came of it. `exact`: equal bits were to be expected; `apart`: what was different, in words."""

    metric: str
    runs: list[Again]
    exact: bool
    apart: list[str]
    verdict: Verdict
    effect: Weighed | None
    reproduced: bool
    sentence: str


def compare(lab: Lab, other: Lab, experiment_id: int, reruns: Sequence[Rerun], changes: Sequence[str]) -> Agreement:
    """Sets the second runs beside the first, and weighs their effect as it was weighed then.

    Args:
        changes: what is known not to be as it was (reproduction.changes_since).
    """
    experiment, verdict = get_experiment(lab.store, experiment_id), latest_verdict(lab.store, experiment_id)
    if verdict is None:
        raise ValueError(f"experiment {experiment_id} has no verdict")

    runs = [_again(item, get_run(other.store, item.again), experiment.metric) for item in reruns]
    apart = [*changes, *_other_machine(lab, other, [item.run for item in reruns])]
    noise = _noise(lab, verdict)
    effect = _effect(verdict, runs, noise)
    identical = all(run.same for run in runs)
    close = all(_is_close(run, noise) for run in runs) and _agrees(verdict, effect, experiment.direction == "lower")
    reproduced = identical or (bool(apart) and close)
    return Agreement(
        metric=experiment.metric,
        runs=runs,
        exact=not apart,
        apart=apart,
        verdict=verdict,
        effect=effect,
        reproduced=reproduced,
        sentence=_sentence(experiment_id, runs, verdict, apart, reproduced=reproduced),
    )


def _again(item: Rerun, second: Run, metric: str) -> Again:
    return Again(
        seed=item.run.seed,
        stage=item.run.purpose,
        arm=item.arm,
        before=(item.run.score or {}).get(metric),
        after=(second.score or {}).get(metric),
        status_before=item.run.status,
        status_after=second.status,
    )


def _other_machine(lab: Lab, other: Lab, runs: Sequence[Run]) -> list[str]:
    """Why equal bits are not to be expected, whatever the code."""
    there = [item for item in list_runners(lab.store) if item.hardware_class == runs[0].hardware_class]
    here = list_runners(other.store)[0]
    said = []
    if here.hardware_class != runs[0].hardware_class:
        said.append(f"the hardware was {runs[0].hardware_class} and here it is {here.hardware_class}")
    elif not any(item.hostname == here.hostname for item in there):
        said.append("the machine is another one of the same class")
    elif not any(item.threads == here.threads for item in there):
        said.append(f"training had {there[0].threads} threads and here has {here.threads}")

    if here.device == "cuda":
        said.append("on a card, kernels may differ in the last bits")

    if any(run.config["budget_tokens"] is None for run in runs):
        said.append("the budget is in seconds, so how far a run gets is up to the machine")

    return said


def _noise(lab: Lab, verdict: Verdict) -> Noise | None:
    hypothesis = get_hypothesis(lab.store, verdict.experiment_id)
    if verdict.stage == "confirm" and hypothesis is not None:
        return noise_known(hypothesis)[0]

    return None if verdict.noise is None or verdict.noise_df is None else Noise(sd=verdict.noise, df=verdict.noise_df)


def _effect(verdict: Verdict, runs: Sequence[Again], noise: Noise | None) -> Weighed | None:
    sides: dict[int, dict[str, float]] = {}
    for run in runs:
        if run.stage == verdict.stage and run.after is not None:
            sides.setdefault(run.seed, {})[run.arm] = run.after

    differences = [both["treatment"] - both["baseline"] for both in sides.values() if len(both) == 2]
    if verdict.stage == "confirm":
        return weigh(differences, noise)

    return glance(differences, noise) if differences and noise is not None else None


def _is_close(run: Again, noise: Noise | None) -> bool:
    if run.before is None or run.after is None:
        return run.status_before == run.status_after

    return abs(run.after - run.before) <= WITHIN * floor_of(noise)


def _agrees(verdict: Verdict, effect: Weighed | None, lower_is_better: bool) -> bool:
    """Whether the verdict's word holds of the second effect too."""
    if verdict.effect is None or effect is None:
        return (verdict.effect is None) == (effect is None)

    gain = (-effect.high, -effect.low) if lower_is_better else (effect.low, effect.high)
    if verdict.verdict in ("improved", "improved but not causal"):
        return gain[0] > 0.0

    if verdict.verdict == "worse":
        return gain[1] < 0.0

    low = -math.inf if verdict.low is None else verdict.low
    high = math.inf if verdict.high is None else verdict.high
    return low <= effect.effect <= high


def _sentence(
    experiment_id: int, runs: Sequence[Again], verdict: Verdict, apart: Sequence[str], *, reproduced: bool
) -> str:
    same = sum(run.same for run in runs)
    count = f"{same} of {len(runs)} scores are the same to the last bit"
    if same == len(runs):
        though = f" Though {'; '.join(apart)}." if apart else ""
        return f"Experiment {experiment_id} is reproduced: {count}, and so the verdict is again {verdict.said}.{though}"

    if reproduced:
        return (
            f"Experiment {experiment_id} is reproduced within the noise: {count}, the others within "
            f"{WITHIN:g} noise floors, and the verdict is again {verdict.said}. "
            f"Equal bits were not to be expected: {'; '.join(apart)}."
        )

    why = f"though {'; '.join(apart)}, they or the effect differ by more than noise" if apart else "and all should be"
    return f"Experiment {experiment_id} is not reproduced: {count}, {why}."
