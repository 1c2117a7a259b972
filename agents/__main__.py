"""The mind process of a lab: `python -m agents LAB`. Does what is due, and exits when nothing is."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from agents.mind import work
from db.errors import LabError
from db.lab import Lab


def main() -> int:
    """Runs the mind process; 1 when the lab cannot be used."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m agents LAB\n")
        return 2

    folder = Path(sys.argv[1])
    if not (folder / "lab.db").exists():  # deleted since somebody woke us: it shall not come back, empty
        logging.getLogger("agents").error("there is no lab in %s", folder)
        return 1

    try:
        work(Lab(folder))
    except LabError as error:
        logging.getLogger("agents").error("%s", error)
        return 1

    return 0


if __name__ == "__main__":
    sys.exit(main())
