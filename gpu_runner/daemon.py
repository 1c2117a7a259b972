"""The hands of the lab: claims runs, has child processes do them, and carries what they write into the database.

`Daemon.step(now)` is all of it; time is passed in, and `python -m gpu_runner` is the loop around it. A step finds
attempts whose owner died, takes new metrics in, settles what has ended (gpu_runner/attempts.py), claims what waits and
starts it (gpu_runner/start.py), and wakes the mind process (`python -m agents`) when a run has ended. It may be killed
after any line: what it had not yet written is still in the run directory, and the next daemon adopts the children that
train on.

What this does not do: decide which runs there are (agents/), grade them (moe/evaluate.py), or survive its lease: a
daemon that was suspended past it finds its attempts fenced, and lets go.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack

from db.clock import Instant
from db.errors import FencedError, LabUnusableError
from db.experiments import experiments_to_judge
from db.failpoints import failpoint
from db.lab import Lab
from db.order import next_run
from db.processes import FileLock
from db.queue import Claim, Outcome, claim_run, finish_attempt, lose_attempt, put_back
from db.records import RunnerMode
from db.runners import beat_runner, get_runner, register_runner, set_mode, start_runner, stop_runner
from gpu_runner.attempts import Attempts
from gpu_runner.card import Card
from gpu_runner.child import child_environment
from gpu_runner.disk import Room
from gpu_runner.fit import Fit
from gpu_runner.gate import Gate
from gpu_runner.launcher import Launcher
from gpu_runner.mind import MindWaker
from gpu_runner.notices import Notices
from gpu_runner.nvml import Nvml
from gpu_runner.sampler import Sampler
from gpu_runner.start import find_problem, start_child

_START_BACK_OFF = 30.0
"""Until the next claim when processes cannot be started (no memory, no file descriptors)."""


class Daemon:
    """One card's daemon. The caller holds the card's lock, so that a former daemon of this card is dead."""

    def __init__(self, lab: Lab, card: Card, nvml: Nvml, at: Instant) -> None:
        self.lab = lab
        self.card = card
        self.store = lab.store
        self.runner = register_runner(self.store, card.columns())
        failpoint("daemon.registered")
        start_runner(self.store, self.runner.id, pid=os.getpid(), boot_id=at.boot_id, message=card.message)
        notices = Notices(self.store, self.runner.id, card.message)
        self._sampler = Sampler(self.store, self.runner, card, nvml, notices)
        self._gate = Gate(lab, self.runner, self._sampler, notices)
        self.attempts = Attempts(lab, self.runner, self._gate)
        self.launcher = Launcher(child_environment(card), lab.log("runner"))
        self.mind = MindWaker(lab, due=bool(experiments_to_judge(self.store)))
        self.room = Room(lab, self.runner, notices)
        failpoint("daemon.ready")
        self._version = -1
        self._mode: RunnerMode = "open"
        self._claimable = True
        self._claim_after = at.seconds
        self._beat_after = at.seconds
        self._stepped_at = math.inf
        self._patient = False

    def step(self, now: Instant) -> None:
        """Does all that is due at `now`.

        Raises:
            LabUnusableError, OSError: the lab cannot be used at the moment; the next step goes on where this one was.
            NewerLabError: nor will it ever be, by this program.
        """
        version = self.store.data_version()
        changed = version != self._version
        if now.seconds >= self._beat_after:
            self._beat(now)
            # Whoever was suspended together with us (another card's daemon) may first renew its leases, once.
            self._patient = not self._patient and now.seconds - self._stepped_at > self._lease_seconds
            if not self._patient:
                self.attempts.adopt(now)

        if (over := self._gate.over_budget(now)) is not None:
            self.attempts.put_back_all(over, now)

        self._stepped_at = now.seconds
        self.attempts.watch(now, changed=changed)
        self.launcher.step(now, in_use=bool(self.attempts.held))
        if self.attempts.ended:
            self.attempts.ended = False
            self._claimable = True
            self.mind.due = True

        if (changed or self._claimable) and self._may_claim(now):
            self._claim(now)

        held = next(iter(self.attempts.held.values()), None)
        attempt_id, leader = (None, None) if held is None else (held.attempt.id, held.child.pid)
        self._sampler.step(now, self.lab.settings.runner.sample_seconds, attempt_id, leader)
        self.mind.step()
        if changed:
            self._mode = get_runner(self.store, self.runner.id).mode

        self._version = version

    def begin_stop(self, now: Instant) -> None:
        """Ends the children and claims no more; the steps that follow put the runs back into the queue."""
        self.attempts.end_all(now)
        failpoint("daemon.stopping")

    def is_drained(self) -> bool:
        """Whether the daemon was asked to end when nothing trains any more, and nothing does."""
        return not self.attempts.held and self._mode == "draining"

    @property
    def waits_on(self) -> list[int]:
        """Descriptors of which one becomes readable when there is something to do before the next step is due."""
        ends = [held.child.end for held in self.attempts.held.values()]
        return [descriptor for descriptor in (*ends, self.launcher.waits_on) if descriptor is not None]

    def close(self, message: str) -> None:
        """Notes that this daemon has gone. Once drained, the next one may claim again."""
        self.launcher.close()
        with self.store.transaction("close"):
            stop_runner(self.store, self.runner.id, message)
            if self.is_drained():
                set_mode(self.store, self.runner.id, "open")

    @property
    def _lease_seconds(self) -> float:
        return self.lab.settings.runner.lease_seconds

    def _beat(self, now: Instant) -> None:
        if not self.store.path.exists():  # SQLite goes on writing to a file that was deleted
            raise LabUnusableError(f"{self.store.path} is gone")

        self.store.pending()  # raises if a newer Blueberry has changed the lab meanwhile

        beat_runner(self.store, self.runner.id)
        self.attempts.reap()
        self.room.tidy()
        self._claimable = True  # a place on the card may have become free without a word in the database
        self._beat_after = now.seconds + self._lease_seconds / 3

    def _may_claim(self, now: Instant) -> bool:
        return not self.attempts.stopping and now.seconds >= max(self._claim_after, self.attempts.quiet_until)

    def _claim(self, now: Instant) -> None:
        self._claimable = False
        if next_run(self.store, self.card.hardware_class) is None:
            return

        if not self.launcher.is_settled(now, quiet=self._mode != "open" or self.attempts.are_timed()):
            self._claimable = True
            return

        with ExitStack() as held:
            slots = [held.enter_context(FileLock(self.lab.lock(f"slot-{name}"))) for name in self.card.slots]
            if not all(slot.acquire() for slot in slots) or not self.room.is_there():
                return

            self._claimable = True  # looks again at the next step, also where the gate is closed
            if self._gate.is_open(now, just_died=bool(self.attempts.held)):
                claim = self._win(now)
                self._claimable = claim is not None
                if claim is not None:
                    self._start(claim, slots, now)

    def _win(self, now: Instant) -> Claim | None:
        with self.store.transaction():  # so that nothing is claimed after whoever paused the runner was told that it is
            if get_runner(self.store, self.runner.id).mode != "open":
                return None

            return claim_run(self.store, self.runner, now, lease_seconds=self._lease_seconds)

    def _start(self, claim: Claim, slots: Sequence[FileLock], now: Instant) -> None:
        problem = find_problem(self.lab, claim.run)
        fit = Fit(problem=problem) if problem else self._gate.fit(claim.run)
        if fit.problem is not None:
            finish_attempt(self.store, claim.attempt, Outcome(status="failed", error=fit.problem), max_failures=1)
            self.mind.due = True
            return

        if fit.waits is not None:
            self._gate.wait(now, fit)
            put_back(self.store, claim.attempt, fit.waits)
            return

        try:
            self._gate.starts(claim.attempt)
            child = start_child(self.lab, self.card, claim, slots, self.launcher, now, fit.micro_batch_size)
        except FencedError:
            return
        except FileExistsError as error:  # the next attempt has another token, and so another folder
            lose_attempt(self.store, claim.attempt, str(error), max_lost=self.lab.settings.runner.max_lost)
            return
        except OSError as error:
            put_back(self.store, claim.attempt, f"its processes could not be started: {error}")
            self._claim_after = now.seconds + _START_BACK_OFF
            raise

        self.attempts.hold(claim.attempt, claim.run.kind, child, now)
