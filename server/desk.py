"""What every command of the command line shares: --lab and --json, how answers are printed, what exit codes mean."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from rich.console import Console

from db.errors import LabError, NewerLabError
from db.lab import Lab, lab_folder
from server.arguments import ArgumentsError
from server.follow import Watch
from server.show import make_console, render

FAILED, WRONG_USAGE, STILL_WORKING, INTERRUPTED = 1, 2, 3, 130

_INTERRUPTED = "stopped looking; what was begun goes on (blueberry status --watch shows it)"


class Desk:
    """What a command works with: the lab, and where answers go."""

    def __init__(self, folder: Path, *, as_json: bool) -> None:
        self.folder = folder
        self.as_json = as_json
        self.console = Console(quiet=True) if as_json else make_console()

    @functools.cached_property
    def lab(self) -> Lab:
        """The lab, opened at first use."""
        return Lab(self.folder)

    def open_to_read(self) -> Lab:
        """The lab, also a newer Blueberry's: what made its runs may be older than what wrote it last."""
        try:
            self.lab.store.pending()
        except NewerLabError:
            self.lab = Lab(self.folder, read_only=True)

        return self.lab

    def close(self) -> None:
        """Lets go of the lab."""
        if "lab" in self.__dict__:
            self.lab.close()

    def show(self, view: BaseModel) -> None:
        """Prints an answer. One that an agent is still working on makes the exit code 3."""
        self.console.print(render(view))
        self.say(view.model_dump(mode="json"))
        if getattr(view, "working", None) is not None:
            raise click.exceptions.Exit(STILL_WORKING)

    def say(self, value: Any) -> None:
        """Prints a value for programs, if one is listening."""
        if self.as_json:
            click.echo(json.dumps(value, ensure_ascii=False, indent=2))

    def watch(self, is_over: Callable[[], bool], *, since_event: int | None = None) -> None:
        """Follows the research live until `is_over`."""
        with Watch(self.lab, self.console, since_event=since_event) as watch:
            watch.until(is_over)

    def fail(self, message: str, code: int) -> click.exceptions.Exit:
        """Says what went wrong, on stderr, and for programs on stdout too."""
        click.echo(f"blueberry: {message}", err=True)
        self.say({"error": message})
        return click.exceptions.Exit(code)


def verb(group: click.Group, name: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a command of a function that takes a Desk and its options; its docstring is the help."""

    def register(function: Callable[..., None]) -> click.Command:
        @click.pass_context
        def command(context: click.Context, /, folder: str | None, as_json: bool, **options: Any) -> None:
            desk = Desk(lab_folder(folder or context.find_root().params.get("folder")), as_json=as_json)
            try:
                function(desk, **options)
            except ArgumentsError as error:
                raise desk.fail(str(error), WRONG_USAGE) from None
            except LabError as error:
                raise desk.fail(str(error), FAILED) from None
            except KeyboardInterrupt:
                raise desk.fail(_INTERRUPTED, INTERRUPTED) from None
            finally:
                desk.close()

        functools.update_wrapper(command, function)
        lab = click.option("--lab", "folder", metavar="DIR", help="The lab's folder.")
        as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
        return group.command(name)(lab(as_json(command)))

    return register


def where_to_go(lab: Lab) -> str:
    """The next two commands: how to browse the lab, how to connect a chat client."""
    here = Path.cwd()
    folder = lab.folder
    place = folder.relative_to(here) if folder.is_relative_to(here) else folder
    program = shlex.join(_program(here))
    connect = shlex.join([*_program(None), "--lab", str(folder), "mcp"])
    if (here / "mcp.json").exists() and place == Path(".demo-lab"):
        connect = f"claude --mcp-config mcp.json      (any other client: {connect})"

    return f"\nlook at it:  {program} --lab {shlex.quote(str(place))} browse\ntalk to it:  {connect}"


def _program(here: Path | None) -> list[str]:
    path = Path(sys.argv[0]).absolute()
    if path.name != "blueberry":
        return [sys.executable, "-m", "server.cli"]

    return [str(path.relative_to(here) if here and path.is_relative_to(here) else path)]
