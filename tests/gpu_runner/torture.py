"""A seeded killer against a lab: `python -m tests.gpu_runner.torture --kills 600 --runs 250`.

Daemons of two cards share the lab, and each card has a second daemon that fights for it. Every 30 to 350 ms one process
of a kind drawn by lot gets SIGKILL (daemons, shims, trainers, graders, minds, and the visitor that enqueues and
cancels), or is stopped with SIGSTOP, some for longer than the lease, to wake and write late. After eight blows without
a run that ended the killer waits for one, so that a slow machine comes through as well. When all is over the lab must
be sound (tests/gpu_runner/soundness.py), and empty within seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from db.runners import register_runner
from gpu_runner.card import detect_cards
from gpu_runner.nvml import Nvml
from tests.gpu_runner.conftest import LEAN, ROOT, Bench
from tests.gpu_runner.soundness import find_faults, lab_processes

KEYS = (None, "cpu-b")
"""The cards; None is the one that `python -m gpu_runner` finds."""

SETTINGS = "max_lost = 100\nmax_failures = 20\n"
PATIENCE = 8
"""Blows until a run has to end before the next. It takes some 15 steps, of which each could be the one that is hit."""

LONGEST = 3000.0
"""Seconds until a torture is given up."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a lab, and what became of it. Times in seconds."""

    seed: int
    kills: Counter[str]
    stops: Counter[str]
    runs: Counter[str]
    attempts: Counter[str]
    adopted: int
    fenced: int
    seconds: float
    drained_after: float
    faults: list[str]

    def __str__(self) -> str:
        """As lines that a person reads."""
        return "\n".join(
            [
                f"seed {self.seed}, {self.seconds:.0f} s",
                f"  killed      {self.kills.total()}: {_counts(self.kills)}",
                f"  stopped     {self.stops.total()}: {_counts(self.stops)}",
                f"  runs        {self.runs.total()}: {_counts(self.runs)}",
                f"  attempts    {self.attempts.total()}: {_counts(self.attempts)}",
                f"  adopted     {self.adopted} times; {self.fenced} times a late writer was fenced off",
                f"  drained     {self.drained_after:.1f} s after the last blow",
                f"  faults      {len(self.faults)}",
                *(f"    {fault}" for fault in self.faults),
            ]
        )


