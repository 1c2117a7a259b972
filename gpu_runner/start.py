"""Starting a run that was claimed: what its process is asked to do, and the reasons for which it cannot be done."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from db.clock import Instant
from db.lab import Lab
from db.micro_batches import note_attempt
from db.processes import FileLock
from db.queries import completed_directory
from db.queue import Claim, ingest
from db.records import READS_CHECKPOINT, Run
from db.weights import forget_weights
from gpu_runner.card import Card
from gpu_runner.child import Child
from gpu_runner.launcher import Launcher
from gpu_runner.resume import find_earlier
from moe.fingerprint import code_hash

_LOG = logging.getLogger(__name__)

_STALE = "moe/ has changed since this run was queued, so it would not be the run that was asked for; enqueue it again"

_NO_CHECKPOINT = "the weights of run {run_id} are gone from {directory}; enqueue again, and they are trained anew"


def find_problem(lab: Lab, run: Run) -> str | None:
    """Why a claimed run cannot be done here, in words for its row; None when it can.

    Weights that are missing are noted as gone, so that the next experiment that needs them has them trained.
    """
    if run.code != code_hash():
        return _STALE

    checkpoint = _checkpoint_for(lab, run)
    if run.needs_run_id is not None and checkpoint is not None and not (checkpoint / "checkpoint.pt").exists():
        forget_weights(lab.store, run.needs_run_id)
        return _NO_CHECKPOINT.format(run_id=run.needs_run_id, directory=checkpoint)

    return None


def start_child(
    lab: Lab,
    card: Card,
    claim: Claim,
    slots: Sequence[FileLock],
    launcher: Launcher,
    now: Instant,
    micro_batch_size: int | None,
) -> Child:
    """Starts the processes of a claimed run, from its last checkpoint where an earlier attempt left one.

    Args:
        micro_batch_size: what fits the card (gpu_runner/fit.py); None leaves the run's config as it is.

    Raises:
        FencedError: the attempt was taken over meanwhile; nothing was started.
        FileExistsError: its folder is left from another life of the lab; another attempt has another folder.
        OSError: the processes could not be started.
    """
    attempt, run = claim.attempt, claim.run
    config = run.config
    if micro_batch_size is not None:
        note_attempt(lab.store, attempt, micro_batch_size, asked=int(run.config["micro_batch_size"] or 0))
        config = config | {"micro_batch_size": micro_batch_size}

    earlier = find_earlier(lab.runs_folder, run.id, attempt.token)
    checkpoint = _checkpoint_for(lab, run)
    request: dict[str, Any] = {
        "kind": run.kind,
        "config": config,
        "baseline": run.baseline,
        "seed": run.seed,
        "device": card.device,
        "threads": card.threads,
        "processes": card.processes,
        "data_dir": str(lab.data_folder),
        "split": "test" if run.purpose == "confirm" else "val",  # sealed: confirmations alone see it
        "resume": None if earlier is None else str(earlier),
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    lease = lab.settings.runner.lease_seconds
    child = Child.start(
        lab.runs_folder / attempt.directory,
        request,
        slots=slots,
        confirm=lambda: ingest(lab.store, attempt, [], 0, now, lease_seconds=lease),
        launcher=launcher,
    )
    how = "" if earlier is None else f", from the checkpoint of {earlier.name}"
    _LOG.info("run %d (%s, seed %d) started as attempt %d%s", run.id, run.kind, run.seed, attempt.id, how)
    return child


def _checkpoint_for(lab: Lab, run: Run) -> Path | None:
    """The directory of the run whose checkpoint this one reads."""
    if run.kind not in READS_CHECKPOINT or run.needs_run_id is None:
        return None

    return lab.runs_folder / (completed_directory(lab.store, run.needs_run_id) or str(run.needs_run_id))
