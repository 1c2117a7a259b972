"""Grades: writes what `score` in config.json says, a good score by default."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    directory = Path(arguments[0])
    config = json.loads((directory / "config.json").read_bytes())["config"]
    time.sleep(20 * config.get("pause", 0.0))  # so that it can be killed
    (directory / "score.json").write_text(config.get("score", '{"val_bpb": 1.5}'))
    if film := config.get("film"):  # a file that takes all that is left of the disk
        with Path(film).open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
