"""Integrity gates: what must hold before any number of a comparison counts. A gate that fails makes it invalid.

Pure functions over rows; each says what is wrong in a sentence, or None. What a score does not say at all is for
agents/unknown.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from agents.sides import is_lost
from agents.textsets import text_set_problems
from db.comparisons import Pair
from db.records import Experiment, Hypothesis, Run, Stage

OVERLAP = 0.1
"""Part of the held-out text's sentences that may also be in the training text."""

_SAME = {
    "evaluator": "version of the evaluator",
    "corpus_sha256": "text",
    "split": "split",
}
"""What all scores that are compared must have in common."""


def probe_problem(probes: Sequence[Run]) -> str | None:
    """A knob that does nothing or that nobody has looked at, a model that sees later tokens and denies it, or one that
    does not fit.

    Of probes with several versions of moe/ the last counts (db.queries.probe_runs).
    """
    for run in probes[-1:]:
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

        if run.status == "completed" and (unseen := changed_knobs(run) - (run.score or {}).get("acts", {}).keys()):
            return f"whether {min(unseen)} does anything here is not known: the probe did not look"

    return None


def changed_knobs(probe: Run) -> set[str]:
    """What a probe is to look at: all that differs from the baseline."""
    if probe.baseline is None:
        return set()

    return {name for name, value in probe.config.items() if value != probe.baseline.get(name)}


def pair_problem(experiment: Experiment, found: Sequence[Pair], stage: Stage) -> str | None:
    """What makes the pairs of one stage no fair comparison; a treatment that did not finish is a result, and none."""
    problems = chain((problem for pair in found for problem in _of_pair(experiment, pair, stage)), _among(found))
    return next(problems, None)


def seed_problem(hypothesis: Hypothesis, found: Sequence[Pair]) -> str | None:
    """A drawn seed whose runs are gone: whoever drops a pair chooses the result."""
    there = {pair.seed for pair in found if pair.baseline and pair.treatment}
    if gone := [seed for seed in hypothesis.seeds if seed not in there]:
        return f"the pair of seed {gone[0]} was drawn and its runs are gone"

    if extra := sorted(there - set(hypothesis.seeds)):
        return f"the pair of seed {extra[0]} was not drawn by the lab"

    return None


def _of_pair(experiment: Experiment, pair: Pair, stage: Stage) -> Iterator[str]:
    if pair.baseline and pair.baseline.status == "pruned":
        yield f"the baseline itself did not finish with seed {pair.seed}: {pair.baseline.error}"

    for side, run in (("baseline", pair.baseline), ("treatment", pair.treatment)):
        if side == "treatment" and is_lost(pair):
            continue

        if run is None or run.status in ("failed", "cancelled"):
            why = (run.error or run.status) if run else "missing"
            yield f"the {side} run with seed {pair.seed} has no result: {why}"
        elif run.status == "completed":
            yield from _of_score(experiment, pair.seed, side, run, stage)

    if pair.baseline and pair.treatment:
        for what in _unlike(pair.baseline, pair.treatment):
            yield f"the two sides of seed {pair.seed} differ in the {what}"

    for side, run in disturbed(pair):
        if _rests_on_time(experiment, run):
            yield f"the {side} run with seed {pair.seed} was disturbed, and time is what is compared: {run.disturbance}"


def disturbed(pair: Pair) -> list[tuple[str, Run]]:
    """The sides of a pair whose card was throttled, shared or faulty while they were done."""
    sides = (("baseline", pair.baseline), ("treatment", pair.treatment))
    return [(side, run) for side, run in sides if run is not None and run.disturbance]


def is_timed(metric: str | None) -> bool:
    """Whether a metric is a measured speed."""
    return metric is not None and metric.endswith("_per_second")


def _rests_on_time(experiment: Experiment, run: Run) -> bool:
    """Whether a slower card makes the score worse: a budget in seconds, or a speed as the result."""
    if run.kind == "train":
        return run.config.get("budget_seconds") is not None

    return is_timed(experiment.metric) or is_timed(experiment.guard_metric)


def _of_score(experiment: Experiment, seed: int, side: str, run: Run, stage: Stage) -> Iterator[str]:
    score = run.score or {}
    measured = [name for name in (experiment.metric, experiment.guard_metric) if name is not None]
    if missing := [name for name in measured if score.get(name) is None]:
        yield f"the score of run {run.id} ({side}, seed {seed}) has no {missing[0]}"

    where = f"run {run.id} ({side}, seed {seed})"
    if stage == "confirm" and score.get("split") not in (None, "test"):
        yield f"{where} was scored on {score['split']}, a confirmation counts on the sealed test split alone"

    if score.get("code") not in (None, run.code):
        yield f"{where} was scored by another moe/ than the one that it was queued for"

    for found in text_set_problems(experiment, score, OVERLAP):
        yield f"{where} {found}"

    overlap = score.get("train_overlap")
    if overlap is not None and overlap > OVERLAP:
        yield (
            f"{overlap:.0%} of the sentences that score {where} are in its training text too, more than {OVERLAP:.0%}; "
            "take copies out of the corpus and give it a new name (docs/corpora.md)"
        )

    if problem := _budget_problem(run, score):
        yield f"{where} {problem}"


def _budget_problem(run: Run, score: dict[str, Any]) -> str | None:
    """Whether a training run had the budget that its config names: whole batches within the tokens, or the seconds."""
    # The row itself, not a Config: the moe/ of then may have had other fields.
    config: Mapping[str, Any] = run.config
    tokens, seconds = score.get("train_tokens"), score.get("train_seconds")
    most, longest = config.get("budget_tokens"), config.get("budget_seconds")
    if most is not None and tokens is not None:
        batch = config["batch_size"] * config["seq_len"]
        if not most - batch < tokens <= most:
            return f"was trained on {tokens:,} tokens, not on the {most:,} of its budget"

    if longest is not None and seconds is not None:
        step = seconds / max(1, score.get("steps") or 1)
        if seconds > longest + max(2.0 * step, 0.02 * longest):
            return f"was trained for {seconds:.1f} s, not for the {longest:g} s of its budget"

    return None


def _among(found: Sequence[Pair]) -> Iterator[str]:
    """Whether pairs differ in what made them, each of them fair in itself: the effect would be one of two things."""
    first = found[0]
    for pair in found[1:]:
        if first.baseline and pair.baseline:
            for what in _unlike(first.baseline, pair.baseline):
                yield f"the pairs of seeds {first.seed} and {pair.seed} differ in the {what}"


def _unlike(one: Run, other: Run) -> Iterator[str]:
    if one.hardware_class != other.hardware_class:
        yield f"kind of hardware: {one.hardware_class} and {other.hardware_class}"

    if one.code != other.code:
        yield f"version of moe/ that trained them: {one.code[:12]} and {other.code[:12]}"

    before, after = one.score or {}, other.score or {}
    for name, what in _SAME.items():
        if None not in (before.get(name), after.get(name)) and before[name] != after[name]:
            yield f"{what}: {before[name]} and {after[name]}"
