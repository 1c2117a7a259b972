"""What a killed attempt left for the next one to go on from: `resume-STEP.pt` (docs/run-directory.md).

Attempts of a run lie in runs/RUN-TOKEN with ever higher tokens. A later one takes the checkpoint that it resumes from
over, so the newest directory that has any is the only one that counts, and checkpoints go when their run has ended.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from db.failpoints import failpoint
from db.processes import is_locked

_CHECKPOINTS = "resume-*.pt"


def find_earlier(runs_folder: Path, run_id: int, token: int) -> Path | None:
    """The newest attempt before `token` that left a checkpoint and of which no process lives; drops those before it."""
    for earlier in range(token - 1, 0, -1):
        directory = runs_folder / f"{run_id}-{earlier}"
        if any(directory.glob(_CHECKPOINTS)) and not is_locked(directory / "lock"):
            drop_checkpoints(runs_folder, run_id, earlier)
            return directory

    return None


def drop_checkpoints(runs_folder: Path, run_id: int, before: int) -> None:
    """Deletes the checkpoints of a run's attempts before token `before`."""
    for token in range(1, before):
        drop_in(runs_folder / f"{run_id}-{token}")


def drop_in(directory: Path) -> None:
    """Deletes the checkpoints of one attempt."""
    for path in directory.glob(_CHECKPOINTS):
        with suppress(OSError):  # on a read-only disk it stays
            path.unlink()
            failpoint("checkpoint.dropped")
