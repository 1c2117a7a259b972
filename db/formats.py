"""How numbers, times and configs are written for a person. Nothing here computes a result."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from markupsafe import Markup


def cut(text: str, length: int) -> str:
    """`text`, or its beginning and a mark that it goes on."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def number(value: float | None, digits: int = 4) -> str:
    """A measured value with so many decimals; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def part(share: float) -> str:
    """A part of a whole: 3/8, or 29 % where it is no simple fraction."""
    near = Fraction(share).limit_denominator(20)
    return f"{near}" if abs(near - share) < 1e-9 else f"{share:.0%}".replace("%", " %")


def signed(value: float | None, digits: int = 4) -> str:
    """A difference, with its sign; one that is rounded to nothing has none."""
    if value is None:
        return "–"

    text = f"{value:+,.{digits}f}".replace("-", "−")
    return text if re.search("[1-9]", text) else text[1:]


def places(deviation: float | None, value: float | None) -> int:
    """Decimals worth writing of a value, given how much one pair's difference varies; None: nobody knows yet."""
    if value is not None and abs(value) >= 100.0:
        return 0

    return 2 if deviation is None else max(0, min(5, 1 - math.floor(math.log10(max(deviation, 1e-9)))))


def difference(value: float | None, deviation: float | None) -> str:
    """A difference with its sign, to the digits that the noise allows."""
    return signed(value, places(deviation, value))


def span(effect: float | None, low: float | None, high: float | None, deviation: float | None) -> str:
    """An effect with its interval, such as −0.0213 [−0.0301, −0.0125]; an end that is None is infinitely far."""
    if effect is None:
        return "–"

    ends = [infinity if end is None else difference(end, deviation) for end, infinity in ((low, "−∞"), (high, "+∞"))]
    return f"{difference(effect, deviation)} [{', '.join(ends)}]"


def count(value: float | None) -> str:
    """A large number in short: 1.3M."""
    if value is None:
        return "–"

    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"

    return f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes in GiB or MiB."""
    if value is None:
        return "–"

    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def duration(seconds: float | None) -> str:
    """A time span in the two largest units that matter."""
    if seconds is None:
        return "–"

    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"

    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def energy(kwh: float | None) -> str:
    """Energy in kWh, or that nothing has measured it."""
    return "energy not measured" if kwh is None else f"{kwh:.4f} kWh"


def ago(stamp: str | None) -> str:
    """How long ago a stored time was."""
    if stamp is None:
        return "–"

    seconds = (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
    return "now" if seconds < 2 else f"{duration(seconds)} ago" if seconds < 172_800 else stamp[:10]


def plain(value: Any) -> str:
    """A config value as one would type it."""
    if isinstance(value, float):
        return f"{value:.6g}"

    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)


def table_rows(value: Any) -> list[dict[str, Any]]:
    """The rows of a table inside a score: a list of records, or records by name. Empty if it is something else."""
    if isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values()):
        return [{"": name, **row} for name, row in value.items()]

    if isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
        return [dict(row) for row in value]

    return []


def badge(word: str | None) -> Markup:
    """A state as a coloured word."""
    if word is None:
        return Markup("")

    kind = word.replace(" ", "-").replace("_", "-")
    return Markup('<span class="badge badge-{}">{}</span>').format(kind, word.replace("_", " "))


def chips(treatment: Mapping[str, Any]) -> Markup:
    """Overrides as small labels."""
    return Markup(" ").join(
        Markup('<span class="chip">{}<b>{}</b></span>').format(name, plain(value)) for name, value in treatment.items()
    )


FILTERS = {
    "number": number,
    "difference": difference,
    "part": part,
    "count": count,
    "size": size,
    "duration": duration,
    "ago": ago,
    "energy": energy,
    "plain": plain,
    "table_rows": table_rows,
    "badge": badge,
    "chips": chips,
}
"""What templates call."""
