"""Says that it was woken."""

from __future__ import annotations

import sys
from pathlib import Path

with (Path(sys.argv[1]) / "minds").open("a") as file:
    file.write("woken\n")
