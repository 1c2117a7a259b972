"""Any but the first process of a data-parallel run, started by moe/parallel.py: `python -m moe.worker DIR RANK PORT`.

It trains as the first one does and writes nothing to DIR. If it fails, it says why on stdout, in one line of the form
of error.json. It ignores SIGTERM and SIGINT, which are for the first process, and ends with that one.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from pathlib import Path

from moe.data import prepare
from moe.parallel import LOST, LostProcessError, join
from moe.rundir import describe_failure, device_of, read_request
from moe.train import Trainer


def work(directory: Path, rank: int, port: int) -> int:
    """Returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    try:
        request = read_request(directory)
        with join(request, rank, port) as team:
            trainer = Trainer(request, prepare(request.config, request.data_dir), device_of(request), team)
            if state := team.from_first(None):
                trainer.restore(state)

            for _ in trainer.run():
                pass
    except LostProcessError:
        return LOST
    except Exception as error:
        traceback.print_exc()
        sys.stdout.write(json.dumps(describe_failure(error)) + "\n")
        return 1

    return 0


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
