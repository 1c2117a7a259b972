"""Probes: writes what `score` in config.json says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

directory = Path(sys.argv[1])
config = json.loads((directory / "config.json").read_bytes())["config"]
(directory / "score.json").write_text(config["score"])
