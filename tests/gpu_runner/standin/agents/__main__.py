"""Says that it was woken, and thinks for a moment."""

from __future__ import annotations

import sys
import time
from pathlib import Path

with (Path(sys.argv[1]) / "minds").open("a") as file:
    file.write("woken\n")

time.sleep(0.1)  # so that it can be killed
