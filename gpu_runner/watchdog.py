"""Time-outs of an attempt: how long it may run, and how long it may show no sign of life.

A sign of life is anything that changes in the run directory (metrics, log, checkpoints, scores) or among the lab's
corpora, which a first run tokenizes. Use of the processor is none: a process that waits for a sick card spins.

Only time in which the daemon looked is counted, so that a machine that was suspended for the night does not find its
run too old in the morning.
"""

from __future__ import annotations

import os
from pathlib import Path

from db.clock import Instant
from db.processes import started_at
from db.records import OUT_OF_TIME
from db.settings import Runner as RunnerSettings

_LONGEST_GAP = 60.0
"""Between two looks; more than that was a suspended machine or daemon, and does not count."""

_LOOKS = 4  # at the folders, within stall_seconds


class Watchdog:
    """The time-outs of one attempt."""

    def __init__(self, directory: Path, data_folder: Path, now: Instant, *, shim: int | None = None) -> None:
        """Begins now; with the process id of a `shim` that is adopted, at the start of that process."""
        self._folders = (directory, data_folder)
        self._seen_at = now.seconds
        begun = None if shim is None else started_at(shim)
        self._ran = 0.0 if begun is None else max(0.0, now.seconds - begun)
        self._silent = 0.0
        self._looked = 0.0
        self._state: frozenset[tuple[str, int, int]] = frozenset()

    def look(self, now: Instant, settings: RunnerSettings, *, heard: bool) -> str | None:
        """Why the attempt must end now; None while it may go on.

        Args:
            heard: whether there were new metrics since the last look.
        """
        gap = min(_LONGEST_GAP, max(0.0, now.seconds - self._seen_at))
        self._seen_at = now.seconds
        self._ran += gap
        self._silent = 0.0 if heard else self._silent + gap
        if heard:
            self._looked = 0.0

        if settings.max_run_seconds is not None and self._ran > settings.max_run_seconds:
            return f"{OUT_OF_TIME}: it ran for more than {settings.max_run_seconds:g} s (runner.max_run_seconds)"

        stall = settings.stall_seconds
        if stall is None or self._silent < self._looked + stall / _LOOKS:
            return None

        self._looked = self._silent
        state = frozenset(_files(*self._folders))
        if state != self._state:
            self._state = state
            self._silent = self._looked = 0.0
        elif self._silent >= stall:
            return f"no metric, log line or file for {stall:g} s (runner.stall_seconds): it hung, and was ended"

        return None


def _files(*folders: Path) -> list[tuple[str, int, int]]:
    found = []
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(root, name)
                try:
                    status = os.stat(path)
                except OSError:  # renamed or deleted meanwhile
                    continue

                found.append((path, status.st_size, status.st_mtime_ns))

    return found
