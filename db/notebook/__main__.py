"""python -m db.notebook [LAB] [--port 8001] [--host 127.0.0.1]: serves a lab, read-only, to a browser here."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from db.errors import LabError, LabUnusableError
from db.lab import lab_folder

USAGE_ERROR = 2


def main() -> int:
    """Serves until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m db.notebook", description="Serve a lab, read-only, to a browser.")
    parser.add_argument("lab", nargs="?", help="the lab's folder (default: BLUEBERRY_LAB, or ~/.blueberry)")
    parser.add_argument("--port", type=int, default=8001, help="0 takes any free one (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    options = parser.parse_args()
    try:
        if importlib.util.find_spec("datasette") is None:
            raise LabUnusableError("datasette is not installed; run: pip install 'datasette>=0.65.5,<1'")

        from db.notebook.serving import serve  # datasette takes a second to load: after the arguments are known good

        serve(lab_folder(options.lab), options.host, options.port)
    except LabError as error:
        sys.stderr.write(f"{error}\n")
        return USAGE_ERROR
    except KeyboardInterrupt:
        pass

    return 0


if __name__ == "__main__":
    sys.exit(main())
