"""Sentences that name calls of tools, said in commands for whoever sits at a terminal."""

from __future__ import annotations

import re


def as_commands(text: str) -> str:
    """A sentence that names calls of tools, such as review(experiment_id=3), with commands in their place."""
    return re.sub(r"\b(suggest|review|improve|enqueue|run|status|report)\(([^()]*)\)", _as_command, text)


def _as_command(call: re.Match[str]) -> str:
    verb, arguments = call.groups()
    numbers = re.findall(r"\d+", arguments)
    if action := re.search(r"action='(\w+)'", arguments):
        return f"`blueberry cancel {' '.join(numbers)}`" if action[1] == "cancel" else f"`blueberry runner {action[1]}`"

    if verb != "status":
        named = (numbers or ["ID"] * (verb == "report")) if "experiment" in arguments else []
        flags = ["--confirm"] if "confirm" in arguments else []
        return f"`{' '.join(['blueberry', verb, *flags, *named])}`"

    subject = re.search(r"(experiment|run|task|cycle)_id(?:=(\d+))?", arguments)
    if subject:
        words = f" --{subject[1]} {subject[2] or 'ID'}"
        return f"`blueberry status{words}{' --watch' if subject[1] == 'experiment' else ''}`"

    return "`blueberry status --watch`" if arguments else "`blueberry status`"
