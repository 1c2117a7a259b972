"""What an attempt's run directory says of how it ended, read when all of its processes are dead.

A result (completed; pruned: the model diverged), a fault (failed: tried again, max_failures times), nothing to be had
(lost: killed from outside, or a card that failed; tried again, max_lost times), no memory (tried again with less), or
no disk (postponed: tried again when there is room). What the daemon itself ended is not known from here.
"""

from __future__ import annotations

import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from db.queue import Outcome
from db.records import RunKind
from gpu_runner.steps import STEPS

LOG_LINES = 30
_LOG_BYTES = 16_384
_TEXT = 2_000  # characters of an error that are kept in its row
_FILE_BYTES = 1 << 20
_DIVERGED = frozenset({"non_finite", "exploding_gradient", "dead_router"})  # moe/health.py
_OTHER_KILLED = "KilledProcessError"  # moe/parallel.py: one of several that train together
_CARD_SIGNS = (
    "torch sees no CUDA device",  # moe/rundir.py
    "no CUDA-capable device is detected",
    "devices unavailable",
    "busy or unavailable",
    "uncorrectable ECC error",
    "unsupported display driver",
    "system not yet initialized",
)
"""Parts of CUDA's messages (cudaGetErrorString) that are about the card or its driver, whatever the program did."""
_NO_DISK = frozenset({75, 120})  # moe/rundir.py; and Python's own where it cannot flush its last words to the log
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


@dataclass(frozen=True, kw_only=True)
class Lost:
    """The attempt has no result, and it is not the run's fault."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """Training needed more memory than there was: of the card, or of the machine, whose kernel then killed it."""

    reason: str
    log_tail: str
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class CardFailed(Lost):
    """The child found no card that works: what else is tried on it now will end the same way."""


@dataclass(frozen=True, kw_only=True)
class Postponed:
    """The attempt has no result, because the disk had no room; the run is put back, and nothing is counted."""

    reason: str


class _Exit(BaseModel):
    step: str
    exit_code: int
    terminated: bool
    oom_killed: bool = False


def read_outcome(directory: Path, kind: RunKind) -> Outcome | Lost | OutOfMemory | Postponed:
    """How the attempt in `directory` ended."""
    try:
        ended = _Exit.model_validate_json((directory / "exit.json").read_bytes())
    except OSError:
        return Lost(reason="all of its processes were killed before they left a result")
    except ValidationError:
        return Lost(reason="its exit.json cannot be read")

    if ended.exit_code == 0 and ended.step == STEPS[kind][-1]:
        return _result(directory, kind)

    if ended.exit_code in _NO_DISK:
        return Postponed(reason=f"moe.{ended.step} could not write: the disk was full or read-only")

    if ended.terminated:
        return Lost(reason=f"moe.{ended.step} was ended by SIGTERM")

    if ended.oom_killed and ended.exit_code == -signal.SIGKILL:
        return _out_of_memory(directory, ended, "the kernel killed it because the machine's memory was used up")

    if -ended.exit_code in _FROM_OUTSIDE:
        return Lost(reason=f"moe.{ended.step} was killed by {_signal(ended.exit_code)}")

    error = _read_object(directory / "error.json") or {}
    if error.get("error") == _OTHER_KILLED:
        if ended.oom_killed:
            return _out_of_memory(directory, ended, "the kernel killed one of its processes, as memory was used up")

        return Lost(reason=f"moe.{ended.step}: {_clip(error.get('message'))}")

    if error.get("error") in _DIVERGED:
        return Outcome(status="pruned", error=_clip(error.get("message") or "not finite"), exit_code=ended.exit_code)

    if error.get("error") == "out_of_memory":
        return _out_of_memory(directory, ended, str(error.get("message") or "no more is known"))

    if any(sign in str(error.get("message")) for sign in _CARD_SIGNS):
        return CardFailed(reason=_clip(error["message"]))

    if "error" in error:
        return _failed(directory, f"{error['error']}: {error.get('message', '')}", ended.exit_code)

    how = f"killed by {_signal(ended.exit_code)}" if ended.exit_code < 0 else f"exit code {ended.exit_code}"
    return _failed(directory, f"moe.{ended.step} ended without saying why ({how})", ended.exit_code)


def log_tail(path: Path) -> str:
    """The last lines of a log of any size and content, as text that any page can show."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            text = file.read(_LOG_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""

    return "\n".join(text.replace("\0", "").splitlines()[-LOG_LINES:])


def _result(directory: Path, kind: RunKind) -> Outcome:
    score = _read_object(directory / "score.json")
    if score is None:
        return _failed(directory, "score.json is missing, or is not one JSON object of finite numbers", 0)

    if kind == "probe":
        return Outcome(status="completed", score={**score, "passed": _has_passed(score)}, exit_code=0)

    val_bpb = score.get("val_bpb")
    if isinstance(val_bpb, bool) or not isinstance(val_bpb, int | float) or not math.isfinite(val_bpb):
        return _failed(directory, f"score.json has no val_bpb but {val_bpb!r}", 0)

    return Outcome(status="completed", score={**score, "val_bpb": float(val_bpb)}, exit_code=0)


def _has_passed(score: dict[str, Any]) -> bool:
    """Whether a treatment may train: every changed knob acts, it fits, and no model that passes for causal peeks.

    One that says of itself that it looks at later tokens may train; its verdict is labelled (agents/judge.py).
    """
    acts = score.get("acts")
    return (
        isinstance(acts, dict)
        and all(isinstance(seen, dict) and seen.get("acts") is True for seen in acts.values())
        and (score.get("causal") is True or score.get("declared_causal") is False)
        and score.get("fits") is True
    )


def _out_of_memory(directory: Path, ended: _Exit, message: str) -> Outcome | OutOfMemory:
    reason = f"out of memory: {message}"
    if ended.step != "train":  # nothing else can be cut up into smaller pieces
        return _failed(directory, f"moe.{ended.step}: {reason}", ended.exit_code)

    return OutOfMemory(reason=_clip(reason), log_tail=log_tail(directory / "log.txt"), exit_code=ended.exit_code)


def _failed(directory: Path, error: str, exit_code: int) -> Outcome:
    return Outcome(status="failed", error=_clip(error), log_tail=log_tail(directory / "log.txt"), exit_code=exit_code)


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_FILE_BYTES))

        json.dumps(content, allow_nan=False)  # refuses NaN, Infinity and 1e999
    except (OSError, ValueError, RecursionError):
        return None

    return content if isinstance(content, dict) else None


def _clip(text: object) -> str:
    return str(text).replace("\0", "")[:_TEXT]


def _signal(exit_code: int) -> str:
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
