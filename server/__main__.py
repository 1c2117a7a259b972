"""The MCP server over stdio: `python -m server [--lab DIR]`, or `blueberry mcp`. Clients start and end it.

Nothing but the protocol goes to stdout. The log is logs/server.log in the lab; stderr gets warnings.
"""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import os
import signal
import sys
from pathlib import Path

import anyio

from db.errors import LabError
from db.lab import Lab, lab_folder
from db.logs import rotate
from server.app import create_app


def serve(folder: Path) -> None:
    """Serves the lab until the client closes stdin, or SIGTERM or SIGINT comes; then the process is over.

    Whatever still runs in a thread is dropped without harm: its writes are transactions, and what must outlive a call
    is done by the mind process and the runner.
    """
    _log_to(folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: os._exit(0))

    anyio.run(create_app(folder).run_stdio_async)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _log_to(folder: Path) -> None:
    logging.raiseExceptions = False  # a log that cannot be written (disk full) is no matter for the call
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    words = logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setLevel(logging.WARNING)
    try:
        log = Lab(folder).log("server")
        rotate(log)
        handlers.append(logging.handlers.WatchedFileHandler(log, encoding="utf-8"))  # other servers write there too
    except (LabError, OSError) as error:
        sys.stderr.write(f"blueberry: {error}; serving all the same, each call will say so\n")

    for handler in handlers:
        handler.setFormatter(words)
        root.addHandler(handler)


def main() -> None:
    """Parses the arguments and serves."""
    parser = argparse.ArgumentParser(prog="python -m server", description="Serves a Blueberry lab over MCP (stdio).")
    parser.add_argument("--lab", help="the lab's folder; otherwise BLUEBERRY_LAB, otherwise ~/.blueberry")
    serve(lab_folder(parser.parse_args().lab))


if __name__ == "__main__":
    main()
