"""`blueberry runner install`: the daemon as a systemd service of this user, so that it comes back after a reboot.

The unit is a file that anyone can read, and the commands that put it into effect are printed, not run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import click

from agents.hands import alive_runners
from db.errors import RefusedError
from db.lab import Lab
from server.desk import Desk

_ROOT = Path(__file__).parents[1]

_UNIT = """\
[Unit]
Description=Blueberry runner of the lab {description}
StartLimitIntervalSec=300
StartLimitBurst=10

[Service]
Type=exec
ExecStart={start}
ExecReload={kill} -HUP $MAINPID
{environment}# What trains goes on when the daemon dies, and the next one adopts it. On a stop the daemon ends it.
KillMode=process
TimeoutStopSec=15
Restart=on-failure
RestartSec=5
StandardOutput=append:{log}
StandardError=inherit

[Install]
WantedBy=default.target
"""


@click.option("--print", "only_print", is_flag=True, help="Show the unit, and write nothing.")
def install(desk: Desk, only_print: bool) -> None:
    """Write a systemd user unit for the runner, and say how to enable it."""
    lab = desk.lab
    text, path = unit(lab), unit_path(lab.folder)
    if only_print:
        desk.console.print(text, markup=False, end="")
        desk.say({"path": str(path), "unit": text})
        return

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RefusedError(f"{path} cannot be written: {error.strerror}") from None

    commands = [
        *(["blueberry runner stop"] if alive_runners(lab) else []),  # systemd can only keep what it has started
        "systemctl --user daemon-reload",
        f"systemctl --user enable --now {path.name}",
        "loginctl enable-linger",
    ]
    desk.console.print(f"wrote {path}", markup=False)
    desk.console.print("now run (the last one keeps it running while nobody is logged in):")
    desk.console.print("".join(f"  {command}\n" for command in commands), markup=False, end="")
    desk.say({"path": str(path), "unit": text, "commands": commands})


def uninstall(desk: Desk) -> None:
    """Remove the systemd user unit of the runner; the lab stays as it is."""
    path = unit_path(desk.folder)
    link = path.parent / "default.target.wants" / path.name
    if not path.exists() and not link.is_symlink():
        raise RefusedError(f"there is no {path}")

    path.unlink(missing_ok=True)
    link.unlink(missing_ok=True)
    commands = [f"systemctl --user stop {path.name}", "systemctl --user daemon-reload"]
    desk.console.print(f"removed {path}", markup=False)
    desk.console.print(f"now run:\n  {commands[0]}\n  {commands[1]}", markup=False)
    desk.say({"path": str(path), "commands": commands})


def unit(lab: Lab) -> str:
    """The unit file of a lab's runner."""
    command = [sys.executable, "-P", "-m", "gpu_runner", str(lab.folder)]
    installed = Path(sysconfig.get_path("purelib")) == _ROOT
    return _UNIT.format(
        description=_plain(str(lab.folder)),
        start=" ".join(map(_quoted, command)),
        kill=shutil.which("kill") or "/bin/kill",
        environment="" if installed else f"Environment={_quoted(f'PYTHONPATH={_ROOT}', dollars=False)}\n",
        log=_plain(str(lab.log("runner"))),
    )


def unit_path(folder: Path) -> Path:
    """Where systemd looks for the unit of the lab in `folder`."""
    name = "blueberry-runner"
    if folder != Path("~/.blueberry").expanduser():
        slug = re.sub(r"[^A-Za-z0-9]+", "-", folder.name).strip("-") or "lab"
        name += f"-{slug}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:6]}"

    config = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    return Path(config) / "systemd" / "user" / f"{name}.service"


def _plain(text: str) -> str:
    return text.replace("%", "%%")  # systemd's specifiers


def _quoted(text: str, *, dollars: bool = True) -> str:
    escaped = _plain(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped.replace("$", "$$") if dollars else escaped}"'  # variables are expanded in commands alone
