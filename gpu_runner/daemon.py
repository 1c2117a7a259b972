"""The hands of the lab: claims runs, has child processes do them, and carries what they write into the database.

`Daemon.step(now)` is all of it; time is passed in, and `python -m gpu_runner` is the loop around it. A step finds
attempts whose owner died, takes new metrics in, settles what has ended, claims what waits, and wakes the mind process
(`python -m agents`) when a run has ended. It may be killed after any line: what it had not yet written is still in the
run directory, and the next daemon adopts the children that train on.

What this does not do: decide which runs there are (agents/), grade them (moe/evaluate.py), or survive its lease: a
daemon that was suspended past it finds its attempts fenced, and lets go.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from db.clock import Instant
from db.errors import FencedError, LabUnusableError
from db.events import add_event
from db.experiments import experiments_to_judge
from db.lab import Lab
from db.processes import FileLock
from db.queries import completed_directory
from db.queue import (
    Claim,
    Outcome,
    adopt_attempt,
    claim_run,
    count_queued,
    finish_attempt,
    get_run,
    ingest,
    live_attempts,
    lose_attempt,
    put_back,
    set_pid,
)
from db.records import READS_CHECKPOINT, Attempt, Run, RunKind
from db.runners import beat_runner, register_runner, start_runner, stop_runner
from gpu_runner.card import Card
from gpu_runner.child import Child, child_environment
from gpu_runner.metrics import NewLines, read_new_lines
from gpu_runner.mind import MindWaker
from gpu_runner.nvml import Nvml
from gpu_runner.outcome import read_outcome
from gpu_runner.resume import drop_checkpoints, drop_ended, find_earlier
from gpu_runner.sampler import Sampler
from gpu_runner.shim import GRACE_SECONDS
from moe.fingerprint import code_hash

_LOG = logging.getLogger(__name__)

SLOTS = 1
"""Attempts on one card at a time."""

KILL_SECONDS = GRACE_SECONDS + 2.0
"""After a request to end, until all of an attempt's processes are killed."""

_LONGEST_BACK_OFF = 30.0

_STALE = "moe/ has changed since this run was queued, so it would not be the run that was asked for; enqueue it again"

_NO_CHECKPOINT = "the checkpoint of run {run_id} is gone from {directory}; put it back from a backup and enqueue again"


@dataclass(kw_only=True)
class Held:
    """An attempt that this daemon looks after. Times are seconds since boot."""

    attempt: Attempt
    kind: RunKind
    child: Child
    offset: int
    renewed_at: float
    kill_at: float | None = None
    garbage: int = 0
    rebooted: bool = False


