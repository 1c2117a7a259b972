"""Insights: what a knob, moved one way, has done over all concluded experiments. Computed, and cited row by row."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import fmean

from db.experiments import Moved, moves_judged, put_insight
from db.formats import places
from db.lab import Lab
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


def move_of(item: Moved) -> Move:
    """Which way a verdict's knob was moved."""
    is_ordered = item.knob in KNOBS and KNOBS[item.knob].type in ("int", "float")
    if is_ordered and isinstance(item.before, int | float) and isinstance(item.after, int | float):
        direction = "raised" if item.after > item.before else "lowered"
    else:
        direction = f"set to {item.after}"

    if item.equal_flops:
        direction += " at equal FLOPs"

    return Move(knob=item.knob, direction=direction, preset=item.preset, metric=item.metric)


def learn(lab: Lab) -> int:
    """Brings the insights up to date with the final verdicts; returns how many changed."""
    by_move: dict[Move, list[Moved]] = defaultdict(list)
    for item in moves_judged(lab.store):
        by_move[move_of(item)].append(item)

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
                verdict_ids=[verdict.verdict_id for verdict in verdicts],
            )

    return changed


def _common(verdicts: list[Moved]) -> str:
    words = {verdict.said for verdict in verdicts}
    return words.pop() if len(words) == 1 else "no evidence yet"


def _statement(move: Move, verdicts: list[Moved], effects: list[float]) -> str:
    counts = Counter(verdict.said for verdict in verdicts)
    said = ", ".join(f"{word} in {count}" for word, count in counts.most_common())
    size = f"; mean effect on {move.metric} {_mean(verdicts, effects)}" if effects else ""
    plural = "s" if len(verdicts) > 1 else ""
    return f"{move.knob} {move.direction} ({move.preset}): {said} of {len(verdicts)} experiment{plural}{size}."


def _mean(verdicts: list[Moved], effects: list[float]) -> str:
    mean, deviation = fmean(effects), max((item.noise for item in verdicts if item.noise is not None), default=None)
    return f"{mean:+,.{places(deviation, mean)}f}"
