"""Looks at the card every few seconds, into gpu_samples. A card that cannot be read is said so and trains on."""

from __future__ import annotations

import logging
from dataclasses import asdict

from db.clock import Instant
from db.records import Runner
from db.runners import add_gpu_sample, beat_runner
from db.store import Store
from gpu_runner.card import Card
from gpu_runner.nvml import Nvml, NvmlError

_LOG = logging.getLogger(__name__)


class Sampler:
    """The samples of one card; a CPU has none."""

    def __init__(self, store: Store, runner: Runner, card: Card, nvml: Nvml) -> None:
        self._store = store
        self._runner = runner
        self._card = card
        self._nvml = nvml
        self._after = 0.0
        self._complaint = ""

    def step(self, now: Instant, every: float, attempt_id: int | None) -> None:
        """Takes a sample for the attempt, if the last one is `every` seconds old."""
        if self._card.device != "cuda" or now.seconds < self._after:
            return

        self._after = now.seconds + every
        try:
            add_gpu_sample(self._store, self._runner.id, attempt_id, asdict(self._nvml.sample(self._card.key)))
            complaint = ""
        except NvmlError as error:
            complaint = f"; the card cannot be read: {error}"

        if complaint != self._complaint:
            self._complaint = complaint
            beat_runner(self._store, self._runner.id, message=self._card.message + complaint)
            _LOG.warning("%s%s", self._card.message, complaint)
