"""The house: the imported packages are this repository's, and modules stay of a size that one can hold in mind."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("server", "agents", "gpu_runner", "moe", "db")
LONGEST = 400
LONG_FOR_A_REASON = {
    "db/queue.py": "the whole protocol of attempts in one place, where its transactions can be compared",
}


@pytest.mark.parametrize("room", ROOMS)
def test_imported_package_is_this_repositorys_folder(room: str) -> None:
    # The rooms are top-level names: another installed package called `server` would be imported silently.
    spec = importlib.util.find_spec(room)
    assert spec is not None
    assert [Path(place).resolve() for place in spec.submodule_search_locations or []] == [(ROOT / room).resolve()]


def test_every_package_is_part_of_what_is_installed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = [path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    assert sorted(declared) == sorted(".".join(folder.parts) for folder in there)


@pytest.mark.parametrize("room", [*ROOMS, "tests", "benchmarks"])
def test_modules_are_short(room: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted((ROOT / room).rglob("*.py"))
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST and name not in LONG_FOR_A_REASON} == {}


def test_every_exception_to_the_length_is_needed() -> None:
    assert [name for name in LONG_FOR_A_REASON if len((ROOT / name).read_text().splitlines()) <= LONGEST] == []
