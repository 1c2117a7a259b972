"""Whether a run may be started on the card now, and whether what trains may go on: the day's budget, the card, memory.

What this does not do: look at the run that would be started (gpu_runner/fit.py), or write how one ended (attempts.py).
"""

from __future__ import annotations

from db.budget import reached
from db.cards import note_disturbance
from db.clock import Instant, utc_now
from db.lab import Lab
from db.queue import Outcome
from db.records import Attempt, Run, Runner
from gpu_runner.fit import Fit, fit_run, host_memory_in_use, note_completed, step_down
from gpu_runner.notices import Notices
from gpu_runner.outcome import CardFailed, Lost, OutOfMemory, Postponed
from gpu_runner.sampler import Sampler

BUDGET_SECONDS = 1.0
"""Between two looks at the budget, which may be overdrawn by as much."""

FREEING_SECONDS = 30.0
"""The longest wait for the memory of processes that have ended; the driver frees it soon after their death."""

WAIT_SECONDS = 600.0
"""After which a run that waited for memory is looked at again, since another may be first in the queue by then."""

_SLACK_BYTES = 256 * 2**20

_OTHERS_BYTES = 2**30  # a desktop on the card takes less
_FIRST_BACK_OFF, _LONGEST_BACK_OFF = 5.0, 600.0


class Gate:
    """Opens and closes one card's queue. Why it is closed is in the runner's message."""

    def __init__(self, lab: Lab, runner: Runner, sampler: Sampler, notices: Notices) -> None:
        self._lab = lab
        self._store = lab.store
        self._runner = runner
        self._sampler = sampler
        self._notices = notices
        self._budget_after = float("-inf")
        self._budget: str | None = None
        self._empty_bytes: int | None = None
        self._freeing_until = float("-inf")
        self._waiting: Fit | None = None
        self._wait_until = float("-inf")
        self._card_failures = 0
        self._closed_until = float("-inf")

    def over_budget(self, now: Instant) -> str | None:
        """Which cap of the day is reached, in words; None while something is left or there is no cap."""
        if now.seconds >= self._budget_after:
            self._budget_after = now.seconds + BUDGET_SECONDS
            self._budget = self._reached()
            self._notices.put("over budget", self._budget)

        return self._budget

    def is_open(self, now: Instant, *, just_died: bool) -> bool:
        """Whether a run may be started now; no other of ours lives on the card.

        Args:
            just_died: whether one may have, of which weigh() has not heard yet.
        """
        if just_died:
            self._freeing_until = now.seconds + FREEING_SECONDS

        if self.over_budget(now) is not None or now.seconds < self._closed_until:
            return False

        self._sampler.refresh(now)
        return self._sampler.failure is None and not self._is_freeing(now) and not self._is_waiting(now)

    def in_use_bytes(self) -> int:
        """Of the card's memory, or the machine's, while none of our runs is there."""
        if self._runner.device == "cpu":
            return host_memory_in_use(self._runner.memory_bytes)

        look = self._sampler.last
        return 0 if look is None or look.memory_bytes is None else look.memory_bytes

    def fit(self, run: Run) -> Fit:
        """What the card that is there makes of a claimed run."""
        return fit_run(self._store, self._runner, run, self._lab.settings.gpu_optimization, self.in_use_bytes())

    def starts(self, attempt: Attempt) -> None:
        """A run is about to be started; its memory is what comes on top of what is in use now."""
        self._empty_bytes = self.in_use_bytes()
        if self._runner.device == "cuda" and self._empty_bytes > _OTHERS_BYTES:
            said = f"others used {self._empty_bytes / 2**30:.1f} GiB of the card's memory when it started"
            note_disturbance(self._store, attempt.id, said)

    def wait(self, now: Instant, fit: Fit) -> None:
        """Stays closed until so much memory is free that the run fits."""
        self._waiting, self._wait_until = fit, now.seconds + WAIT_SECONDS
        self._notices.put("waiting for memory", fit.waits)

    def weigh(
        self, now: Instant, attempt: Attempt, outcome: Outcome | Lost | OutOfMemory | Postponed
    ) -> Outcome | Lost | Postponed:
        """What the end of an attempt counts as, given how the card is: a failure is none if it was the card's."""
        fault = self._sampler.conclude(now, attempt.id)
        self._freeing_until = now.seconds + FREEING_SECONDS
        if isinstance(outcome, OutOfMemory):
            return step_down(self._store, self._runner, attempt, outcome)

        if isinstance(outcome, Outcome) and outcome.status == "failed" and fault is not None:
            outcome = CardFailed(reason=f"{fault}; the run said: {outcome.error}")

        if isinstance(outcome, CardFailed) and self._sampler.failure is None:  # else it opens when the card answers
            self._close_for_failure(now, outcome)
        elif isinstance(outcome, Outcome) and outcome.status == "completed":
            self._card_failures = 0
            self._notices.put("the card failed", None)
            note_completed(self._store, self._runner, attempt)

        return outcome

    def _close_for_failure(self, now: Instant, outcome: CardFailed) -> None:
        pause = min(_LONGEST_BACK_OFF, _FIRST_BACK_OFF * 2.0**self._card_failures)
        self._card_failures += 1
        self._closed_until = now.seconds + pause
        times = f"{self._card_failures} time{'s' * (self._card_failures != 1)}"
        text = f"the card failed {times}, {outcome.reason}; the next run is tried {pause:.0f} s later"
        self._notices.put("the card failed", text)

    def _is_freeing(self, now: Instant) -> bool:
        if self._runner.device == "cpu" or self._empty_bytes is None:
            return False

        in_use = self.in_use_bytes()
        waits = now.seconds < self._freeing_until and in_use > self._empty_bytes + _SLACK_BYTES
        text = f"waits until the memory of the last run is free; {in_use / 2**30:.1f} GiB of the card's are in use"
        self._notices.put("memory not free yet", text if waits else None)
        return waits

    def _is_waiting(self, now: Instant) -> bool:
        if self._waiting is None:
            return False

        if now.seconds < self._wait_until and self.in_use_bytes() > self._waiting.in_use_bytes:
            return True

        self._waiting = None
        self._notices.put("waiting for memory", None)
        return False

    def _reached(self) -> str | None:
        settings = self._lab.settings.runner
        if (cap := reached(self._store, settings, utc_now())) is not None:
            return cap

        look = self._sampler.last
        measured = self._runner.device == "cuda" and (
            look is None or look.power_watts is not None or look.energy_joules is not None
        )
        if settings.kwh_per_day is None or measured:
            return None

        return (
            f"kwh_per_day is set, but {self._runner.device_name} does not measure its power, so nothing is started; "
            "take it out of [runner], or use gpu_hours_per_day"
        )
