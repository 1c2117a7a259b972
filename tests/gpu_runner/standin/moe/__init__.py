"""Stands in for the training process in tests of the runner: does on command what real ones do at times.

What is not here (moe.fingerprint) is the real one of this repository.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parents[4] / "moe"))
