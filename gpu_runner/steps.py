"""The steps of a run: programs of moe/ that are done one after another in its directory, each in a process of its own.

Nothing here is imported before it is asked for: gpu_runner has no torch, only the processes that become a step do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

STEPS: Mapping[str, Sequence[str]] = {
    "train": ("train", "evaluate"),
    "probe": ("probe",),
    "post": ("post",),
    "ablate": ("ablate",),
}
"""The modules of moe/ that make up a run of each kind; only the last one's score.json counts."""


def program_of(step: str) -> str:
    """The module that `python -m moe.STEP` runs."""
    name = f"moe.{step}"
    spec = find_spec(name)
    return name if spec is None or spec.submodule_search_locations is None else f"{name}.__main__"


def warm_up() -> None:
    """Imports what training and scoring need, which is nearly all that any step does.

    Not more than that: peak memory is a result, and is to be what the step itself takes.
    """
    for step in STEPS["train"]:
        import_module(program_of(step))


def run_step(step: str, directory: Path) -> int:
    """Does as `python -m moe.STEP DIRECTORY` would, in this process; returns the exit code."""
    code: int = import_module(program_of(step)).main([str(directory)])
    return code
