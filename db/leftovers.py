"""What lies in a lab's folder and may go: found, said why, and deleted when a person agrees (`blueberry clean`).

Safe while a daemon trains: the directory of an attempt that is live, or that a process holds, is never looked into, and
weights are given up in one transaction with the look whether a run needs them. Links are not followed. Rows stay.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from db.errors import NotFoundError
from db.lab import Lab
from db.logs import list_logs
from db.processes import FileLock, is_locked
from db.queue import get_run
from db.records import ENDED_RUN
from db.weights import (
    WEIGHTS,
    attempt_in,
    delete_weights,
    drop_weights,
    list_weights,
    note_bytes,
    unmeasured_attempts,
)

Kind = Literal["weights", "checkpoint", "temporary", "orphan", "log", "data"]

_ATTEMPT = re.compile(r"[1-9]\d*-[1-9]\d*")
_PREPARED = re.compile(r"(.+)-(\w+)-(\d+)-[0-9a-f]{12}")  # moe/prepared.py: corpus, tokenizer, vocabulary, content
_TORN = (".*.tmp", ".exit.json.*", ".config.json.*")
_MANY = 1_000_000
_OLD_SECONDS = 3600.0
"""A temporary file outside of runs/, where no lock tells, is taken for torn when nobody wrote to it for so long."""

_WHY = {
    "improved": "of a treatment that improved; trained anew if it is ever needed",
    "baseline": "of a baseline; trained anew if it is ever needed",
    None: "its experiment is over, or it has no result: nothing needs them",
}


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A file or folder that may go, and why. `attempt_id` is that of weights."""

    kind: Kind
    path: Path
    why: str
    bytes: int
    attempt_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Text:
    """Of a prepared corpus: what its folder is named by, the hash of its content left out."""

    corpus: str
    tokenizer: str
    vocab_size: int


def find_leftovers(
    lab: Lab, *, kept: bool = False, remade: Collection[str] = (), used: Collection[Text] = ()
) -> list[Leftover]:
    """All that may go, the largest of each kind first.

    Args:
        kept: also the weights of baselines and of what improved.
        remade: corpora whose prepared folders may go, because they can be made again from what no user has to keep.
        used: prepared texts that stay, beside those of runs that wait or belong to an open experiment.
    """
    for attempt in unmeasured_attempts(lab.store, limit=_MANY):
        if attempt.weights_bytes is None and get_run(lab.store, attempt.run_id).status in ENDED_RUN:
            note_bytes(lab.store, attempt.id, lab.runs_folder / attempt.directory)

    also = ("improved", "baseline") if kept else ()
    found = [*_weights(lab, also), *_in_runs(lab), *_elsewhere(lab), *_prepared(lab, remade, used)]
    order: list[Kind] = ["weights", "checkpoint", "temporary", "orphan", "log", "data"]
    return sorted(found, key=lambda item: (order.index(item.kind), -item.bytes))


def delete_leftovers(lab: Lab, found: Iterable[Leftover]) -> list[Leftover]:
    """Deletes what was found; returns what is gone. What has come to be needed meanwhile stays."""
    found = list(found)
    weights = {item.attempt_id: item for item in found if item.attempt_id is not None}
    dropped = drop_weights(lab.store, set(weights) - {None}, also=("improved", "baseline")) if weights else []
    delete_weights(lab.store, lab.runs_folder, dropped)
    gone = [weights[item.attempt_id] for item in dropped]
    for item in found:
        if item.attempt_id is None and _delete(lab, item):
            gone.append(item)

    return gone


def _weights(lab: Lab, also: Collection[str]) -> Iterator[Leftover]:
    for item in list_weights(lab.store):
        path = lab.runs_folder / item.directory / WEIGHTS
        if item.wanted_for is None or item.wanted_for in also:
            why = f"run {item.run_id}: {_WHY[item.wanted_for]}"
            yield Leftover(kind="weights", path=path, why=why, bytes=item.bytes, attempt_id=item.attempt_id)


