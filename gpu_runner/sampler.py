"""Looks at the card every few seconds, into gpu_samples. A card that cannot be read is said so and trains on.

A CPU has no samples: nothing here measures its power, so the energy of its runs stays unknown.
"""

from __future__ import annotations

import os
from contextlib import suppress

from db.cards import GpuSample, add_gpu_sample, note_disturbance
from db.clock import Instant
from db.records import Runner
from db.store import Store
from gpu_runner.card import Card
from gpu_runner.notices import Notices
from gpu_runner.nvml import Nvml, NvmlError, Sample, combine

FRESH_SECONDS = 1.0
"""A look that is younger than this is not taken again."""


class Sampler:
    """The looks at one card, or at those that train together as one. `failure` says why the last one failed, `last`
    what it saw."""

    def __init__(self, store: Store, runner: Runner, card: Card, nvml: Nvml, notices: Notices) -> None:
        self.last: Sample | None = None
        self.failure: str | None = None
        self._store = store
        self._runner = runner
        self._card = card
        self._nvml = nvml
        self._notices = notices
        self._looked_at = float("-inf")
        self._attempt_id: int | None = None
        self._ecc_errors: int | None = None

    def step(self, now: Instant, every: float, attempt_id: int | None, leader: int | None) -> None:
        """Stores a look for the attempt, if the last one is `every` seconds old or was for another attempt.

        Args:
            leader: the process that leads the attempt's session.
        """
        if self._card.device != "cuda":
            return

        begins = attempt_id not in (None, self._attempt_id)
        if begins or now.seconds >= self._looked_at + every:
            self._look(now)
            if begins and self.last is not None:
                self._ecc_errors = self.last.ecc_errors

            self._attempt_id = attempt_id
            self._store_look(now, attempt_id, leader)

    def conclude(self, now: Instant, attempt_id: int) -> str | None:
        """The last look for an attempt whose processes are dead; says what was wrong with the card, if anything."""
        if self._card.device != "cuda":
            return None

        self._look(now)
        self._store_look(now, attempt_id, None)
        if self.failure is not None:
            return f"the card was lost: {self.failure}"

        before = self._ecc_errors if attempt_id == self._attempt_id else None
        after = None if self.last is None else self.last.ecc_errors
        if before is None or after is None or after <= before:
            return None

        fault = f"the card had {after - before} uncorrectable memory error{'s' * (after - before != 1)}"
        note_disturbance(self._store, attempt_id, fault)
        return fault

    def refresh(self, now: Instant) -> None:
        """Looks again, unless it just has."""
        if self._card.device == "cuda" and now.seconds >= self._looked_at + FRESH_SECONDS:
            self._look(now)

    def _look(self, now: Instant) -> None:
        self._looked_at = now.seconds
        try:
            self.last, self.failure = combine([self._nvml.sample(uuid) for uuid in self._card.uuids]), None
        except NvmlError as error:
            self.last, self.failure = None, str(error)

        failure = self.failure and f"the card cannot be read, and nothing new is started on it: {self.failure}"
        self._notices.put("the card cannot be read", failure)

    def _store_look(self, now: Instant, attempt_id: int | None, leader: int | None) -> None:
        if (look := self.last) is None:
            return

        processes = self._card.processes
        sample = GpuSample(
            utilization_percent=look.utilization_percent,
            memory_bytes=look.memory_bytes,
            temperature_celsius=look.temperature_celsius,
            power_watts=look.power_watts,
            energy_joules=look.energy_joules,
            slowdowns=look.slowdowns,
            others=None if look.pids is None or leader is None else count_others(look.pids, leader, processes),
        )
        add_gpu_sample(self._store, self._runner.id, attempt_id, sample, now)


def count_others(pids: tuple[int, ...], leader: int, processes: int) -> int:
    """How many of the processes on a card, or several, are not of the session that `leader` leads.

    The driver numbers processes as the host does. In a container that numbers its own, none of them can be told to be
    ours; then all but so many `processes` are taken for others, since an attempt has one on each card.
    """
    sessions = []
    for pid in pids:
        with suppress(ProcessLookupError):
            sessions.append(os.getsid(pid))

    if leader in sessions or len(sessions) == len(pids):
        return len(pids) - sessions.count(leader)

    return max(0, len(pids) - processes)