class Daemon:
    """One card's daemon. The caller holds the card's lock, so that a former daemon of this card is dead."""

    def __init__(self, lab: Lab, card: Card, nvml: Nvml, at: Instant) -> None:
        self.lab = lab
        self.card = card
        self.store = lab.store
        self.settings = lab.settings.runner
        self.held: dict[int, Held] = {}
        self.former: list[subprocess.Popen[bytes]] = []
        self.stopping = False
        self.runner = register_runner(self.store, card.columns())
        start_runner(self.store, self.runner.id, pid=os.getpid(), boot_id=at.boot_id, message=card.message)
        self.mind = MindWaker(lab, due=bool(experiments_to_judge(self.store)))
        drop_ended(self.store, lab.runs_folder)
        self._sampler = Sampler(self.store, self.runner, card, nvml)
        self._version = -1
        self._claimable = True
        self._claim_after = at.seconds
        self._beat_after = at.seconds
        self._losses = 0

    def step(self, now: Instant) -> None:
        """Does all that is due at `now`.

        Raises:
            LabUnusableError, OSError: the lab cannot be used at the moment; the next step goes on where this one was.
        """
        version = self.store.data_version()
        changed = version != self._version
        if now.seconds >= self._beat_after:
            self._beat(now)
            self._recover(now)

        for held in list(self.held.values()):
            with self._letting_go(held):
                self._watch(held, now, changed=changed)

        if (changed or self._claimable) and not self.stopping and now.seconds >= self._claim_after:
            self._claim(now)

        self._sampler.step(now, self.settings.sample_seconds, next(iter(self.held), None))
        self.mind.step()
        self._version = version

    def begin_stop(self, now: Instant) -> None:
        """Ends the children and claims no more; the steps that follow put the runs back into the queue."""
        self.stopping = True
        for held in self.held.values():
            self._end(held, now)

    def close(self, message: str) -> None:
        """Notes that this daemon has gone."""
        stop_runner(self.store, self.runner.id, message)

    def _beat(self, now: Instant) -> None:
        if not self.store.path.exists():  # SQLite goes on writing to a file that was deleted
            raise LabUnusableError(f"{self.store.path} is gone")

        beat_runner(self.store, self.runner.id)
        self.former = [process for process in self.former if process.poll() is None]
        self._claimable = True  # a place on the card may have become free without a word in the database
        self._beat_after = now.seconds + self.settings.lease_seconds / 3

    def _recover(self, now: Instant) -> None:
        """Adopts live attempts whose owner is dead or past its lease; _watch then finds out what became of them.

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
                    self.store, attempt, self.runner, now, lease_seconds=self.settings.lease_seconds
                )
            except FencedError:
                continue

            child = Child(self.lab.runs_folder / adopted.directory)
            if child.pid is not None and adopted.pid != child.pid:
                set_pid(self.store, adopted, child.pid)

            self.held[adopted.id] = Held(
                attempt=adopted,
                kind=get_run(self.store, adopted.run_id).kind,
                child=child,
                offset=adopted.metrics_offset,
                renewed_at=now.seconds,
                rebooted=rebooted,
            )
            _LOG.info("adopted attempt %d of run %d", adopted.id, adopted.run_id)

    def _watch(self, held: Held, now: Instant, *, changed: bool) -> None:
        if held.kill_at is not None and now.seconds >= held.kill_at:
            held.child.kill()

        alive = held.child.is_alive()  # before reading: what a dead process wrote is all there
        new = read_new_lines(held.child.directory / "metrics.jsonl", held.offset)
        lease_due = now.seconds - held.renewed_at >= self.settings.lease_seconds / 3
        if new.more or lease_due:
            cancel = self._ingest(held, new, now)
        else:
            cancel = changed and get_run(self.store, held.attempt.run_id).cancel_requested

        if cancel:
            self._end(held, now)

        if alive:
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
        with self.store.transaction():
            cancel = ingest(
                self.store, held.attempt, new.points, new.offset, now, lease_seconds=self.settings.lease_seconds
            )
            if new.garbage and not held.garbage:
                message = f"run {held.attempt.run_id}: metrics.jsonl has lines that are not points; they are skipped"
                add_event(self.store, "garbage", message, run_id=held.attempt.run_id)

        held.offset, held.renewed_at, held.garbage = new.offset, now.seconds, held.garbage + new.garbage
        return cancel

    def _end(self, held: Held, now: Instant) -> None:
        if held.kill_at is None:
            held.child.terminate()
            held.kill_at = now.seconds + KILL_SECONDS

    def _settle(self, held: Held, now: Instant) -> None:
        """Writes how an attempt ended, whose processes are all dead."""
        outcome = read_outcome(held.child.directory, held.kind)
        has_result = isinstance(outcome, Outcome) and outcome.status != "failed"
        if not has_result and get_run(self.store, held.attempt.run_id).cancel_requested:
            outcome = Outcome(status="cancelled")

        if isinstance(outcome, Outcome):
            run = finish_attempt(self.store, held.attempt, outcome, max_failures=self.settings.max_failures)
            self._losses = 0
        elif self.stopping:
            run = put_back(self.store, held.attempt, "its runner was stopped")
        else:
            reason = "the machine was restarted" if held.rebooted else outcome.reason
            run = lose_attempt(self.store, held.attempt, reason, max_lost=self.settings.max_lost)
            self._losses += 1
            self._claim_after = now.seconds + min(_LONGEST_BACK_OFF, 0.05 * 2.0**self._losses)

        if run.status != "queued":
            drop_checkpoints(self.lab.runs_folder, run.id, before=held.attempt.token + 1)

        self._release(held)
        self.mind.due = True
        _LOG.info("run %d is %s%s", run.id, run.status, f": {run.error}" if run.error else "")

    def _claim(self, now: Instant) -> None:
        self._claimable = False
        if not count_queued(self.store, self.card.hardware_class):
            return

        for number in range(SLOTS):
            with FileLock(self.lab.lock(f"slot-{self.card.key}-{number}")) as slot:
                if slot.acquire():
                    claim = claim_run(self.store, self.runner, now, lease_seconds=self.settings.lease_seconds)
                    if claim is not None:
                        self._start(claim, slot, now)
                        self._claimable = True

    def _start(self, claim: Claim, slot: FileLock, now: Instant) -> None:
        attempt, run = claim.attempt, claim.run
        checkpoint = self._checkpoint_for(run)
        problem = _STALE if run.code != code_hash() else None
        if checkpoint is not None and not (checkpoint / "checkpoint.pt").exists():
            problem = _NO_CHECKPOINT.format(run_id=run.needs_run_id, directory=checkpoint)

        if problem is not None:
            finish_attempt(self.store, attempt, Outcome(status="failed", error=problem), max_failures=1)
            self.mind.due = True
            return

        earlier = find_earlier(self.lab.runs_folder, run.id, attempt.token)
        request = {
            "kind": run.kind,
            "config": run.config,
            "baseline": run.baseline,
            "seed": run.seed,
            "device": self.card.device,
            "threads": self.card.threads,
            "data_dir": str(self.lab.data_folder),
            "split": "val",
            "resume": None if earlier is None else str(earlier),
            "checkpoint": None if checkpoint is None else str(checkpoint),
        }
        lease = self.settings.lease_seconds
        try:
            child = Child.start(
                self.lab.runs_folder / attempt.directory,
                request,
                slot=slot,
                confirm=lambda: ingest(self.store, attempt, [], 0, now, lease_seconds=lease),
                environment=child_environment(self.card),
            )
        except FencedError:
            return
        except FileExistsError as error:  # the next attempt has another token, and so another folder
            lose_attempt(self.store, attempt, str(error), max_lost=self.settings.max_lost)
            return
        except OSError as error:
            put_back(self.store, attempt, f"its processes could not be started: {error}")
            self._claim_after = now.seconds + _LONGEST_BACK_OFF
            raise

        self.held[attempt.id] = Held(attempt=attempt, kind=run.kind, child=child, offset=0, renewed_at=now.seconds)
        if child.pid is not None:
            set_pid(self.store, attempt, child.pid)

        how = "" if earlier is None else f", from the checkpoint of {earlier.name}"
        _LOG.info("run %d (%s, seed %d) started as attempt %d%s", run.id, run.kind, run.seed, attempt.id, how)

    def _checkpoint_for(self, run: Run) -> Path | None:
        """The directory of the run whose checkpoint this one reads."""
        if run.kind not in READS_CHECKPOINT or run.needs_run_id is None:
            return None

        return self.lab.runs_folder / (completed_directory(self.store, run.needs_run_id) or str(run.needs_run_id))

    def _release(self, held: Held) -> None:
        del self.held[held.attempt.id]
        if held.child.process is not None:
            self.former.append(held.child.process)

        self._claimable = True

    @contextmanager
    def _letting_go(self, held: Held) -> Iterator[None]:
        try:
            yield
        except FencedError as error:
            _LOG.warning("let go of attempt %d: %s", held.attempt.id, error)
            self._release(held)
