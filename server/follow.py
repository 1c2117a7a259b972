"""Watching the research live: a table on a terminal, a line at each change elsewhere. It only looks: Ctrl-C stops
the looking and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live

from agents.answers import wake
from agents.hands import is_alive
from db.events import events_after, latest_event_id
from db.lab import Lab
from db.queries import Overview, overview
from server.show import event_text, progress_line, progress_table, queue_line
from server.views import event_line

_LOOK_SECONDS = 0.5
_WAKE_SECONDS = 3.0
_LINE_SECONDS = 3.0
_QUIET_SECONDS = 20.0
"""Without a terminal, progress is told when val_bpb is new, at most every 3 s, and otherwise every 20 s."""


class Watch:
    """Tells what happens in a lab from its making on; used in a with statement."""

    def __init__(self, lab: Lab, console: Console, *, since_event: int | None = None) -> None:
        self._lab = lab
        self._console = console
        self._seen = latest_event_id(lab.store) if since_event is None else since_event
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._told_at = 0.0
        self._told: tuple[tuple[int, float | None], ...] = ()
        self._woken_at = 0.0
        self._warned = False

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()

        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def until(self, is_over: Callable[[], bool]) -> None:
        """Watches until `is_over`, and tells what led there."""
        while True:
            over = is_over()
            self.look(time.monotonic())
            if over:
                return

            time.sleep(_LOOK_SECONDS)

    def look(self, now: float) -> None:
        """Tells what is new at this moment."""
        if now - self._woken_at > _WAKE_SECONDS:  # whoever killed the mind process shall not stop the research
            self._woken_at = now
            wake(self._lab)

        for event in events_after(self._lab.store, self._seen, limit=200):
            self._seen = event.id
            self._console.print(event_text(event_line(event)))

        seen = overview(self._lab.store)
        self._warn_once(seen)
        if self._live:
            self._live.update(progress_table(seen), refresh=True)
        else:
            self._tell(seen, now)

    def _tell(self, seen: Overview, now: float) -> None:
        running = [run for run in seen.running if run.step]
        told = tuple((run.run_id, run.val_bpb) for run in running)
        wait = _LINE_SECONDS if told != self._told else _QUIET_SECONDS
        if running and now - self._told_at > wait:
            line = "; ".join(progress_line(run) for run in running)
            self._console.print(f"          {line} ({queue_line(seen)})", markup=False)
            self._told_at, self._told = now, told

    def _warn_once(self, seen: Overview) -> None:
        waits = seen.queued and not any(is_alive(self._lab, runner) for runner in seen.runners)
        if waits and not seen.cycles_running and not self._warned:
            self._warned = True
            self._console.print(f"{seen.queued} runs wait and no runner is alive; start it with: blueberry run")
