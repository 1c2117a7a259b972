"""`blueberry runner ...`: the daemon that trains, as a service of this machine and on the terminal."""

from __future__ import annotations

import click

from db.runners import list_runners
from server.desk import Desk, verb
from server.show import runner_table
from server.systemd import install, uninstall
from server.tools.run import run
from server.views import runner_line
from server.watch import watch


@click.group()
def runner() -> None:
    """The daemon that trains: start it, stop it, look at it."""


@verb(runner)
def start(desk: Desk) -> None:
    """Start the runner in the background; it drives all cards, and outlives this terminal."""
    desk.show(run(desk.lab))


@verb(runner)
def stop(desk: Desk) -> None:
    """Have the runner leave checkpoints, put its runs back into the queue, and end."""
    desk.show(run(desk.lab, action="stop"))


@verb(runner)
def restart(desk: Desk) -> None:
    """Have the runner start anew, after an upgrade or a new configuration; what trains goes on."""
    desk.show(run(desk.lab, action="restart"))


@verb(runner)
def pause(desk: Desk) -> None:
    """Have the runner finish what trains and claim nothing more, until resume."""
    desk.show(run(desk.lab, action="pause"))


@verb(runner)
def resume(desk: Desk) -> None:
    """Let a paused or draining runner take runs again."""
    desk.show(run(desk.lab, action="resume"))


@verb(runner)
def drain(desk: Desk) -> None:
    """Have the runner finish what trains, and then end."""
    desk.show(run(desk.lab, action="drain"))


@verb(runner, "status")
def runner_status(desk: Desk) -> None:
    """Show the cards, and whether a runner drives them."""
    lines = [runner_line(desk.lab, item) for item in list_runners(desk.lab.store)]
    desk.console.print(runner_table(lines))
    desk.say({"runners": [line.model_dump(mode="json") for line in lines]})


verb(runner)(install)
verb(runner)(uninstall)
verb(runner)(watch)
