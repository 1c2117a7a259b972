"""What a person takes away from the lab: `blueberry report`, and `blueberry reproduce`, which checks it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
from rich import box
from rich.table import Table

from agents.again import Again, Measured
from agents.agreement import Agreement, compare
from agents.hands import register, start_runner, stop_runners
from agents.reproduction import changes_since, ended_pairs, queue_again
from db.errors import RefusedError
from db.experiments import get_experiment
from db.formats import places
from db.lab import Lab
from db.processes import adopt_orphans, kill_children, write_atomically
from db.queue import get_run
from db.records import ENDED_RUN, Runner
from db.runners import list_runners
from moe.texts import BENCHMARKS, TEXTS
from server.commands import as_commands
from server.desk import FAILED, INTERRUPTED, Desk
from server.follow import Watch
from server.temporary import owned, temporary_folder
from server.tools.report import report as report_verb

PATIENCE_SECONDS = 60.0
"""For a runner of its own to come up: no chat client waits for a reproduction."""


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


@click.argument("experiment", type=click.IntRange(min=1), metavar="ID")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where its runs are done again, a new lab that stays; a temporary one by default.",
)
@click.option("--anyway", is_flag=True, help="Even where code or text is not what it was; says what differs.")
def reproduce(desk: Desk, experiment: int, into: Path | None, anyway: bool) -> None:
    """Run an experiment again, from its rows alone, and compare score by score.

    All of its pairs are trained anew in a lab of their own. On the machine that it was done on, with a budget in
    tokens, a CPU must give the same bits; otherwise scores must agree within the noise, and the verdict be the same.
    Exit code 0 only if it is reproduced.
    """
    lab = desk.open_to_read()
    changes = changes_since(lab, get_experiment(lab.store, experiment), ended_pairs(lab, experiment))
    if changes and not anyway:
        raise RefusedError(f"{'; '.join(changes)}. --anyway runs it all the same, and compares within the noise")

    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a terminal that is closed ends all of it, like Ctrl-C
        signal.signal(number, signal.default_int_handler)

    with _other_lab(lab, experiment, into) as other, owned(other.folder) as owner:
        try:
            reruns = queue_again(lab, other, experiment, register(other, wait_seconds=PATIENCE_SECONDS))
            desk.console.print(f"running {len(reruns)} runs of experiment {experiment} again in {other.folder}")
            start_runner(other, wait_seconds=PATIENCE_SECONDS, owner=owner)
            with Watch(other, desk.console) as watch:
                watch.until(lambda: all(get_run(other.store, item.again).status in ENDED_RUN for item in reruns))
        except KeyboardInterrupt:
            raise desk.fail(f"stopped, and what it had begun with it; {_left(into)}", INTERRUPTED) from None
        finally:
            stop_runners(other)
            kill_children()  # a process that was begun last would make a temporary folder anew

        agreement = compare(lab, other, experiment, reruns, changes)

    desk.console.print(_table(agreement))
    desk.console.print(agreement.sentence)
    desk.say(asdict(agreement) | {"verdict": agreement.verdict.said})
    if not agreement.reproduced:
        raise click.exceptions.Exit(FAILED)


def _left(into: Path | None) -> str:
    return "nothing of it is left" if into is None else f"what was done until then is in {into}"


@contextmanager
def _other_lab(lab: Lab, experiment_id: int, into: Path | None) -> Iterator[Lab]:
    if into is None:
        with temporary_folder() as folder:
            yield from _opened(lab, experiment_id, folder)
    elif (into / "lab.db").exists():
        raise RefusedError(f"{into} is a lab already, and runs that it knows would not be run again; name a new folder")
    else:
        yield from _opened(lab, experiment_id, into)


def _opened(lab: Lab, experiment_id: int, folder: Path) -> Iterator[Lab]:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "blueberry.toml", _settings(_runner_of(lab, experiment_id)))
    other = Lab(folder)
    for name in (TEXTS, BENCHMARKS):
        theirs, ours = lab.data_folder / name, other.data_folder / name
        if theirs.exists() and not ours.exists():
            ours.symlink_to(theirs)

    try:
        yield other
    finally:
        other.close()


def _runner_of(lab: Lab, experiment_id: int) -> Runner | None:
    known = {run.hardware_class for pair in ended_pairs(lab, experiment_id) if (run := pair.baseline) is not None}
    return next((runner for runner in list_runners(lab.store) if runner.hardware_class in known), None)


def _settings(runner: Runner | None) -> str:
    # Runs that come after training read the weights. Threads and processes decide the last bits on a CPU; what a card
    # did may be done on a CPU, and is then compared within the noise.
    machine = ""
    if runner is not None and runner.device == "cpu":
        machine = f'device = "cpu"\nthreads = {runner.threads}\n'
        machine += "" if runner.processes == 1 else f"processes = {runner.processes}\n"

    return f'[runner]\nkeep = "all"\n{machine}'


def _table(agreement: Agreement) -> Table:
    guarded = agreement.guard_metric is not None
    columns = [agreement.metric, "again", *((agreement.guard_metric, "again") if guarded else ()), ""]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for place, name in enumerate(["seed", "stage", "side", *columns]):
        table.add_column(name, justify="right" if place > 2 and name else "left")

    for run in agreement.runs:
        shown = _shown(run.metric, agreement.verdict.noise, run)
        if guarded:
            shown += _shown(run.guard, None, run) if run.guard else ["", ""]

        table.add_row(str(run.seed), run.stage, run.arm, *shown, "same bits" if run.same else "differs")

    return table


def _shown(value: Measured, noise: float | None, run: Again) -> list[str]:
    at = " when stopped" if run.stopped else ""
    return [
        status if number is None else f"{number:,.{0 if abs(number) >= 100.0 else 1 + places(noise, None)}f}{at}"
        for number, status in ((value.before, run.status_before), (value.after, run.status_after))
    ]
