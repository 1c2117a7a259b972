"""The runner daemon: `python -m gpu_runner LAB`. With --register it only writes down what cards are here, and exits.

One process drives all cards that it sees (CUDA_VISIBLE_DEVICES hides some); of those that another process drives it
says who does, and with none left it exits with 0. Its signals are in gpu_runner/drive.py. Everything goes to stderr,
which whoever starts it sends to a log.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from db.errors import LabError
from db.lab import Lab, lab_folder
from db.runners import register_runner
from gpu_runner.card import detect_cards
from gpu_runner.drive import Ending, drive
from gpu_runner.nvml import Nvml

_LOG = logging.getLogger("gpu_runner")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the daemon; the exit code is 1 when the lab or the card cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m gpu_runner", description="The GPU runner of a lab.")
    parser.add_argument("lab", nargs="?", help="the lab's folder; BLUEBERRY_LAB or ~/.blueberry by default")
    parser.add_argument("--register", action="store_true", help="write down what cards are here, and exit")
    parser.add_argument("--owner", type=Path, metavar="FILE", help="stop once no process holds the lock on this file")
    options = parser.parse_args(arguments)

    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ"
    )
    try:
        lab = Lab(lab_folder(options.lab))
        nvml = Nvml()
        cards = detect_cards(lab.settings.runner, nvml)
        if options.register:
            for card in cards:
                register_runner(lab.store, card.columns())
                _LOG.info("registered %s: %s", card.hardware_class, card.message)

            return 0

        ending = drive(lab, cards, nvml, owner=options.owner)
    except LabError as error:
        _LOG.error("%s", error)
        return 1
    except OSError as error:
        _LOG.error("the lab cannot be used: %s", error)
        return 1

    return 0 if ending is Ending.DONE else 1


if __name__ == "__main__":
    sys.exit(main())