class Torture:
    """One lab, its daemons, its visitor and its killer."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.bench = Bench(folder)
        self.seed = seed
        self.dice = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        settings = folder / "blueberry.toml"
        settings.write_text(settings.read_text() + SETTINGS)
        card = detect_cards(self.bench.lab.settings.runner, Nvml())[0]
        self.hardware_class = register_runner(self.bench.store, card.columns()).hardware_class
        self._daemons: dict[str | None, subprocess.Popen[bytes]] = {}
        self._visitor: subprocess.Popen[bytes] | None = None
        self._visits = 0
        self._asleep: dict[int, float] = {}
        self._blows = 0
        self._ended = 0

    def run(self, *, kills: int, runs: int) -> Report:
        """Deals at least so many kills while at least so many runs are enqueued, then lets the lab drain."""
        started = time.monotonic()
        while self.kills.total() < kills or self._count_runs() < runs:
            self._check_time(started)
            self._keep_alive()
            time.sleep(self.dice.uniform(0.03, 0.35))
            self._wake(time.monotonic())
            if self._may_strike():
                self._strike()

        last_blow = time.monotonic()
        self._wake(float("inf"))
        self._end_visit()
        while self.bench.store.value("SELECT count(*) FROM runs WHERE status IN ('queued', 'running')"):
            self._check_time(started)
            self._keep_daemons()
            time.sleep(0.01)

        drained = time.monotonic()
        for daemon in self.bench.daemons:
            if daemon.poll() is None:
                daemon.terminate()

        for daemon in self.bench.daemons:
            daemon.wait(30)

        return self._report(seconds=drained - started, drained_after=drained - last_blow)

    def close(self) -> None:
        """Ends whatever is left."""
        self._end_visit()
        self._wake(float("inf"))
        self.bench.close()

    def _count_runs(self) -> int:
        return int(self.bench.store.value("SELECT count(*) FROM runs"))

    def _check_time(self, started: float) -> None:
        if time.monotonic() - started > LONGEST:
            open_runs = self.bench.store.rows("SELECT * FROM runs WHERE status IN ('queued', 'running')")
            raise TimeoutError(
                f"not done after {LONGEST:.0f} s: {open_runs}\n{self.bench.lab.log('runner').read_text()}"
            )

    def _keep_alive(self) -> None:
        self._keep_daemons()
        if self._visitor is None or self._visitor.poll() is not None:
            self._visits += 1
            arguments = [str(self.bench.lab.folder), f"{self.seed}.{self._visits}", self.hardware_class]
            with self.bench.lab.log("visitor").open("ab") as log:
                self._visitor = subprocess.Popen(
                    [sys.executable, "-m", "tests.gpu_runner.visitor", *arguments],
                    env=os.environ | {"PYTHONPATH": f"{LEAN}{os.pathsep}{ROOT}"},
                    stdout=log,
                    stderr=log,
                )

    def _keep_daemons(self) -> None:
        for key in KEYS:
            if key not in self._daemons or self._daemons[key].poll() is not None:
                self._daemons[key] = self.bench.start(key=key)

    def _may_strike(self) -> bool:
        ended = self.bench.store.value("SELECT count(*) FROM events WHERE kind = 'ended'")
        if ended != self._ended:
            self._ended, self._blows = ended, 0

        self._blows += 1
        return self._blows <= PATIENCE

    def _strike(self) -> None:
        if self.dice.random() < 0.03:
            self.bench.start(key=self.dice.choice(KEYS))  # a rival, who leaves again unless he finds the card free
            return

        victims = lab_processes(self.bench.lab.folder)
        kind = self.dice.choice([*sorted(set(victims.values())), "stop"])
        if kind == "stop":
            self._stop(victims)
        else:
            self._kill(self.dice.choice([pid for pid, name in victims.items() if name == kind]), kind)

    def _kill(self, pid: int, kind: str) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills[kind] += 1
            self._asleep.pop(pid, None)

    def _stop(self, victims: dict[int, str]) -> None:
        awake = [pid for pid in victims if pid not in self._asleep]
        if awake and len(self._asleep) < 2:
            pid = self.dice.choice(awake)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.stops[victims[pid]] += 1
                self._asleep[pid] = time.monotonic() + self.dice.uniform(0.5, 3.0)

    def _wake(self, now: float) -> None:
        for pid, until in list(self._asleep.items()):
            if now > until:
                del self._asleep[pid]
                if pid in lab_processes(self.bench.lab.folder):
                    os.kill(pid, signal.SIGCONT)

    def _end_visit(self) -> None:
        if self._visitor is not None:
            self._visitor.kill()
            self._visitor.wait()

    def _report(self, *, seconds: float, drained_after: float) -> Report:
        store = self.bench.store
        deadline = time.monotonic() + 10
        while (faults := find_faults(self.bench.lab)) and time.monotonic() < deadline:
            time.sleep(0.1)

        attempts = Counter({row["status"]: row["n"] for row in store.rows(_COUNT.format("attempts"))})
        log = "".join(
            path.read_text(errors="replace") for path in sorted(self.bench.lab.log("runner").parent.glob("runner*"))
        )
        return Report(
            seed=self.seed,
            kills=self.kills,
            stops=self.stops,
            runs=Counter({row["status"]: row["n"] for row in store.rows(_COUNT.format("runs"))}),
            attempts=attempts,
            adopted=store.value("SELECT sum(token) FROM runs") - attempts.total(),
            fenced=log.count("let go of attempt"),
            seconds=seconds,
            drained_after=drained_after,
            faults=faults,
        )


_COUNT = "SELECT status, count(*) AS n FROM {} GROUP BY status"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


def main(arguments: Sequence[str] | None = None) -> int:
    """Tortures one lab and prints the report; the exit code is 1 when it has faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_runner.torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=600)
    parser.add_argument("--runs", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        torture = Torture(Path(folder) / "lab", options.seed)
        try:
            report = torture.run(kills=options.kills, runs=options.runs)
        finally:
            torture.close()

    sys.stdout.write(f"{report}\n")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
