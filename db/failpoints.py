"""Steps of the protocol that have a name, at which a test may have a process killed or stopped.

BLUEBERRY_FAILPOINT names a file. While that holds a signal and a step, such as "KILL start.spawned", the first process
to come to the step removes the file and sends itself the signal; all others go on. Without the variable, which only
tests set, a failpoint is one comparison. tests/gpu_runner/test_failpoints.py kills a process at each one there is.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "BLUEBERRY_FAILPOINT"

_FUSE = os.environ.get(VARIABLE)


def failpoint(step: str) -> None:
    """Says which step has just been done; "x.commit" is about to be."""
    if _FUSE is not None:
        _burn(Path(_FUSE), step)


def _burn(fuse: Path, step: str) -> None:
    try:
        name, _, wanted = fuse.read_text().partition(" ")
        if wanted != step:
            return

        fuse.unlink()  # of several processes that come here at once, one
    except FileNotFoundError:
        return

    os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
