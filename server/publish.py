"""What a person takes away from the lab: `blueberry report`."""

from __future__ import annotations

import click

from server.commands import as_commands
from server.desk import Desk
from server.tools.report import report as report_verb


@click.argument("experiment", type=click.IntRange(min=1), metavar="[ID]", required=False)
def report(desk: Desk, experiment: int | None) -> None:
    """Write a report of one experiment, or of the whole lab.

    It goes to LAB/reports/, as one HTML page that needs nothing else, as Markdown, and with plots as SVG and PNG.
    """
    written = report_verb(desk.lab, experiment_id=experiment)
    files = [written.html, written.markdown, *written.images]
    note = [written.note] if written.note else []
    after = as_commands(f"next: {written.next}")
    for line in (*written.summary, "", *(f"wrote {path}" for path in files), *note, after):
        desk.console.print(line)

    desk.say(written.model_dump(mode="json"))
