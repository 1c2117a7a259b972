"""Whether an experiment that was run again came out the same, score by score and in its verdict.

On the same machine, with the same code, threads and a budget in tokens, a CPU gives the same bits, and anything else is
a failure. On other hardware, on a card (kernels may differ in the last bits), with other code, or with a budget in
seconds, scores must agree within the noise that was measured, and the verdict must come out as it did. Measured speeds
go up and down with whatever else a machine does: of them the verdict must come out as it did, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from agents.again import Again, Measured, set_beside
from agents.confirmation import noise_known
from agents.evidence import bounded
from agents.gates import is_timed
from agents.noise import Noise
from agents.reproduction import Rerun
from agents.student import quantile
from agents.weighing import Weighed, glance, weigh
from db.experiments import get_experiment, latest_verdict
from db.hypotheses import get_hypothesis
from db.lab import Lab
from db.records import Experiment, Run, Verdict
from db.runners import list_runners

RARE = 0.005
"""Chance with which two runs that only luck tells apart are called different, where equal bits are not to be expected:
beyond 4 noise floors where the noise is known well, and more where it is known from little."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What came of it. `exact`: equal bits were to be expected; `apart`: what was different, in words."""

    metric: str
    guard_metric: str | None
    runs: list[Again]
    exact: bool
    apart: list[str]
    verdict: Verdict
    effect: Weighed | None
    reproduced: bool
    sentence: str


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """How a metric is compared: bit by bit, or within its noise; None where that was never measured."""

    name: str
    exact: bool
    noise: Noise | None

    def holds(self, value: Measured) -> bool:
        if self.exact or value.same:
            return value.same

        if is_timed(self.name):
            return value.before is not None and value.after is not None

        return self.noise is None or value.within(self.noise.sd * quantile(self.noise.df, 1.0 - RARE / 2.0))


def compare(lab: Lab, other: Lab, experiment_id: int, reruns: Sequence[Rerun], changes: Sequence[str]) -> Agreement:
    """Sets the second runs beside the first, and weighs their effect as it was weighed then.

    Args:
        changes: what is known not to be as it was (reproduction.changes_since).
    """
    experiment, verdict = get_experiment(lab.store, experiment_id), latest_verdict(lab.store, experiment_id)
    if verdict is None:
        raise ValueError(f"experiment {experiment_id} has no verdict")

    runs = [set_beside(lab, other, experiment, item) for item in reruns]
    machine = [*changes, *_other_machine(lab, other, [item.run for item in reruns])]
    noise, guard_noise = _noises(lab, verdict)
    metric = _Scale(name=experiment.metric, exact=not machine and not is_timed(experiment.metric), noise=noise)
    guard = _Scale(name=experiment.guard_metric or "", exact=not machine, noise=guard_noise)
    apart = machine if metric.exact or machine else [f"{metric.name} is a speed, which no machine repeats exactly"]
    effect = _effect(verdict, metric, [(run, run.metric) for run in runs], experiment.direction == "lower")
    beside = _effect(verdict, guard, [(run, run.guard) for run in runs if run.guard is not None], True)
    identical = all(run.same for run in runs)
    close = all(
        run.ended_alike and metric.holds(run.metric) and (run.guard is None or guard.holds(run.guard)) for run in runs
    )
    reproduced = identical or (bool(apart) and close and _agrees(experiment, verdict, effect, beside))
    return Agreement(
        metric=experiment.metric,
        guard_metric=experiment.guard_metric,
        runs=runs,
        exact=not apart,
        apart=apart,
        verdict=verdict,
        effect=effect,
        reproduced=reproduced,
        sentence=_sentence(experiment_id, runs, verdict, apart, reproduced=reproduced),
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


def _noises(lab: Lab, verdict: Verdict) -> tuple[Noise | None, Noise | None]:
    """The noise that the metric and its guard were weighed against."""
    hypothesis = get_hypothesis(lab.store, verdict.experiment_id)
    if verdict.stage == "confirm" and hypothesis is not None:
        return noise_known(hypothesis)

    known = verdict.noise is not None and verdict.noise_df is not None
    guard = None
    if verdict.guard_low is not None and verdict.guard_high is not None:  # a screening keeps of it the interval alone
        deviation = (verdict.guard_high - verdict.guard_low) / 4.0 * math.sqrt(verdict.pairs)
        guard = Noise(sd=deviation, df=verdict.noise_df or 1.0)

    return Noise(sd=verdict.noise or 0.0, df=verdict.noise_df or 1.0) if known else None, guard


def _effect(
    verdict: Verdict, scale: _Scale, values: Sequence[tuple[Again, Measured]], lower_is_better: bool
) -> Weighed | None:
    sides: dict[int, dict[str, float | None]] = {}
    for run, value in values:
        if run.stage == verdict.stage:
            sides.setdefault(run.seed, {})[run.arm] = None if run.stopped else value.after

    pairs = [
        (both["baseline"], both["treatment"]) for both in sides.values() if both.keys() >= {"baseline", "treatment"}
    ]
    baselines = [before for before, _ in pairs if before is not None]
    if not baselines or len(baselines) < len(pairs):
        return None

    # As the judge counts them: a treatment that was lost is as bad as could be.
    known = [None if before is None or after is None else after - before for before, after in pairs]
    worst = fmean(map(abs, baselines))
    differences = bounded(known, worst=worst if lower_is_better else -worst)
    if verdict.stage == "confirm":
        return weigh(differences, scale.noise)

    return glance(differences, scale.noise) if scale.noise is not None else None


def _agrees(experiment: Experiment, verdict: Verdict, effect: Weighed | None, guard: Weighed | None) -> bool:
    """Whether the verdict's word holds of the second effect too."""
    margin = experiment.guard_margin or 0.0
    if verdict.guard_low is not None and verdict.guard_low > margin:
        return guard is not None and guard.low > margin

    if verdict.effect is None or effect is None:
        return verdict.effect is None or verdict.verdict == "no evidence yet"

    gain = (-effect.high, -effect.low) if experiment.direction == "lower" else (effect.low, effect.high)
    if verdict.verdict in ("improved", "improved but not causal"):
        return gain[0] > 0.0 and (guard is None or guard.high <= margin)

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
    others = "the speeds differ" if is_timed(verdict.metric) else "the others differ by no more than noise"
    if same == len(runs):
        though = f" Though {'; '.join(apart)}." if apart else ""
        return f"Experiment {experiment_id} is reproduced: {count}, and so the verdict is again {verdict.said}.{though}"

    if reproduced:
        return (
            f"Experiment {experiment_id} is reproduced within the noise: {count}, {others}, and the verdict is again "
            f"{verdict.said}. "
            f"Equal bits were not to be expected: {'; '.join(apart)}."
        )

    why = f"though {'; '.join(apart)}, they or the effect differ by more than noise" if apart else "and all should be"
    return f"Experiment {experiment_id} is not reproduced: {count}, {why}."
