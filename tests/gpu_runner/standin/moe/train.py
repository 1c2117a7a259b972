"""Behaves as config.json says: `act` names what happens, the file `go` in the lab ends a wait.

With `save` it leaves a checkpoint every so many points and resumes from an earlier attempt's, as moe.train does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Actor:
    """One run's training process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.request: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
        self.config: dict[str, Any] = self.request["config"]
        self.metrics = directory / "metrics.jsonl"

    def be_alone(self) -> None:
        """Leaves the file `doubled` in the lab if another process trains this run at the same time."""
        lab, run_id = self.directory.parents[1], self.directory.name.partition("-")[0]
        descriptor = os.open(lab / f"only-{run_id}", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (lab / "doubled").write_text(self.directory.name)

    def resume(self) -> int:
        """Takes over the checkpoint of an earlier attempt and the points until then; returns the step to go on with."""
        earlier = Path(self.request.get("resume") or self.directory)
        found = sorted(earlier.glob("resume-*.pt"))
        if not found:
            return 1

        step = int(found[-1].stem.partition("-")[2])
        lines = (earlier / "metrics.jsonl").read_text().splitlines(keepends=True)
        self.metrics.write_text("".join(lines[:step]))
        os.link(found[-1], self.directory / found[-1].name)
        return step + 1

    def add_points(self, first: int, last: int) -> None:
        """Appends points one line at a time; train_loss is 1 / step, val_bpb follows `curve`."""
        with self.metrics.open("a") as file:
            for step in range(first, last + 1):
                values = {"train_loss": 1.0 / step}
                curve = self.config.get("curve", "").split()
                if step <= len(curve):
                    values["val_bpb"] = float(curve[step - 1])

                point = {"step": step, "tokens": step * 10, "seconds": step / 100, "values": values}
                file.write(json.dumps(point) + "\n")
                file.flush()
                if step % self.config.get("save", step + 1) == 0:
                    (self.directory / f"resume-{step:09d}.pt").touch()

                time.sleep(self.config.get("pause", 0.0))

    def add_bytes(self, content: bytes) -> None:
        """Appends what is no point."""
        with self.metrics.open("ab") as file:
            file.write(content)

    def wait(self) -> None:
        """Trains until the test says go."""
        step = 0
        while not (self.directory.parents[1] / "go").exists():
            step += 1
            self.add_points(step, step)
            time.sleep(0.005)

    def leave_behind(self) -> None:
        """Starts processes that try to get away: with and without the lock, in other sessions, without a parent."""
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)

        program = "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(1000)"
        subprocess.Popen([sys.executable, "-S", "-c", program]).wait()
        subprocess.Popen(["sleep", "1000"], start_new_session=True)

    def explain(self, error: str, message: str) -> None:
        """Leaves error.json."""
        (self.directory / "error.json").write_text(json.dumps({"error": error, "message": message, "step": 3}))

    def lab_act(self) -> str:
        """What the file `act` in the lab says, for runs with a config that is really one."""
        path = self.directory.parents[1] / "act"
        return path.read_text() if path.exists() else "train"

    def act(self) -> int:
        """Does it; returns the exit code."""
        act = self.config.get("act") or self.lab_act()
        is_first = self.directory.name.endswith("-1")
        if act == "train" or (act == "linger" and not is_first):
            self.add_points(self.resume(), self.config.get("points", 5))
        elif act == "die once":
            self.add_points(self.resume(), 5)
            if is_first:
                os.kill(os.getpid(), signal.SIGKILL)
        elif act in ("wait", "linger"):
            self.wait()
        elif act.startswith("fit "):
            if self.config["micro_batch_size"] > int(act.removeprefix("fit ")):
                self.explain("out_of_memory", "CUDA out of memory. Tried to allocate 2.00 GiB")
                return 1

            self.add_points(1, 5)
        elif act == "no card":
            self.explain("ConfigError", "device is cuda, but torch sees no CUDA device here")
            return 1
        elif act == "lose the card":
            self.wait()
            if is_first:
                self.explain("AcceleratorError", "CUDA error: unspecified launch failure")
                return 1
        elif act == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.wait()
        elif act == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.leave_behind()
            time.sleep(1000)
        elif act == "litter":
            self.leave_behind()
            self.add_points(1, 5)
        elif act == "crash":
            self.add_points(1, 3)
            for number in range(50):
                print("line", number)  # noqa: T201

            return 3
        elif act == "crash once":
            if is_first:
                self.explain("RuntimeError", "bad luck")
                return 1

            self.add_points(1, 5)
        elif act == "chatter":
            for _ in range(40):
                sys.stdout.write(f"{'x' * 1023}\n" * 1024)

            sys.stdout.write("the last line\n")
            return 3
        elif act == "diverge":
            self.add_points(1, 2)
            self.explain("non_finite", "training loss is not finite at step 3")
            return 1
        elif act == "babble":
            self.add_points(1, 1)
            self.add_bytes(b'not json\n\xff\xfe\0\n{"step": "x"}\n{"step": 1e999}\n[]\n\n' + b"9" * 3_000_000 + b"\n")
            self.add_points(2, 3)
            self.add_bytes(b'{"step": 4, "tokens": 40, "seconds": 0.1, "values": {"train_loss": NaN, "lr": null}}\n')
            self.add_bytes(b'{"step": 5, ')

        return 0


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    actor = Actor(Path(arguments[0]))
    print("the environment has a secret:", any("KEY" in name for name in os.environ))  # noqa: T201
    actor.be_alone()
    try:
        actor.add_points(1, 0)
        if weights := actor.config.get("weights"):
            (actor.directory / "checkpoint.pt").write_bytes(b"w" * weights)

        return actor.act()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return 75  # as moe/rundir.py does

        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
