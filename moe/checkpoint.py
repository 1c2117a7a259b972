"""Resumable checkpoints: `resume-STEP.pt` in the run directory, the newest two, each whole or known not to be.

A run that was killed goes on from the newest sound one in the directory of a later attempt. On a CPU, with a budget in
tokens, its weights and its score are then bit for bit those of a run that was never interrupted. A file is torch's
own format with the SHA-256 of all before it as its last 64 characters; what does not match it counts as damaged.

What this does not do: hold the final weights (moe/train.py writes checkpoint.pt), or delete the last two. The runner
does, when the run has ended: a run that is killed while it is scored still needs them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from moe.config import scientific
from moe.fingerprint import code_hash
from moe.rundir import CHECKPOINT_SECONDS, Request, write_atomically

KEPT = 2  # the current one and the one before, in case the current one is damaged
MOST_COST = 0.02  # of the training time; a checkpoint that takes longer to write is written less often
TERM_SECONDS = 2.5  # from SIGTERM until a checkpoint must stand; after 3 s gpu_runner/shim.py kills

_DIGEST = 64  # characters of SHA-256 in hexadecimal


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, request: Request) -> None:
        self.directory = directory
        self.identity: dict[str, Any] = {
            "config": scientific(request.config),
            "seed": request.seed,
            "device": request.device,
            "code": code_hash(),
        }
        self.every = request.checkpoint_seconds
        self._saved_at = 0.0
        self._cost = 0.0

    def due(self, seconds: float) -> bool:
        """Whether one is to be written after so many counted seconds of training."""
        slower = max(1.0, self._cost / (MOST_COST * CHECKPOINT_SECONDS))
        return seconds - self._saved_at >= self.every * slower

    def fits(self, since: float) -> bool:
        """Whether there is time to write one after a SIGTERM at `since` (time.monotonic())."""
        return time.monotonic() - since + self._cost <= TERM_SECONDS

    def save(self, state: Mapping[str, Any]) -> None:
        """Write one and keep the one before. A disk that is full costs the checkpoint, not the run."""
        started = time.monotonic()
        step, self._saved_at = state["step"], state["seconds"]
        content = {"identity": self.identity, "state": dict(state), "rng": _rng_state(self.identity["device"])}
        try:
            write_atomically(self.directory / f"resume-{step:09d}.pt", lambda file: _write(file, content))
        except (OSError, RuntimeError) as error:  # torch reports a failed write as either
            _say(f"no checkpoint at step {step}: {error}")
        else:
            for path in _newest_first(self.directory)[KEPT:]:
                path.unlink(missing_ok=True)

        self._cost = time.monotonic() - started

    def resume(self, earlier: Path) -> dict[str, Any] | None:
        """The newest sound state in `earlier`, with random numbers set to go on from there; None if there is none.

        The points of metrics.jsonl until then and the checkpoint itself become this directory's own, so that it
        stands for the whole run and the next attempt needs no other.
        """
        for path in _newest_first(earlier):
            content = _read(path)
            if content is None:
                _say(f"{path} is damaged")
                continue

            if content["identity"] != self.identity:
                _say(f"{path} is of another config, seed, device or code")
                continue

            state: dict[str, Any] = content["state"]
            lines = _lines_until(earlier / "metrics.jsonl", state["step"])
            if lines is None:
                _say(f"{path} is of no use: the points of metrics.jsonl do not lead up to it")
                continue

            self._take_over(path, lines)
            self._saved_at = state["seconds"]
            _set_rng_state(content["rng"])
            _say(f"resumed at step {state['step']} from {earlier}")
            return state

        _say(f"no checkpoint in {earlier} can be used; starting from the beginning")
        return None

    def _take_over(self, path: Path, lines: bytes) -> None:
        write_atomically(self.directory / "metrics.jsonl", lambda file: file.write(lines))
        own = self.directory / path.name
        if own.exists():
            return

        try:
            os.link(path, own)
        except OSError:  # a file system without hard links
            with path.open("rb") as source:
                write_atomically(own, lambda file: shutil.copyfileobj(source, file))


@contextmanager
def noting_sigterm() -> Iterator[list[float]]:
    """Within it, SIGTERM appends its time (time.monotonic()) to the list instead of killing."""
    received: list[float] = []
    previous = signal.signal(signal.SIGTERM, lambda _number, _frame: received.append(time.monotonic()))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


def end_by_sigterm() -> None:
    """End as SIGTERM would have done; whoever waits sees that it was the signal."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("resume-*.pt"), reverse=True)


def _write(file: BinaryIO, content: Mapping[str, Any]) -> None:
    torch.save(content, file)
    file.flush()
    with Path(file.name).open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()

    file.write(digest.encode())


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a sound file. Read on the CPU: the card has no room for the state twice."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[:-_DIGEST]).hexdigest().encode() != content[-_DIGEST:]:
            return None

        loaded: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        return loaded
    except (OSError, RuntimeError, pickle.UnpicklingError):
        return None


def _lines_until(path: Path, step: int) -> bytes | None:
    """The points up to `step`; None if that is not one of them, as it is for every checkpoint."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        steps = [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]
        return b"".join(lines[: steps.index(step) + 1])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rng_state(device: str) -> dict[str, Any]:
    on_card = [torch.cuda.get_rng_state()] if device == "cuda" else []  # to ask for it otherwise would occupy the card
    return {"cpu": torch.get_rng_state(), "cuda": on_card}


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    for on_card in state["cuda"]:
        torch.cuda.set_rng_state(on_card)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
