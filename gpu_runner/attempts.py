"""The attempts that one daemon looks after: found again, watched, ended, and settled when their processes are dead.

Each call writes what it finds in one fenced transaction, so it may be killed after any line: what it had not yet
written is still in the run directory. An attempt that somebody else has taken over is let go.
"""

from __future__ import annotations

import logging
import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from db.clock import Instant
from db.errors import FencedError
from db.events import add_event
from db.failpoints import failpoint
from db.lab import Lab
from db.queue import (
    Outcome,
    adopt_attempt,
    finish_attempt,
    get_run,
    ingest,
    live_attempts,
    lose_attempt,
    put_back,
    set_pid,
)
from db.records import Attempt, Run, RunKind, Runner
from db.settings import Runner as RunnerSettings
from gpu_runner.child import Child
from gpu_runner.disk import settle_files
from gpu_runner.gate import Gate
from gpu_runner.metrics import NewLines, read_new_lines
from gpu_runner.outcome import Lost, Postponed, log_tail, read_outcome
from gpu_runner.pruning import find_beaten
from gpu_runner.shim import GRACE_SECONDS
from gpu_runner.watchdog import Watchdog

_LOG = logging.getLogger(__name__)

KILL_SECONDS = GRACE_SECONDS + 1.0
"""After a request to leave a checkpoint and end, until all of an attempt's processes are killed."""

_LONGEST_BACK_OFF = 30.0


@dataclass(kw_only=True)
class Held:
    """An attempt that this daemon looks after. Times are seconds since boot.

    `verdict` is how it ends if it leaves no result, where this daemon has ended it; `put_back` why it has ended it to
    have the run go on later; `curve_grew` whether val_bpb has a point that no baseline was compared with.
    """

    attempt: Attempt
    kind: RunKind
    child: Child
    offset: int
    renewed_at: float
    watchdog: Watchdog
    kill_at: float | None = None
    verdict: Outcome | None = None
    put_back: str | None = None
    garbage: int = 0
    rebooted: bool = False
    curve_grew: bool = True


