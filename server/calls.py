"""Asking the agents on behalf of a verb: within a time, and with a handle when they need longer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from agents.answers import answer
from db.lab import Lab
from db.records import Task

PATIENCE_SECONDS = 20.0
"""How long a verb waits for the agents over MCP, all its steps together. The command line waits longer."""

IdempotencyKey = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=200,
        description="a text of your choice that names this call: repeated with the same key it is done once, and "
        "picks up an answer that was still being worked on",
    ),
]


class Asking:
    """The steps of one call, which share its patience and its idempotency key."""

    def __init__(self, lab: Lab, key: str | None, patience: float) -> None:
        self._lab = lab
        self._key = key
        self._deadline = time.monotonic() + patience

    def ask(self, kind: str, arguments: Mapping[str, Any], *, step: str = "") -> Task:
        """The agents' answer, or a task that is still queued or running.

        Args:
            step: names a further step of the same call, which then has a key of its own.

        Raises:
            LabError: the call was refused or failed.
        """
        key = f"{self._key}/{step}" if self._key and step else self._key
        left = max(0.0, self._deadline - time.monotonic())
        return answer(self._lab, kind, arguments, idempotency_key=key, wait_seconds=left)
