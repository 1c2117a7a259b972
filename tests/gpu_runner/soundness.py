"""What must hold in a lab when all is over, whatever was killed: each run ended once, nothing doubled, nobody left.

`find_faults` looks at the database, the run directories, the locks and the processes of the machine, and says in
sentences what is wrong. It expects the stand-ins of tests/gpu_runner/standin, whose train_loss at step n is 1 / n.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from db.lab import Lab
from db.processes import is_locked
from db.store import Store


def find_faults(lab: Lab, *, daemons: Collection[int] = ()) -> list[str]:
    """Everything that should not be, in a lab whose queue is empty; `daemons` may still live, each with a warm process.

    What takes a moment (a process ends, a starting daemon deletes checkpoints) is a fault until it has happened.
    """
    return [
        *_rows(lab.store),
        *_runs(lab),
        *_metrics(lab),
        *_folders(lab),
        *_locks(lab.folder),
        *_processes(lab.folder, daemons),
    ]


def lab_processes(folder: Path) -> dict[int, str]:
    """The living processes that work in the lab or were told of it, but for us: number and the module it runs."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue

        with suppress(OSError):  # it has ended meanwhile
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            is_here = (entry / "cwd").readlink().is_relative_to(folder) or str(folder) in "\0".join(command)
            if is_here and command != [""]:  # a zombie has no command line
                found[int(entry.name)] = _module(command, (entry / "comm").read_text().strip())

    return found


def _module(command: list[str], name: str) -> str:
    if name.startswith(("gpu_runner.", "moe.")):  # a fork, which has its parent's command line and a name of its own
        return name

    module = command[command.index("-m") + 1] if "-m" in command else "gpu_runner"
    return module.removeprefix("tests.gpu_runner.")


def _rows(store: Store) -> Iterator[str]:
    for row in store.rows("PRAGMA integrity_check"):
        if row["integrity_check"] != "ok":
            yield f"integrity: {row['integrity_check']}"

    for row in store.rows("PRAGMA foreign_key_check"):
        yield f"a row of {row['table']} names one missing in {row['parent']}"

    for row in store.rows("SELECT id FROM attempts WHERE status = 'live'"):
        yield f"attempt {row['id']} is shown as live for ever"

    for row in store.rows("SELECT run_id, token FROM attempts GROUP BY run_id, token HAVING count(*) > 1"):
        yield f"run {row['run_id']} gave its token {row['token']} twice"

    for row in store.rows("SELECT id FROM attempts WHERE ended_at IS NULL OR ended_at < started_at"):
        yield f"attempt {row['id']} ended before it began"


def _runs(lab: Lab) -> Iterator[str]:
    rows = lab.store.rows(
        """
        SELECT runs.id, runs.status, runs.lost, runs.failures,
               (SELECT count(*) FROM events WHERE events.run_id = runs.id AND events.kind = 'ended') AS ends,
               (SELECT count(*) FROM attempts WHERE run_id = runs.id AND status = 'completed') AS completed,
               (SELECT count(*) FROM attempts WHERE run_id = runs.id AND status = 'lost') AS lost_attempts,
               (SELECT count(*) FROM attempts WHERE run_id = runs.id AND status = 'failed') AS failed_attempts,
               coalesce(json_extract(config, '$.score'), '{"val_bpb": 1.5}') AS promised, runs.score
        FROM runs
        """
    )
    for row in rows:
        name = f"run {row['id']} ({row['status']})"
        if row["status"] not in ("completed", "cancelled", "pruned", "failed"):
            yield f"{name} has not ended"
        elif row["ends"] != 1:
            yield f"{name} ended {row['ends']} times"

        if row["completed"] != (row["status"] in ("completed", "pruned")):
            yield f"{name} has {row['completed']} completed attempts"

        if (row["lost"], row["failures"]) != (row["lost_attempts"], row["failed_attempts"]):
            yield f"{name} counts {row['lost']} lost and {row['failures']} failed attempts, and has others"

        if row["status"] == "completed" and not json.loads(row["promised"]).items() <= json.loads(row["score"]).items():
            yield f"{name} has the score {row['score']}, and its process gave {row['promised']}"


def _metrics(lab: Lab) -> Iterator[str]:
    for attempt in lab.store.rows("SELECT id, run_id, status, directory FROM attempts"):
        path = lab.runs_folder / attempt["directory"] / "metrics.jsonl"
        written = path.read_bytes().count(b"\n") if path.exists() else 0
        points = lab.store.rows(
            "SELECT step, value FROM metric_points WHERE attempt_id = ? AND name = 'train_loss' ORDER BY step",
            (attempt["id"],),
        )
        wanted = [{"step": step, "value": 1.0 / step} for step in range(1, len(points) + 1)]
        name = f"attempt {attempt['id']} of run {attempt['run_id']} ({attempt['status']})"
        if points != wanted:
            yield f"{name}: its {len(points)} points have a gap or a wrong value"

        if len(points) > written or (attempt["status"] == "completed" and len(points) != written):
            yield f"{name}: {len(points)} points of {written} written"


def _folders(lab: Lab) -> Iterator[str]:
    known = {row["directory"] for row in lab.store.rows("SELECT directory FROM attempts")}
    for directory in lab.runs_folder.iterdir():
        if directory.name not in known:
            yield f"runs/{directory.name} belongs to no attempt"

    for path in lab.runs_folder.glob("*/resume-*"):
        yield f"{path.relative_to(lab.folder)} is left of a run that has ended"

    if (lab.folder / "doubled").exists():
        yield f"two processes trained a run at the same time: {(lab.folder / 'doubled').read_text()}"


def _locks(folder: Path) -> Iterator[str]:
    for path in [*folder.glob("locks/*.lock"), *folder.glob("runs/*/lock"), *folder.glob("runs/*/shim.lock")]:
        if not path.name.startswith("runner-") and is_locked(path):
            yield f"{path.relative_to(folder)} is held"


def _processes(folder: Path, daemons: Collection[int]) -> Iterator[str]:
    for pid, name in lab_processes(folder).items():
        is_spare = name == "gpu_runner.warm" and _parent(pid) in daemons  # it waits for the next run
        if pid not in daemons and not is_spare:
            yield f"process {pid} lives: {name}"


def _parent(pid: int) -> int | None:
    with suppress(OSError):  # it has ended meanwhile
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    return None