class Attempts:
    """The attempts of one daemon, by id in `held`.

    Whoever reads `ended` sets it back: since then an attempt has ended, so that a place on the card may be free and
    the mind has something to judge. `quiet_until` is the time before which nothing new should be started, because
    attempts were lost one after the other.
    """

    def __init__(self, lab: Lab, runner: Runner, gate: Gate) -> None:
        self.lab = lab
        self.store = lab.store
        self.runner = runner
        self.gate = gate
        self.held: dict[int, Held] = {}
        self.former: list[subprocess.Popen[bytes]] = []
        self.stopping = False
        self.ended = False
        self.quiet_until = 0.0
        self._losses = 0

    def hold(self, attempt: Attempt, kind: RunKind, child: Child, now: Instant, *, rebooted: bool = False) -> None:
        """Looks after an attempt from now on."""
        if child.pid is not None and attempt.pid != child.pid:
            set_pid(self.store, attempt, child.pid)
            failpoint("start.noted")

        self.held[attempt.id] = Held(
            attempt=attempt,
            kind=kind,
            child=child,
            offset=attempt.metrics_offset,
            renewed_at=now.seconds,
            watchdog=Watchdog(
                child.directory, self.lab.data_folder, now, shim=child.pid if child.process is None else None
            ),
            rebooted=rebooted,
        )

    def adopt(self, now: Instant) -> None:
        """Takes over live attempts whose owner is dead or past its lease; watch() finds out what became of them.

        The lock is looked at after the takeover is written, and a starting daemon looks for a takeover after it has
        the lock: so no child is started for an attempt that was given up.
        """
        for attempt in live_attempts(self.store):
            ours = attempt.runner_id == self.runner.id
            rebooted = attempt.boot_id != now.boot_id
            if attempt.id in self.held or not (ours or rebooted or attempt.lease_until < now.seconds):
                continue

            try:
                adopted = adopt_attempt(
                    self.store, attempt, self.runner, now, lease_seconds=self._settings.lease_seconds
                )
            except FencedError:
                continue

            child = Child(self.lab.runs_folder / adopted.directory)
            child.wake()
            self.hold(adopted, get_run(self.store, adopted.run_id).kind, child, now, rebooted=rebooted)
            _LOG.info("adopted attempt %d of run %d", adopted.id, adopted.run_id)

    def watch(self, now: Instant, *, changed: bool) -> None:
        """Takes in what the children wrote, ends those that should end, and settles those that are dead.

        Args:
            changed: whether anybody has written to the database since the last time.
        """
        for held in list(self.held.values()):
            with self._letting_go(held):
                self._watch(held, now, changed=changed)

    def end_all(self, now: Instant) -> None:
        """Ends the children because the daemon stops; watch() then puts their runs back into the queue."""
        self.stopping = True
        for held in self.held.values():
            self._end(held, now, grace=KILL_SECONDS)

    def put_back_all(self, reason: str, now: Instant) -> None:
        """Ends the children for this reason; they leave checkpoints, and watch() puts their runs back."""
        for held in self.held.values():
            held.put_back = reason
            self._end(held, now, grace=KILL_SECONDS)

    def are_timed(self) -> bool:
        """Whether time is a budget or a result of what is done now, so that no other work may disturb it."""
        return any(_is_timed(held, get_run(self.store, held.attempt.run_id)) for held in self.held.values())

    def reap(self) -> None:
        """Waits for the shims that have ended, which would stay zombies."""
        self.former = [process for process in self.former if process.poll() is None]

    def _watch(self, held: Held, now: Instant, *, changed: bool) -> None:
        if held.kill_at is not None and now.seconds >= held.kill_at:
            held.child.kill()

        alive = held.child.is_alive()  # before reading: what a dead process wrote is all there
        new = read_new_lines(held.child.directory / "metrics.jsonl", held.offset)
        lease_due = now.seconds - held.renewed_at >= self._settings.lease_seconds / 3
        if new.more or lease_due:
            cancel = self._ingest(held, new, now)
        else:
            cancel = changed and get_run(self.store, held.attempt.run_id).cancel_requested

        if cancel:
            self._end(held, now)

        if alive:
            problem = held.watchdog.look(now, self._settings, heard=new.more)
            if problem is not None and held.kill_at is None:
                held.verdict = Outcome(status="failed", error=problem)
                self._end(held, now)

            held.curve_grew |= any("val_bpb" in point.values for point in new.points)
            if held.kill_at is None and held.curve_grew:
                held.curve_grew = False
                held.verdict = self._find_beaten(held)
                if held.verdict is not None:
                    failpoint("prune.found")
                    self._end(held, now)
                    failpoint("prune.killed")

            # Without its shim nobody will learn the exit code or evaluate the checkpoint: to train on would only keep
            # the card busy, so the rest of the session is ended and the run done again.
            if not held.child.has_shim():
                held.child.kill()

            return

        while new.more:
            new = read_new_lines(held.child.directory / "metrics.jsonl", held.offset)
            self._ingest(held, new, now)

        self._settle(held, now)

    def _ingest(self, held: Held, new: NewLines, now: Instant) -> bool:
        with self.store.transaction("ingest"):
            cancel = ingest(
                self.store, held.attempt, new.points, new.offset, now, lease_seconds=self._settings.lease_seconds
            )
            if new.garbage and not held.garbage:
                message = f"run {held.attempt.run_id}: metrics.jsonl has lines that are not points; they are skipped"
                add_event(self.store, "garbage", message, run_id=held.attempt.run_id)

        held.offset, held.renewed_at, held.garbage = new.offset, now.seconds, held.garbage + new.garbage
        return cancel

    def _end(self, held: Held, now: Instant, *, grace: float = 0.0) -> None:
        """Ends an attempt: at once, or with time to leave a checkpoint."""
        if grace and held.kill_at is None:
            held.child.terminate()
        elif not grace:
            held.child.kill()

        held.kill_at = min(now.seconds + grace, math.inf if held.kill_at is None else held.kill_at)

    def _settle(self, held: Held, now: Instant) -> None:
        """Writes how an attempt ended, whose processes are all dead."""
        found = read_outcome(held.child.directory, held.kind)
        if isinstance(found, Lost) and held.verdict is None:
            held.verdict = self._find_beaten(held)  # a daemon may have died between ending it and this

        if held.verdict is not None and not (isinstance(found, Outcome) and found.status != "failed"):
            found = replace(held.verdict, log_tail=log_tail(held.child.directory / "log.txt"))

        outcome = self.gate.weigh(now, held.attempt, found)
        failpoint("settle.read")
        has_result = isinstance(outcome, Outcome) and outcome.status != "failed"
        if not has_result and get_run(self.store, held.attempt.run_id).cancel_requested:
            outcome = Outcome(status="cancelled")

        if isinstance(outcome, Outcome):
            run = finish_attempt(self.store, held.attempt, outcome, max_failures=self._settings.max_failures)
            self._losses = 0
        elif self.stopping or held.put_back is not None:
            run = put_back(self.store, held.attempt, held.put_back or "its runner was stopped")
        else:
            if isinstance(outcome, Postponed):
                run = put_back(self.store, held.attempt, outcome.reason)
            else:
                reason = "the machine was restarted" if held.rebooted else outcome.reason
                run = lose_attempt(self.store, held.attempt, reason, max_lost=self._settings.max_lost)

            self._losses += 1
            self.quiet_until = now.seconds + min(_LONGEST_BACK_OFF, 0.05 * 2.0**self._losses)

        self._release(held)
        failpoint("settle.released")
        settle_files(self.store, self.lab.runs_folder, run.id)
        failpoint("settle.tidied")
        _LOG.info("run %d is %s%s", run.id, run.status, f": {run.error}" if run.error else "")

    def _find_beaten(self, held: Held) -> Outcome | None:
        return find_beaten(self.store, held.attempt) if self._settings.prune else None

    def _release(self, held: Held) -> None:
        del self.held[held.attempt.id]
        held.child.close()
        if held.child.process is not None:
            self.former.append(held.child.process)

        self.ended = True

    @property
    def _settings(self) -> RunnerSettings:
        return self.lab.settings.runner

    @contextmanager
    def _letting_go(self, held: Held) -> Iterator[None]:
        try:
            yield
        except FencedError as error:
            _LOG.warning("let go of attempt %d: %s", held.attempt.id, error)
            self._release(held)


def _is_timed(held: Held, run: Run) -> bool:
    if run.kind == "post":
        return True

    return run.config.get("budget_seconds") is not None and not (held.child.directory / "train.json").exists()
