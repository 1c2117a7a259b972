"""A verdict in words: one sentence that a person may quote, with no more digits than the noise allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agents.pace import Pace
from db.formats import part, places, span
from db.records import Experiment, Screening, Stage, Verdict, Word
from moe.metrics import text_set_of

_METHODS: dict[Stage, str] = {
    "screen": (
        "Screening on one pair of equal seed, or on more where one leaves the question open or the noise is not known; "
        "pairs may share baselines and are scored on the val split. It claims nothing, and its interval is Student's, "
        "for one look."
    ),
    "confirm": (
        "Confirmation on new pairs with seeds drawn by the lab, both sides run afresh, scored on the sealed test "
        "split: e-values against the class's measured noise, claimed by online e-BH over the campaign; the interval "
        "holds at 95 % over all looks (docs/evidence.md)."
    ),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a look at an experiment's pairs has found; intervals are (low, high), the guard (effect, low, high).

    deviation, guard_deviation: of one pair's difference, of the metric and of the guard; None where it is not known.
    pace: how many times as long the treatment trains, where that is clear.
    unknown: which gates had nothing to look at.
    """

    word: Word
    stage: Stage
    share: float
    screening: Screening | None
    reason: str | None
    effect: float | None
    interval: tuple[float, float] | None
    guard: tuple[float, float, float] | None
    pairs: int
    lost: int
    disturbed: int
    deviation: float | None
    guard_deviation: float | None
    flops_ratio: float
    parameters_ratio: float
    pace: Pace | None
    causal: tuple[bool, bool]
    beside: str | None = None
    unknown: str | None = None


def screened(stage: Stage, share: float = 1.0) -> str:
    """How a verdict of this stage comes about, where its runs were trained for a share of the budget."""
    if share == 1.0:
        return _METHODS[stage]

    return f"{_METHODS[stage]} The runs had {part(share)} of the budget, so the effect is not that of all of it."


def method_of(experiment: Experiment, stage: Stage, share: float) -> str:
    """How a verdict of this stage on this experiment comes about, at a share of the budget."""
    name = text_set_of(experiment.metric)
    whole = "" if name is None else f" {experiment.metric} is that of the whole text set: nothing of it is sealed."
    return screened(stage, share) + whole


def sentence_of(experiment: Experiment, found: Found) -> str:
    """Such as: lr 0.01 → 0.02 improves val_bpb -0.041 [-0.052, -0.030] over 5 new pairs."""
    change = ", ".join(
        f"{knob} {_show(experiment.baseline[knob])} → {_show(value)}" for knob, value in experiment.treatment.items()
    )
    if found.effect is None or found.interval is None:
        return f"{change}: {found.screening or found.word}, {found.reason}."

    new = "new " if found.stage == "confirm" else "screening "
    noun = "pair" if found.pairs == 1 else "pairs"
    effect = _span(found.deviation, found.effect, *found.interval)
    facts = f"{experiment.metric} {effect} over {found.pairs} {new}{noun}"
    if found.share < 1.0:
        facts += f" at {part(found.share)} of the budget"

    if found.lost:
        facts += f", {found.lost} of which did not finish"

    deviation = found.deviation or 0.0
    floor = f"±{deviation / math.sqrt(2.0):,.{places(deviation, found.effect)}f}"
    text = {
        "improved": f"{change} improves {facts}",
        "improved but not causal": f"{change} improves {facts}",
        "worse": f"{change} makes it worse: {facts}",
        "equivalent": f"{change} changes nothing that matters: {facts}, within one noise floor ({floor})",
        "no evidence yet": f"{change}: {found.screening or found.word}, {facts}",
    }[found.word]
    if experiment.equal_flops:
        text += f", at equal FLOPs: {1.0 / found.flops_ratio:.2f} times the tokens"
    elif abs(found.flops_ratio - 1.0) > 0.02:
        text += f", at {found.flops_ratio:.2f} times the FLOPs a token"
        if found.word == "improved" and found.flops_ratio > 1.0:
            text += " (whether compute alone brought it: ask again with equal_flops)"

    if found.pace is not None and found.pace.differs:
        text += (
            f", and takes {found.pace.ratio:.2g} [{found.pace.low:.2g}, {found.pace.high:.2g}] times as long to train"
        )

    if abs(found.parameters_ratio - 1.0) > 0.02:
        text += f", with {found.parameters_ratio:.2f} times the parameters"

    if found.guard is not None:
        text += f"; {_guard_fact(experiment, found, *found.guard)}"

    if found.beside:
        text += f"; {found.beside}"

    if found.disturbed:
        text += f"; the card was disturbed during {found.disturbed} of the runs, which costs time and not quality"

    if found.unknown:
        text += f"; {found.unknown}"

    if found.reason:
        text += f"; {found.reason}"

    if label := _not_causal(*found.causal):
        text += f"; {label}"

    return text + "."


def together(experiment_id: int, alone: Verdict | None, low: float, high: float) -> str | None:
    """For a gain tried on top of another: whether it is the one that experiment `experiment_id` found alone."""
    if alone is None or alone.low is None or alone.high is None or alone.effect is None:
        return None

    found = interaction(alone, low, high)
    was = _span(alone.noise, alone.effect, alone.low, alone.high)
    return f"{found}, alone (experiment {experiment_id}) it was {was}"


def interaction(alone: Verdict | None, low: float | None, high: float | None) -> str | None:
    """Whether an effect on top of a champion, with this interval, is another one than that found alone; None where one
    of them is not known."""
    if alone is None or alone.low is None or alone.high is None or low is None or high is None:
        return None

    return "the two interact" if low > alone.high or high < alone.low else "no sign of an interaction"


def _span(deviation: float | None, effect: float | None, low: float | None, high: float | None) -> str:
    # With plain hyphens: sentences are read in terminals and by programs as well.
    low, high = (end if end is not None and math.isfinite(end) else None for end in (low, high))
    return span(effect, low, high, deviation).replace("−", "-")


def _guard_fact(experiment: Experiment, found: Found, effect: float, low: float, high: float) -> str:
    margin = experiment.guard_margin or 0.0
    where = "within" if high <= margin else "beyond" if low > margin else "not surely within"
    lost = _span(found.guard_deviation, effect, low, high)
    return f"{experiment.guard_metric} {lost} is {where} the margin of {margin:g}"


def _not_causal(baseline: bool, treatment: bool) -> str | None:
    sides = [side for side, causal in (("baseline", baseline), ("treatment", treatment)) if not causal]
    if not sides:
        return None

    return f"not causal: the {' and the '.join(sides)} can look at later tokens, so the score is no likelihood of text"


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
