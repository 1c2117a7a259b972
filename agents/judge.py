"""What the runs say of a hypothesis. No model, no torch; this module alone decides the words.

The contract: `weigh` is a pure function from pairs of scores to a Ruling; `judge_experiment` reads the rows of one
experiment, checks the gates, writes a verdict, and asks for another pair while the evidence is open.

The method. Runs are paired by seed: equal budget, equal data order, equal initialization where shapes agree. The effect
is the mean difference treatment - baseline. Its standard deviation is pooled over all pairs of the class (same
baseline, hardware and metric; Student's t with the pooled degrees of freedom), or the experiment's own where that is
larger. Since we look after each pair, look k spends the part 6/(pi k)^2 of the error, which sums to 1 however often one
looks (union bound), so the interval holds at 95 % over all looks of one experiment. Over many experiments false
discoveries add up; that is not controlled here.

A guard metric with a margin is weighed in the same way, from its own pairs: a gain counts only when the whole interval
of what the guard lost lies within the margin, and is no gain when the whole interval lies beyond it.

A model that looks at later tokens, and says so, is compared like any other, but its gain has a word of its own:
improved but not causal. One that claims not to, and does, is invalid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.special import stdtrit

from agents.planner import add_pairs, configs_of
from db.cards import experiment_kwh
from db.experiments import add_verdict, latest_verdict, mark_judged, move_experiment
from db.lab import Lab
from db.queries import Pair, comparable_pairs, experiment_seconds, pairs, probe_runs
from db.queue import cancel_experiment_runs
from db.records import ENDED_RUN, Direction, Experiment, ExperimentStatus, Run, Verdict, Word
from moe.accounting import account
from moe.config import Config, scientific
from moe.post.stages import as_served

ALPHA = 0.05
"""Chance that one experiment whose treatment does nothing is ever called improved or worse."""

METHOD = (
    "Paired by seed; Student's t on the mean difference, its deviation pooled over the class; "
    "95 % over all looks (error spent as 6/(pi k)^2)."
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The metric on both sides of one pair."""

    seed: int
    baseline: float
    treatment: float

    @property
    def difference(self) -> float:
        """treatment - baseline."""
        return self.treatment - self.baseline


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """What pairs of scores say: the word, the effect with its interval, the noise of one pair and the margin."""

    word: Word
    effect: float
    low: float
    high: float
    pair_noise: float
    margin: float


def weigh(
    scores: Sequence[Score],
    others: Sequence[Sequence[Score]] = (),
    *,
    direction: Direction = "lower",
    first_look: int = 2,
    alpha: float = ALPHA,
) -> Ruling:
    """Rules on at least two pairs.

    Args:
        scores: the experiment's own pairs.
        others: the pairs of the other experiments in the same class, which tell of the noise.
        direction: whether lower or higher values of the metric are better.
        first_look: pairs at the first look; look k = len(scores) - first_look + 1.
        alpha: error over all looks.

    "equivalent" means that the whole interval lies within one noise floor: the deviation of single runs over seeds,
    pooled over both sides of all pairs. Raises ValueError for fewer than two pairs.
    """
    if len(scores) < 2:
        raise ValueError("a verdict needs at least two pairs")

    differences = [score.difference for score in scores]
    effect = fmean(differences)
    own, own_df = _variance(differences), len(scores) - 1
    pooled, pooled_df = _pool([differences, *([score.difference for score in group] for group in others)])
    variance, df = (own, own_df) if own > pooled else (pooled, pooled_df)
    look = max(1, len(scores) - first_look + 1)
    spent = alpha * 6.0 / (math.pi * look) ** 2
    half = float(stdtrit(df, 1.0 - spent / 2.0)) * math.sqrt(variance / len(scores))
    low, high = effect - half, effect + half
    sides = [[score.baseline for score in scores], [score.treatment for score in scores]]
    floor, _ = _pool([*sides, *([score.treatment for score in group] for group in others)])
    margin = math.sqrt(floor)
    return Ruling(
        word=_word(low, high, margin, direction),
        effect=effect,
        low=low,
        high=high,
        pair_noise=math.sqrt(variance),
        margin=margin,
    )


