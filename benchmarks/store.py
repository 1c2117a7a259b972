"""How fast the database takes work in: claims and metric rows a second, by one process and by several.

.venv/bin/python -m benchmarks.store [--seconds 5] [--folder DIR]

Everything goes through the functions that the runner uses (claim_run, ingest), each call one commit that is on disk
when it returns (synchronous=FULL), so the disk of DIR decides: by default that of temporary files; one in memory, such
as /dev/shm, shows what is left without. Claims are made out of 20,000 queued runs. p50, p99 and the longest are times
of single calls, waiting for other writers included; the last column is the processor time of a call, which other work
on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.lab_size import build
from db.clock import now
from db.events import add_event
from db.lab import Lab
from db.queue import Point, claim_run, ingest
from db.runners import get_runner
from db.store import Store

LEASE = 30.0
EXPERIMENTS = 20_000
PROCESSES = (1, 2, 4)


def claim(store: Store) -> Callable[[], int]:
    """Claims one run; how many there were."""
    runner = get_runner(store, 1)
    return lambda: int(claim_run(store, runner, now(), lease_seconds=LEASE) is not None)


def journal(store: Store) -> Callable[[], int]:
    """Adds one line to the journal: about the least that a commit can be, so what the disk allows."""

    def add() -> int:
        add_event(store, "measured", "a line")
        return 1

    return add


def ingest_points(count: int) -> Callable[[Store], Callable[[], int]]:
    """Stores so many metric rows in one transaction."""

    def prepare(store: Store) -> Callable[[], int]:
        claimed = claim_run(store, get_runner(store, 1), now(), lease_seconds=LEASE)
        if claimed is None:
            raise SystemExit("the queue is empty")

        attempt, step = claimed.attempt, 0

        def store_points() -> int:
            nonlocal step
            values = {"train_loss": 2.0}
            points = [Point(step=step + i, tokens=1, seconds=1.0, values=values) for i in range(count)]
            step += count
            ingest(store, attempt, points, step, now(), lease_seconds=LEASE)
            return count

        return store_points

    return prepare


WORK: dict[str, Callable[[Store], Callable[[], int]]] = {
    "lines of the journal": journal,
    "claims": claim,
    "metric rows, one a commit": ingest_points(1),
    "metric rows, 100 a commit": ingest_points(100),
}


def work(folder: Path, name: str, seconds: float) -> None:
    """Does one kind of work when a line comes in; prints how much was done, in how long, and the time of each call."""
    store = Lab(folder).store
    step = WORK[name](store)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    done, taken = 0, []
    started, started_cpu = time.perf_counter(), time.process_time()
    while (before := time.perf_counter()) < started + seconds:
        done += step()
        taken.append(time.perf_counter() - before)

    used = time.process_time() - started_cpu
    sys.stdout.write(f"{done} {time.perf_counter() - started} {used} {' '.join(f'{value:.6f}' for value in taken)}\n")


def race(folder: Path, name: str, processes: int, seconds: float) -> str:
    """A row of the table: `processes` of them at once."""
    command = [sys.executable, "-m", "benchmarks.store", "--work", name, "--folder", str(folder)]
    command += ["--seconds", str(seconds)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()

    answers = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()

    for worker in workers:
        answers.append(worker.communicate()[0].split())
        if worker.returncode:
            raise SystemExit(f"a process ended with {worker.returncode}")

    done = sum(int(answer[0]) for answer in answers)
    longest = max(float(answer[1]) for answer in answers)
    taken = sorted(float(value) for answer in answers for value in answer[3:])
    p50, p99 = statistics.median(taken), taken[int(0.99 * (len(taken) - 1))]
    used = sum(float(answer[2]) for answer in answers) / len(taken)
    times = f"{1e3 * p50:.2f} | {1e3 * p99:.2f} | {1e3 * taken[-1]:.0f} | {1e3 * used:.2f}"
    return f"| {name} | {processes} | {done / longest:,.0f} | {times} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row of the table")
    parser.add_argument("--folder", type=Path, help="where to make the lab; a temporary folder by default")
    parser.add_argument("--work", choices=list(WORK), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.folder, options.work, options.seconds)
        return

    with tempfile.TemporaryDirectory(prefix="blueberry-store-", dir=options.folder) as folder:
        build(Path(folder), EXPERIMENTS, metric_rows=2)
        print("| what | processes | a second | p50 ms | p99 ms | longest ms | processor ms |")
        print("|---|---|---|---|---|---|---|")
        for name in WORK:
            for processes in PROCESSES:
                print(race(Path(folder), name, processes, options.seconds), flush=True)


if __name__ == "__main__":
    main()
