"""`blueberry doctor`: what could be wrong with this installation and this lab, each problem with its fix.

torch and the NVIDIA bindings are never imported: a look at the card is a short process of the runner's.
"""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import click
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from agents.hands import look_for_card
from db.errors import LabError
from db.health import Check, check_lab, of_error
from db.lab import Lab
from db.runners import list_runners
from server.desk import FAILED, Desk

DRIVER = Path("/proc/driver/nvidia/version")

_PACKAGE = "blueberry-lab"
_SHOWN = ("mcp", "pydantic", "sqlite-utils", "torch")
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@click.option("--look", is_flag=True, help="Also look anew what card is here, and write it down.")
def doctor(desk: Desk, look: bool) -> None:
    """Say what is wrong here, and how to mend it.

    The exit code is 1 when there is a problem; warnings alone leave it 0.
    """
    seen = [_look(desk.folder)] if look else []  # first: it writes down what the other checks then read
    checks = [*check_installation(), check_driver(), check_sandbox(), *check_lab(desk.folder), *seen]
    problems, warnings = (sum(check.level == level for check in checks) for level in ("problem", "warning"))
    desk.console.print(_table(checks))
    desk.console.print(f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}")
    desk.say(
        {"problems": problems, "warnings": warnings, "checks": [check.model_dump(mode="json") for check in checks]}
    )
    if problems:
        raise click.exceptions.Exit(FAILED)


def check_installation() -> Iterator[Check]:
    """Python, and whether the packages are there in versions that Blueberry was written for."""
    try:
        says = f"Python {platform.python_version()}, Blueberry {version(_PACKAGE)}"
        yield Check(name="python", level="ok", says=f"{says}, in {sys.prefix}")
        needed = [Requirement(text) for text in requires(_PACKAGE) or ()]
    except PackageNotFoundError:
        fix = _pip(f"-e {shlex.quote(str(Path(__file__).parents[1]))}")
        says = f"Python {platform.python_version()}, and Blueberry is not installed in it"
        yield Check(name="python", level="warning", says=says, fix=fix)
        return

    always = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    runner = [
        item for item in needed if item not in always and item.marker and item.marker.evaluate({"extra": "runner"})
    ]
    wrong = [item for item in always if not _is_met(item)]
    if wrong:
        says = f"missing, or of another version: {', '.join(map(_found, wrong))}"
        yield Check(name="packages", level="problem", says=says, fix=_pip(*map(_wanted, wrong)))
    else:
        yield Check(name="packages", level="ok", says=", ".join(_found(item) for item in always if item.name in _SHOWN))

    wrong = [item for item in runner if not _is_met(item)]
    if wrong:
        says = f"this machine cannot train: {', '.join(map(_found, wrong))}"
        yield Check(name="trainer", level="warning", says=says, fix=_pip(*map(_wanted, wrong)))
    else:
        yield Check(name="trainer", level="ok", says=", ".join(_found(item) for item in runner if item.name in _SHOWN))


def check_driver() -> Check:
    """NVIDIA's kernel driver, by what Linux says of it: also where it is too sick to be asked."""
    try:
        first = DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return Check(name="driver", level="ok", says="no NVIDIA driver is loaded: this machine trains on its CPU")

    return Check(name="driver", level="ok", says=" ".join(first.split()).removeprefix("NVRM version: "))


def check_sandbox() -> Check:
    """What could shut in code that a model wrote. None is run so far: a treatment is a choice of bounded knobs."""
    found = shutil.which("bwrap")
    says = "bubblewrap is not here" if found is None else f"bubblewrap is here ({found})"
    return Check(name="sandbox", level="ok", says=f"{says}; nothing needs it yet, as no code that a model wrote is run")


def _look(folder: Path) -> Check:
    try:
        lab = Lab(folder)
        try:
            had_card = any(runner.device == "cuda" for runner in list_runners(lab.store))
            said = look_for_card(lab).partition(" INFO ")[2]
        finally:
            lab.close()
    except LabError as error:
        return of_error("look", error)

    if had_card and said.startswith("registered cpu") and lab.settings.runner.device == "auto":
        fix = "check the card with nvidia-smi; until it is back, the runs that were queued for it wait"
        return Check(name="look", level="problem", says=f"the card is not there any more: {said}", fix=fix)

    return Check(name="look", level="ok", says=said)


def _is_met(item: Requirement) -> bool:
    try:
        return item.specifier.contains(version(item.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _found(item: Requirement) -> str:
    try:
        return f"{item.name} {version(item.name)}"
    except PackageNotFoundError:
        return f"{item.name} is not installed"


def _wanted(item: Requirement) -> str:
    return shlex.quote(f"{item.name}{item.specifier}")


def _pip(*arguments: str) -> str:
    return f"{shlex.quote(sys.executable)} -m pip install {' '.join(arguments)}"


def _table(checks: list[Check]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for check in checks:
        says = Text(check.says)
        if check.fix:
            says.append(f"\n→ {check.fix}", style="bold")

        table.add_row(Text(check.level, style=_STYLES[check.level]), check.name, says)

    return table


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"
