"""The disk under runs/: what stays there when an attempt has ended, and whether the next run has room.

While a run lives its directories hold two resumable checkpoints (gpu_runner/resume.py); afterwards the trained weights
alone, and those only as long as somebody may want them (db/weights.py). Everything else in a run directory is small.

What this does not do: delete rows, directories, or weights that a run needs. `blueberry clean` does more, and
asks first.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from pydantic import ValidationError

from db.events import add_event
from db.lab import Lab
from db.order import next_run
from db.processes import is_locked
from db.queue import get_run, live_attempts
from db.records import ENDED_RUN, Attempt, Run, Runner
from db.store import Store
from db.weights import (
    SPARE_BYTES,
    WEIGHTS,
    as_size,
    attempts_of,
    delete_in,
    delete_weights,
    drop_weights,
    held_bytes,
    list_weights,
    measure,
    note_bytes,
    unmeasured_attempts,
)
from gpu_runner.notices import Notices
from gpu_runner.resume import drop_in
from moe.accounting import disk_bytes
from moe.config import Config

_LOG = logging.getLogger(__name__)

_TORN = ".*.tmp"  # moe/rundir.py writes under such a name, and renames
_AT_ONCE = 500
_WORTH_SAYING = 0.1
"""Part by which what is missing must change to be told anew: others write to the disk all the time."""


def settle_files(store: Store, runs_folder: Path, run_id: int) -> None:
    """Deletes what nothing needs any more of a run's ended attempts; notes what is left once the run has ended too.

    It may be killed after any line, and is done again for attempts that are unmeasured.
    """
    run = get_run(store, run_id)
    for attempt in attempts_of(store, run_id):
        directory = runs_folder / attempt.directory
        if attempt.status == "live" or is_locked(directory / "lock"):
            continue

        delete_in(directory, _TORN)
        if attempt.status != "completed" or run.status != "completed" or attempt.weights_bytes == 0:
            delete_in(directory, WEIGHTS)  # of a run that goes on from resume-STEP.pt, has no result, or dropped them

        if run.status in ENDED_RUN:
            drop_in(directory)
            note_bytes(store, attempt.id, directory)


def settle_unmeasured(store: Store, runs_folder: Path) -> None:
    """Does what settle_files() did not come to, some hundreds of attempts at a time."""
    for run_id in sorted({attempt.run_id for attempt in unmeasured_attempts(store, limit=_AT_ONCE)}):
        settle_files(store, runs_folder, run_id)


def drop_unwanted(store: Store, runs_folder: Path, *, at_least: int | None = None) -> int:
    """Drops weights that nobody wants, the oldest first, until `at_least` bytes are free; returns how many are."""
    chosen, freed = [], 0
    for item in list_weights(store):
        if item.wanted_for is None and (at_least is None or freed < at_least):
            chosen.append(item.attempt_id)
            freed += item.bytes

    dropped = drop_weights(store, chosen) if chosen else []
    delete_weights(store, runs_folder, dropped)
    freed = sum(item.bytes for item in dropped)
    if dropped:
        _LOG.info("dropped the weights of %d runs, which nothing needs: %s", len(dropped), as_size(freed))

    return freed


class Room:
    """Whether the disk has room for the next run of one daemon; says so in its runner's row when it has not."""

    def __init__(self, lab: Lab, runner: Runner, notices: Notices) -> None:
        self.lab = lab
        self.store = lab.store
        self.runner = runner
        self.notices = notices
        self._said: str | None = None
        self._missing = 0

    def tidy(self) -> None:
        """Notes what ended attempts hold, and drops what the configuration does not keep."""
        settle_unmeasured(self.store, self.lab.runs_folder)
        if next_run(self.store, self.runner.hardware_class) is None:
            self._say(None)  # nothing waits for room any more

        if self.lab.settings.runner.keep == "needed":
            drop_unwanted(self.store, self.lab.runs_folder)

    def is_there(self) -> bool:
        """Whether the run that would be claimed next can write all it will, after unwanted weights have gone."""
        missing, said = self._look()
        if missing > 0 and drop_unwanted(self.store, self.lab.runs_folder, at_least=missing):
            missing, said = self._look()

        if missing <= 0:
            self._say(None)
        elif self._said is None or abs(missing - self._missing) > _WORTH_SAYING * self._missing:
            self._say(said)
            self._missing = missing

        return missing <= 0

    def _look(self) -> tuple[int, str]:
        """Bytes that are missing, and that in words."""
        run_id = next_run(self.store, self.runner.hardware_class)
        if run_id is None:
            return 0, ""

        others, run = 0, get_run(self.store, run_id)
        live = live_attempts(self.store)
        for attempt in live:
            if is_locked(self.lab.runs_folder / attempt.directory / "lock"):  # one that has just ended writes no more
                others += max(0, bytes_of(get_run(self.store, attempt.run_id)) - self._held(attempt))

        most = bytes_of(run)  # of which what an earlier attempt left is there already
        need = max(0, most - sum(map(self._held, attempts_of(self.store, run.id)))) + others
        what = f"run {run.id} ({run.kind}) writes {f'up to {as_size(most)}' if most else 'little'}"
        if others:
            what += f", and what trains now {as_size(others)} more"

        gib = self.lab.settings.runner.max_disk_gib
        if gib is not None:
            cap, unmeasured = int(gib * 2**30), unmeasured_attempts(self.store, limit=_AT_ONCE)
            held = held_bytes(self.store) + sum(map(self._held, [*live, *unmeasured]))
            if held + need > cap:
                said = f"disk: runs/ holds {as_size(held)} of max_disk_gib = {gib:g}, and {what}"
                return held + need - cap, f"{said}; run blueberry clean, or raise max_disk_gib under [runner]"

        free = shutil.disk_usage(self.lab.runs_folder).free
        said = f"disk: {as_size(free)} free of the {as_size(need + SPARE_BYTES)} needed: {what}"
        said += f", and {as_size(SPARE_BYTES)} are for the rest"
        return need + SPARE_BYTES - free, f"{said}; run blueberry clean, or free some space"

    def _held(self, attempt: Attempt) -> int:
        return sum(measure(self.lab.runs_folder / attempt.directory).values())

    def _say(self, said: str | None) -> None:
        if said == self._said:
            return

        if (said is None) != (self._said is None):
            add_event(self.store, "disk", said or "disk: there is room again")

        self.notices.put("disk", said)
        self._said = said


def bytes_of(run: Run) -> int:
    """The most that a run has on disk at once, apart from what is small."""
    if run.kind != "train":
        return 0

    try:
        return disk_bytes(Config.model_validate(run.config))
    except ValidationError:
        return 0  # the trainer will refuse it, in words, before it writes anything
