"""Insights: what a knob, moved one way, has done over all concluded experiments. Computed, and cited row by row."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import fmean

from db.experiments import final_verdicts, put_insight
from db.formats import places
from db.lab import Lab
from db.records import Experiment, Verdict
from moe.config import KNOBS


@dataclass(frozen=True, order=True)
class Move:
    """One knob, moved one way, on one preset, judged by one metric.

    direction is raised, lowered, or "set to VALUE" for a category, with "at equal FLOPs" where that was compared.
    """

    knob: str
    direction: str
    preset: str
    metric: str


def move_of(experiment: Experiment) -> Move | None:
    """What a treatment of a single knob does; None for several knobs, whose effects cannot be told apart."""
    if len(experiment.treatment) != 1:
        return None

    knob, value = next(iter(experiment.treatment.items()))
    before = experiment.baseline.get(knob)
    if knob in KNOBS and KNOBS[knob].type in ("int", "float") and before is not None and value is not None:
        direction = "raised" if float(value) > float(before) else "lowered"
    else:
        direction = f"set to {value}"

    if experiment.equal_flops:
        direction += " at equal FLOPs"

    return Move(knob=knob, direction=direction, preset=experiment.preset, metric=experiment.metric)


def learn(lab: Lab) -> int:
    """Brings the insights up to date with the final verdicts; returns how many changed."""
    by_move: dict[Move, list[Verdict]] = defaultdict(list)
    for experiment, verdict in final_verdicts(lab.store):
        move = move_of(experiment)
        if move is not None and verdict.verdict != "invalid":
            by_move[move].append(verdict)

    changed = 0
    with lab.store.transaction():
        for move, verdicts in sorted(by_move.items()):
            whole = [verdict for verdict in verdicts if verdict.share == 1.0]  # lengths do not mix in a mean
            effects = [verdict.effect for verdict in whole if verdict.effect is not None]
            changed += put_insight(
                lab.store,
                knob=move.knob,
                direction=move.direction,
                preset=move.preset,
                metric=move.metric,
                statement=_statement(move, verdicts, effects),
                verdict=_common(verdicts),
                effect=fmean(effects) if effects else None,
                verdict_ids=[verdict.id for verdict in verdicts],
            )

    return changed


def _common(verdicts: list[Verdict]) -> str:
    words = {verdict.said for verdict in verdicts}
    return words.pop() if len(words) == 1 else "no evidence yet"


def _statement(move: Move, verdicts: list[Verdict], effects: list[float]) -> str:
    counts = Counter(verdict.said for verdict in verdicts)
    said = ", ".join(f"{word} in {count}" for word, count in counts.most_common())
    size = f"; mean effect on {move.metric} {_mean(verdicts, effects)}" if effects else ""
    plural = "s" if len(verdicts) > 1 else ""
    return f"{move.knob} {move.direction} ({move.preset}): {said} of {len(verdicts)} experiment{plural}{size}."


def _mean(verdicts: list[Verdict], effects: list[float]) -> str:
    mean, deviation = fmean(effects), max((item.noise for item in verdicts if item.noise is not None), default=None)
    return f"{mean:+,.{places(deviation, mean)}f}"
