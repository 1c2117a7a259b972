"""The runner daemon: `python -m gpu_runner LAB`. With --register it only writes down what card is here, and exits.

One daemon a card: a second one says who drives it, and exits with 0. SIGTERM and SIGINT end the child, put its run back
into the queue, and stop the daemon, within 10 s. Everything goes to stderr, which whoever starts it sends to a log.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence

from db.clock import Instant, now
from db.errors import LabError
from db.lab import Lab, lab_folder
from db.processes import FileLock, stop_on_signals
from db.runners import list_runners, register_runner
from gpu_runner.card import Card, detect_card
from gpu_runner.child import LOCK_SECONDS
from gpu_runner.daemon import Daemon
from gpu_runner.nvml import Nvml

_LOG = logging.getLogger("gpu_runner")

STOP_SECONDS = 8.0
"""Given to a stop; whatever has not ended by then is left for the next daemon to settle."""

_LONGEST_PAUSE = 30.0
_SLICE = 0.25  # a signal does not shorten a sleep, so sleeps are short


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the daemon; the exit code is 1 when the lab or the card cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m gpu_runner", description="The GPU runner of a lab.")
    parser.add_argument("lab", nargs="?", help="the lab's folder; BLUEBERRY_LAB or ~/.blueberry by default")
    parser.add_argument("--register", action="store_true", help="write down what card is here, and exit")
    options = parser.parse_args(arguments)

    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ"
    )
    try:
        lab = Lab(lab_folder(options.lab))
        nvml = Nvml()
        card = detect_card(lab.settings.runner, nvml)
        if options.register:
            register_runner(lab.store, card.columns())
            _LOG.info("registered %s: %s", card.hardware_class, card.message)
            return 0

        return drive(lab, card, nvml)
    except LabError as error:
        _LOG.error("%s", error)
        return 1
    except OSError as error:
        _LOG.error("the lab cannot be used: %s", error)
        return 1


def drive(lab: Lab, card: Card, nvml: Nvml) -> int:
    """Drives one card until a signal; returns the exit code."""
    with FileLock(lab.lock(f"runner-{card.key}")) as lock, stop_on_signals() as signals:
        if not lock.acquire(LOCK_SECONDS):
            _LOG.info("%s", _who_drives(lab, card))
            return 0

        daemon = Daemon(lab, card, nvml, now())
        _LOG.info("%s as %s", card.message, card.hardware_class)
        failures = 0
        while not signals:
            failures = 0 if _step(daemon, now()) else failures + 1
            if failures and not (lab.folder / "lab.db").exists():
                _LOG.error("%s is gone; nothing is left to do", lab.folder)
                break

            _pause(min(_LONGEST_PAUSE, daemon.settings.poll_seconds * 2.0 ** min(failures, 10)), signals)

        _stop(daemon)
        return 0 if signals else 1


def _step(daemon: Daemon, at: Instant) -> bool:
    """Whether a step could be done. A lab that is busy, full or read-only is tried again, as long as it takes."""
    try:
        daemon.step(at)
        return True
    except (LabError, OSError) as error:
        _LOG.warning("%s", error)
        return False
    except Exception:
        if not daemon.attempts.held:
            raise

        _LOG.exception("a step failed; the child trains on, and the step is tried again")
        return False


def _stop(daemon: Daemon) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    daemon.begin_stop(now())
    while daemon.attempts.held and time.monotonic() < deadline:
        _step(daemon, now())
        time.sleep(0.02)

    try:
        daemon.close("stopped")
        _LOG.info("stopped")
    except LabError as error:
        _LOG.warning("stopped, which could not be written down: %s", error)


def _pause(seconds: float, signals: Sequence[int]) -> None:
    deadline = time.monotonic() + seconds
    while not signals and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, _SLICE))


def _who_drives(lab: Lab, card: Card) -> str:
    for runner in list_runners(lab.store):
        if runner.device_key == card.key and runner.pid is not None:
            return (
                f"a runner (pid {runner.pid}) drives {card.name} already; last heard of at {runner.heartbeat_at}. "
                f"If that is long ago, end it with: kill -9 {runner.pid}"
            )

    return f"another runner drives {card.name} already"


if __name__ == "__main__":
    sys.exit(main())