def judge_experiment(lab: Lab, experiment: Experiment) -> Verdict | None:
    """Weighs what has ended of an experiment, in one transaction; the verdict written, if there was cause for one.

    While the evidence is open and max_seeds of the configuration allows, it queues one more pair.
    """
    with lab.store.transaction():
        mark_judged(lab.store, experiment.id)
        probes = probe_runs(lab.store, experiment.id)
        if reason := _gate(probes):
            cancel_experiment_runs(lab.store, experiment.id)
            return _conclude(lab, experiment, "invalid", reason=reason)

        found = pairs(lab.store, experiment.id)
        if not found or not all(_ended(run) for pair in found for run in (pair.baseline, pair.treatment)):
            return None

        if reason := _broken(found, experiment):
            return _conclude(lab, experiment, "invalid", reason=reason, failed=True)

        if diverged := [pair.treatment for pair in found if pair.treatment and pair.treatment.status == "pruned"]:
            reason = f"training diverged: {diverged[0].error}, and the baseline's did not"
            return _conclude(lab, experiment, "worse", reason=reason)

        return _rule(lab, experiment, found)


def _gate(probes: Sequence[Run]) -> str | None:
    for run in probes:
        if run.status == "failed":
            return f"the probe could not be done: {run.error}"

        if run.status == "completed" and not run.passed:
            score = run.score or {}
            dead = [knob for knob, found in score.get("acts", {}).items() if not found["acts"]]
            if dead:
                return f"{', '.join(dead)} does nothing here: {score['acts'][dead[0]]['detail']}"

            if not score.get("causal", True) and score.get("declared_causal", True):
                return f"the model sees future tokens: {score.get('causal_detail', '')}"

            return "the probe did not pass"

    return None


def _broken(found: Sequence[Pair], experiment: Experiment) -> str | None:
    measured = [name for name in (experiment.metric, experiment.guard_metric) if name is not None]
    for pair in found:
        if pair.baseline and pair.baseline.status == "pruned":
            return f"the baseline itself diverged with seed {pair.seed}: {pair.baseline.error}"

        for side, run in (("baseline", pair.baseline), ("treatment", pair.treatment)):
            if run is None or run.status in ("failed", "cancelled"):
                why = (run.error or run.status) if run else "missing"
                return f"the {side} run with seed {pair.seed} has no result: {why}"

            missing = [name for name in measured if run.status == "completed" and (run.score or {}).get(name) is None]
            if missing:
                return f"the score of run {run.id} ({side}, seed {pair.seed}) has no {missing[0]}"

    return None


def _rule(lab: Lab, experiment: Experiment, found: Sequence[Pair]) -> Verdict:
    scores = _scores(found, experiment.metric)
    baseline, treatment = configs_of(experiment)
    same_checkpoint = scientific(baseline) == scientific(treatment)
    others = [
        [Score(seed=0, baseline=before, treatment=after) for before, after in group]
        for key, group in comparable_pairs(lab.store, experiment, same_checkpoint=same_checkpoint).items()
        if key != experiment.id
    ]
    ruling = weigh(scores, others, direction=experiment.direction, first_look=lab.settings.min_seeds)
    guard = None
    if experiment.guard_metric is not None:
        guard = weigh(_scores(found, experiment.guard_metric), first_look=lab.settings.min_seeds)

    word = _guarded(ruling.word, guard, experiment.guard_margin or 0.0)
    if word == "improved" and not (baseline.causal and treatment.causal):
        word = "improved but not causal"

    open_still = word == "no evidence yet" and len(scores) < lab.settings.max_seeds
    verdict = _conclude(lab, experiment, word, ruling=ruling, guard=guard, scores=scores, final=not open_still)
    if open_still:
        add_pairs(lab, experiment, [max(score.seed for score in scores) + 1])

    return verdict


def _guarded(word: Word, guard: Ruling | None, margin: float) -> Word:
    """The word with the guard in view, a metric of which less is better and `margin` more is borne."""
    if guard is not None and guard.low > margin:
        return "worse"

    return "no evidence yet" if word == "improved" and guard is not None and guard.high > margin else word


