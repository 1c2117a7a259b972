"""metrics.jsonl as a growing file: the complete lines since an offset, whatever else is in it.

A last line without its newline is left for the next time: the child may be writing it, or may have been killed there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from db.queue import Point

CHUNK = 1 << 20
"""Bytes read at once; a line longer than this is garbage, and one transaction stays small."""

_Count = Annotated[int, Field(ge=0, lt=2**63)]  # SQLite's integers end there


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    step: _Count
    tokens: _Count
    seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    values: dict[Annotated[str, Field(min_length=1, max_length=200)], float | None]


@dataclass(frozen=True, kw_only=True)
class NewLines:
    """What stood after an offset: points, the offset to go on from, and how many lines were not points."""

    points: list[Point]
    offset: int
    garbage: int

    @property
    def more(self) -> bool:
        """Whether anything was read, so that there may be more."""
        return bool(self.points or self.garbage)


def read_new_lines(path: Path, offset: int) -> NewLines:
    """The complete lines of `path` from `offset`, at most CHUNK bytes of them; none when there is no file yet."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            chunk = file.read(CHUNK)
    except FileNotFoundError:
        return NewLines(points=[], offset=offset, garbage=0)

    end = chunk.rfind(b"\n") + 1
    if not end and len(chunk) == CHUNK:
        return NewLines(points=[], offset=offset + CHUNK, garbage=1)

    points, garbage = [], 0
    for line in chunk[:end].split(b"\n")[:-1]:
        point = _parse(line)
        if point is None:
            garbage += 1
        else:
            points.append(point)

    return NewLines(points=points, offset=offset + end, garbage=garbage)


def _parse(line: bytes) -> Point | None:
    try:
        parsed = _Line.model_validate_json(line)
    except ValidationError:
        return None

    values = {
        name: None if value is None or not math.isfinite(value) else value for name, value in parsed.values.items()
    }
    return Point(step=parsed.step, tokens=parsed.tokens, seconds=parsed.seconds, values=values)