def _in_runs(lab: Lab) -> Iterator[Leftover]:
    # Folders first, rows after: an attempt has its row before it has its folder.
    for directory in sorted(path for path in lab.runs_folder.iterdir() if _ATTEMPT.fullmatch(path.name)):
        if directory.is_symlink() or not directory.is_dir() or not _is_dead(lab, directory):
            continue

        if attempt_in(lab.store, directory.name) is None:
            why = "no run of this lab: of another life of it, from before a backup was restored"
            yield Leftover(kind="orphan", path=directory, why=why, bytes=_size(directory))
            continue

        for pattern in _TORN:
            for path in directory.glob(pattern):
                why = "torn: a process was killed while it wrote it"
                yield Leftover(kind="temporary", path=path, why=why, bytes=_size(path))

        for path in directory.glob("resume-*.pt"):
            if _has_ended(lab, directory):
                why = "to go on from, and its run has ended"
                yield Leftover(kind="checkpoint", path=path, why=why, bytes=_size(path))


def _elsewhere(lab: Lab) -> Iterator[Leftover]:
    for path in list_logs(lab.folder / "logs"):
        yield Leftover(kind="log", path=path, why="a log that was set aside when it was full", bytes=_size(path))

    torn = [*(lab.folder / "backups").glob(".lab-*.part"), *lab.data_folder.glob(".*.tmp")]
    for path in torn:
        if abs(time.time() - path.lstat().st_mtime) > _OLD_SECONDS:  # also where the clock was set back
            why = "torn: a process was killed while it wrote it"
            yield Leftover(kind="temporary", path=path, why=why, bytes=_size(path))


def _prepared(lab: Lab, remade: Collection[str], used: Collection[Text]) -> Iterator[Leftover]:
    needed = {*used, *_texts_of_open_runs(lab)}
    for folder in sorted(lab.data_folder.iterdir()) if remade else []:
        name = _PREPARED.fullmatch(folder.name)
        if name is None or folder.is_symlink() or not folder.is_dir() or name[1] not in remade:
            continue

        if Text(corpus=name[1], tokenizer=name[2], vocab_size=int(name[3])) not in needed:
            why = f"{name[1]} in tokens of {name[2]}: no open experiment reads it, and it can be made again"
            yield Leftover(kind="data", path=folder, why=why, bytes=_size(folder))


def _texts_of_open_runs(lab: Lab) -> set[Text]:
    rows = lab.store.rows(
        """
        SELECT DISTINCT json_extract(config, '$.corpus') AS corpus, json_extract(config, '$.tokenizer') AS tokenizer,
               json_extract(config, '$.vocab_size') AS vocab_size
        FROM runs WHERE status IN ('queued', 'running') OR id IN (
            SELECT run_id FROM experiment_runs JOIN experiments ON experiments.id = experiment_runs.experiment_id
            WHERE experiments.status IN ('queued', 'running'))
        """
    )
    return {Text(**row | {"corpus": str(row["corpus"]).partition("@")[0]}) for row in rows}


def _delete(lab: Lab, item: Leftover) -> bool:
    with suppress(OSError):
        if item.kind == "orphan" and attempt_in(lab.store, item.path.name) is not None:
            return False

        if item.kind == "data":
            # Held while it goes: whoever needs it meanwhile waits, finds it gone, and makes it anew.
            with FileLock(item.path.with_name(f"{item.path.name}.lock")) as lock:
                if not lock.acquire():
                    return False

                shutil.rmtree(item.path)
        elif item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path)
        else:
            item.path.unlink()

        return True

    return False


def _is_dead(lab: Lab, directory: Path) -> bool:
    attempt = attempt_in(lab.store, directory.name)
    return (attempt is None or attempt.status != "live") and not is_locked(directory / "lock")


def _has_ended(lab: Lab, directory: Path) -> bool:
    try:
        return get_run(lab.store, int(directory.name.partition("-")[0])).status in ENDED_RUN
    except NotFoundError:
        return False


def _size(path: Path) -> int:
    """Bytes of a file, or of all below a folder; links count as themselves, and what is not there as nothing."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(_size(below) for below in path.iterdir())

        return path.lstat().st_size
    except FileNotFoundError:
        return 0