def _conclude(
    lab: Lab,
    experiment: Experiment,
    word: Word,
    *,
    reason: str | None = None,
    ruling: Ruling | None = None,
    guard: Ruling | None = None,
    scores: Sequence[Score] = (),
    final: bool = True,
    failed: bool = False,
) -> Verdict:
    baseline, treatment = configs_of(experiment)
    ours, theirs = account(treatment), account(baseline)
    our_model, their_model = account(as_served(treatment)), account(as_served(baseline))
    ratio = ours.flops_per_token / theirs.flops_per_token
    sentence = _sentence(experiment, word, reason, ruling, len(scores), ratio)
    if guard is not None:
        sentence = f"{sentence.removesuffix('.')}; {_guard_fact(experiment, guard)}."

    if ruling is not None and (label := _not_causal(baseline, treatment)):
        reason = label
        sentence = f"{sentence.removesuffix('.')}; {label}."

    previous = latest_verdict(lab.store, experiment.id)
    verdict = add_verdict(
        lab.store,
        {
            "experiment_id": experiment.id,
            "verdict": word,
            "final": final,
            "sentence": sentence,
            "reason": reason,
            "method": METHOD,
            "metric": experiment.metric,
            "pairs": len(scores),
            "seeds": [score.seed for score in scores],
            "baseline_mean": fmean(score.baseline for score in scores) if scores else None,
            "treatment_mean": fmean(score.treatment for score in scores) if scores else None,
            "effect": ruling.effect if ruling else None,
            "low": ruling.low if ruling else None,
            "high": ruling.high if ruling else None,
            "confidence": 1.0 - ALPHA if ruling else None,
            "noise": ruling.pair_noise if ruling else None,
            "guard_effect": guard.effect if guard else None,
            "guard_low": guard.low if guard else None,
            "guard_high": guard.high if guard else None,
            "baseline_parameters": their_model.parameters,
            "treatment_parameters": our_model.parameters,
            "baseline_active_parameters": their_model.active_parameters,
            "treatment_active_parameters": our_model.active_parameters,
            "baseline_flops": theirs.flops,
            "treatment_flops": ours.flops,
            "cost_seconds": experiment_seconds(lab.store, experiment.id),
            "cost_kwh": experiment_kwh(lab.store, experiment.id),
        },
    )
    if final:
        status: ExperimentStatus = "failed" if failed else "concluded"
        note = None if previous is None or previous.verdict == word else f"was {previous.verdict}"
        move_experiment(lab.store, experiment.id, status, allowed=("queued", "running"), reason=reason or note)

    return verdict


def _sentence(
    experiment: Experiment, word: Word, reason: str | None, ruling: Ruling | None, count: int, ratio: float
) -> str:
    change = ", ".join(
        f"{knob} {_show(experiment.baseline[knob])} → {_show(value)}" for knob, value in experiment.treatment.items()
    )
    if ruling is None:
        return f"{change}: {word}, {reason}."

    facts = f"{experiment.metric} {_interval(ruling)} over {count} pairs"
    floor = f"±{ruling.margin:,.{_places(ruling)}f}"
    text = {
        "improved": f"{change} improves {facts}",
        "improved but not causal": f"{change} improves {facts}",
        "worse": f"{change} makes it worse: {facts}",
        "equivalent": f"{change} changes nothing that matters: {facts}, within one noise floor ({floor})",
        "no evidence yet": f"{change}: no evidence yet, {facts}",
    }[word]
    if abs(ratio - 1.0) > 0.02:
        text += f", at {ratio:.2f} times the FLOPs a token"

    return text + "."


def _interval(ruling: Ruling) -> str:
    places = _places(ruling)
    return f"{ruling.effect:+,.{places}f} [{ruling.low:+,.{places}f}, {ruling.high:+,.{places}f}]"


def _places(ruling: Ruling) -> int:
    if abs(ruling.effect) >= 100.0:
        return 0

    return max(2, min(5, 1 - math.floor(math.log10(max(ruling.pair_noise, 1e-9)))))


def _guard_fact(experiment: Experiment, guard: Ruling) -> str:
    margin = experiment.guard_margin or 0.0
    where = "within" if guard.high <= margin else "beyond" if guard.low > margin else "not surely within"
    return f"{experiment.guard_metric} {_interval(guard)} is {where} the margin of {margin:g}"


def _not_causal(baseline: Config, treatment: Config) -> str | None:
    sides = [side for side, config in (("baseline", baseline), ("treatment", treatment)) if not config.causal]
    if not sides:
        return None

    return f"not causal: the {' and the '.join(sides)} can look at later tokens, so the score is no likelihood of text"


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _scores(found: Sequence[Pair], metric: str) -> list[Score]:
    return [
        Score(seed=pair.seed, baseline=_metric(pair.baseline, metric), treatment=_metric(pair.treatment, metric))
        for pair in found
    ]


def _metric(run: Run | None, metric: str) -> float:
    score: Mapping[str, float] = (run.score if run else None) or {}
    return float(score[metric])


def _ended(run: Run | None) -> bool:
    return run is not None and run.status in ENDED_RUN


def _word(low: float, high: float, margin: float, direction: Direction) -> Word:
    if high < 0 or low > 0:
        return "improved" if (high < 0) == (direction == "lower") else "worse"

    return "equivalent" if -margin <= low and high <= margin else "no evidence yet"


def _variance(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _pool(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    usable = [group for group in groups if len(group) >= 2]
    df = sum(len(group) - 1 for group in usable)
    return sum(_variance(group) * (len(group) - 1) for group in usable) / df, df
