"""How a report writes its numbers: never with more digits than the noise allows."""

from __future__ import annotations

import math

from db import formats
from db.draw import Effect
from db.formats import count, duration, energy, part, places
from db.records import Verdict
from db.reporting import Cost


def effect_of(verdict: Verdict, label: str) -> Effect | None:
    """The line of a forest plot; None where there is no effect."""
    if verdict.effect is None:
        return None

    return Effect(
        label=label,
        effect=verdict.effect,
        low=verdict.low,
        high=verdict.high,
        floor=verdict.margin,
        word=verdict.said,
        text=span(verdict),
    )


def span(verdict: Verdict) -> str:
    """The effect with its interval; a dash without one."""
    text = formats.span(verdict.effect, verdict.low, verdict.high, verdict.noise)
    return text if verdict.share == 1.0 else f"{text} at {part(verdict.share)} of the budget"


def guard_span(verdict: Verdict) -> str:
    """What the guard metric lost, with its interval."""
    return formats.span(verdict.guard_effect, verdict.guard_low, verdict.guard_high, guard_deviation(verdict))


def guard_deviation(verdict: Verdict) -> float | None:
    """How much the guard differs from pair to pair, as the width of its interval tells."""
    if verdict.guard_low is None or verdict.guard_high is None:
        return None

    return (verdict.guard_high - verdict.guard_low) / 4.0 * math.sqrt(verdict.pairs)


def difference(verdict: Verdict, value: float | None) -> str:
    """A difference of the verdict's metric."""
    return formats.difference(value, verdict.noise)


def level(verdict: Verdict, value: float | None) -> str:
    """A value of the verdict's metric, such as a mean."""
    return plainly(value, verdict.noise)


def plainly(value: float | None, deviation: float | None) -> str:
    """A value to the digits that the noise allows."""
    return "–" if value is None else f"{value:,.{places(deviation, value)}f}" if value else "0"


def e_value(value: float | None) -> str:
    """Evidence: two digits, and no more than the order of what is overwhelming."""
    if value is None:
        return "–"

    if value >= 1e6:
        return "over 1,000,000"

    if value < 0.01:
        return "under 0.01"

    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def whole(value: float | None) -> str:
    """Parameters, FLOPs, tokens: 1.3M."""
    return count(value)


def cost(spent: Cost) -> str:
    """Time, energy and money, in a line."""
    return f"{duration(spent.seconds)} of machine time, {energy(spent.kwh)}, ${spent.usd:,.2f} for language models"


def degrees(value: float | None) -> str:
    """Degrees of freedom."""
    return "–" if value is None else "∞" if not math.isfinite(value) else f"{value:.0f}"
