"""The command line: `blueberry VERB`. A thin shell over the functions that the MCP tools are, in server/tools/."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any, get_args

import click
from pydantic import ValidationError

from agents.answers import wake
from agents.coordinator import start_cycle
from agents.proposals import Proposal
from db.events import latest_event_id
from db.experiments import get_experiment, latest_verdict, list_experiments
from db.records import ENDED_EXPERIMENT, ExperimentStatus
from db.tasks import get_cycle
from server.arguments import ArgumentsError, call, explain
from server.clean import clean
from server.copies import backup, export
from server.desk import FAILED, INTERRUPTED, Desk, verb, where_to_go
from server.doctor import doctor
from server.preflight import knobs_option, preflight_command, read_knob
from server.publish import report, reproduce
from server.runner_cli import runner
from server.show import experiment_table, verdict_table
from server.tools.enqueue import enqueue
from server.tools.improve import improve_many
from server.tools.review import review_many
from server.tools.run import run as run_verb
from server.tools.status import status as status_verb
from server.tools.suggest import suggest as suggest_verb
from server.views import experiment_line, verdict_view

PATIENCE_SECONDS = 300.0
"""A person at a terminal waits longer for an agent than a chat client can; Ctrl-C leaves it working."""

_EPILOG = """\b
Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 an agent is still
working on it; 130 interrupted (what was begun goes on).
When something is wrong: blueberry doctor.
The lab is --lab, otherwise BLUEBERRY_LAB, otherwise ~/.blueberry.
With --json, stdout is one JSON document; an error is {"error": "..."}.
"""

_domain = click.option("--domain", help="moe_architecture, optimization, evaluation, efficiency, or one of your own.")
_focus_area = click.option("--focus-area", help="Part of the domain, in a few words.")
_ids = click.argument("ids", nargs=-1, type=click.IntRange(min=1), metavar="[ID]...")


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--lab", "folder", metavar="DIR", help="The lab's folder; each command takes it too.")
def blueberry(folder: str | None) -> None:
    """Research on Mixture-of-Experts training: ask questions as experiments, train, and read verdicts.

    The flow: suggest, review, improve, enqueue, run, status. Or all of it: auto-research.
    """


@verb(blueberry)
@click.option("--count", default=5, show_default=True, help="How many ideas.")
@_domain
@_focus_area
@click.option("--proposer", type=click.Choice(["auto", "llm", "optimizer", "catalog"]), default="auto")
@click.option("--title", help="Your own idea in one line; then --hypothesis, --domain and --set are needed too.")
@click.option("--hypothesis", help="What you expect of the metric, in which direction, and why.")
@click.option("--method", default="", help="What is changed, what stays equal.")
@click.option("--source", help="Paper or document that it is from.")
@knobs_option
@click.option(
    "--metric", help="What to judge by, such as benchmark_NAME of a text set; by default the lab's (val_bpb)."
)
@click.option("--equal-flops", is_flag=True, help="Compare at equal training FLOPs, not at equal tokens.")
@click.option("--add-to-queue", is_flag=True, help="Also review them, and queue those that are approved.")
def suggest(
    desk: Desk,
    count: int,
    domain: str | None,
    focus_area: str | None,
    proposer: str,
    title: str | None,
    hypothesis: str | None,
    method: str,
    source: str | None,
    knobs: tuple[str, ...],
    metric: str | None,
    equal_flops: bool,
    add_to_queue: bool,
) -> None:
    """Bring new experiments into the lab."""
    proposals = None
    if title or hypothesis or knobs:
        values: dict[str, Any] = {"title": title, "hypothesis": hypothesis, "domain": domain, "focus_area": focus_area}
        values |= {"method": method, "source": source, "treatment": dict(map(read_knob, knobs))}
        values |= {"metric": metric, "equal_flops": equal_flops}
        proposals = [_proposal({name: value for name, value in values.items() if value is not None})]

    answer = call(
        suggest_verb,
        desk.lab,
        count=count,
        domain=domain,
        focus_area=focus_area,
        proposer=proposer,
        proposals=proposals,
        add_to_queue=add_to_queue,
        patience=PATIENCE_SECONDS,
    )
    desk.show(answer)
    if proposals and not answer.experiments:
        raise click.exceptions.Exit(FAILED)


@verb(blueberry)
@_ids
@click.option("--limit", type=click.IntRange(1, 100), default=10, show_default=True, help="Without ids: how many.")
def review(desk: Desk, ids: tuple[int, ...], limit: int) -> None:
    """Review suggested experiments: those named, otherwise the oldest that wait."""
    desk.show(review_many(desk.lab, list(ids), limit=limit, patience=PATIENCE_SECONDS))


@verb(blueberry)
@_ids
@click.option("--limit", type=click.IntRange(1, 100), default=10, show_default=True, help="Without ids: how many.")
def improve(desk: Desk, ids: tuple[int, ...], limit: int) -> None:
    """Improve experiments that need work: those named, otherwise the oldest."""
    desk.show(improve_many(desk.lab, list(ids), limit=limit, patience=PATIENCE_SECONDS))


@verb(blueberry, "enqueue")
@_ids
@click.option("--seeds", type=int, help="Pairs of runs that screen each, exactly; by default as few as will do.")
@click.option("--priority", default=0, show_default=True, help="Higher goes first.")
@click.option("--confirm", is_flag=True, help="Confirm them on new pairs, whatever the screening says.")
@click.option("--ablate", is_flag=True, help="Of concluded ones: score the trained models without each of their parts.")
def enqueue_command(
    desk: Desk, ids: tuple[int, ...], seeds: int | None, priority: int, confirm: bool, ablate: bool
) -> None:
    """Queue approved experiments: those named, otherwise all."""
    if ablate and not ids:
        raise click.UsageError("--ablate needs the numbers of concluded experiments")

    keys = list(ids) or [
        item.id for item in list_experiments(desk.lab.store, status="approved", oldest_first=True, limit=20)
    ]
    if not keys:
        raise desk.fail("no experiment is approved; review some first", FAILED)

    desk.show(
        call(
            enqueue,
            desk.lab,
            experiment_ids=keys,
            seeds=seeds,
            priority=priority,
            confirm=confirm,
            ablate=ablate,
            patience=PATIENCE_SECONDS,
        )
    )


@verb(blueberry)
@click.option("--single", type=click.IntRange(min=1), metavar="ID", help="Run one experiment and follow it.")
@click.option("--daemon", is_flag=True, help="Be the runner, in this terminal.")
def run(desk: Desk, single: int | None, daemon: bool) -> None:
    """Start the runner in the background; it outlives this terminal."""
    if daemon and single is not None:
        raise click.UsageError("--single and --daemon exclude each other")

    if daemon:
        raise click.exceptions.Exit(_be_the_runner(desk))

    since = latest_event_id(desk.lab.store)
    handle = run_verb(desk.lab, experiment_id=single, patience=PATIENCE_SECONDS)
    if single is None:
        desk.show(handle)
        return

    desk.console.print(handle.done)
    store = desk.lab.store
    desk.watch(lambda: get_experiment(store, single).status in ENDED_EXPERIMENT, since_event=since)
    _show_verdicts(desk, [single])
    if get_experiment(store, single).status != "concluded":
        raise click.exceptions.Exit(FAILED)


@verb(blueberry)
@click.option("--experiment", type=click.IntRange(min=1), metavar="ID", help="One experiment.")
@click.option("--run", "run_id", type=click.IntRange(min=1), metavar="ID", help="One run, with its log.")
@click.option("--task", type=click.IntRange(min=1), metavar="ID", help="A call that an agent answers.")
@click.option("--cycle", type=click.IntRange(min=1), metavar="ID", help="A campaign of auto-research.")
@click.option("--wait", type=float, default=0.0, metavar="SECONDS", help="Wait for a change, at most 20 s.")
@click.option("--limit", default=15, show_default=True, help="Most experiments or runs listed.")
@click.option("--watch", is_flag=True, help="Follow live, until Ctrl-C or the experiment's end.")
def status(
    desk: Desk,
    experiment: int | None,
    run_id: int | None,
    task: int | None,
    cycle: int | None,
    wait: float,
    limit: int,
    watch: bool,
) -> None:
    """Show the lab, or one experiment, run, task or campaign."""
    subject = {"experiment_id": experiment, "run_id": run_id, "task_id": task, "cycle_id": cycle}
    if watch and desk.as_json:
        raise click.UsageError("--watch is for people; programs call status --wait again and again")

    answer = call(status_verb, desk.lab, **subject, wait_seconds=wait, limit=limit)
    desk.show(answer)
    if not watch:
        return

    store = desk.lab.store
    desk.watch(lambda: experiment is not None and get_experiment(store, experiment).status in ENDED_EXPERIMENT)
    desk.show(call(status_verb, desk.lab, **subject, limit=limit))


@verb(blueberry, "list")
@click.option("--status", "wanted", type=click.Choice(get_args(ExperimentStatus)), help="Only of this status.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="The newest so many.")
def list_command(desk: Desk, wanted: ExperimentStatus | None, limit: int) -> None:
    """List experiments, newest first."""
    found = list_experiments(desk.lab.store, status=wanted, limit=limit + 1)
    lines = [experiment_line(desk.lab, experiment) for experiment in found[:limit]]
    desk.console.print(experiment_table(lines))
    if len(found) > limit:
        desk.console.print(f"and older ones: --limit {limit * 2}")

    desk.say({"experiments": [line.model_dump(mode="json") for line in lines], "truncated": len(found) > limit})


@verb(blueberry)
@click.argument("experiment", type=click.IntRange(min=1), metavar="ID")
def show(desk: Desk, experiment: int) -> None:
    """Show one experiment: hypothesis, review, runs, verdict."""
    desk.show(status_verb(desk.lab, experiment_id=experiment, limit=40))


@verb(blueberry)
@click.argument("experiment", type=click.IntRange(min=1), metavar="ID")
def cancel(desk: Desk, experiment: int) -> None:
    """Give up an experiment and the runs that no other needs."""
    desk.show(run_verb(desk.lab, action="cancel", experiment_id=experiment))


blueberry.add_command(runner)
verb(blueberry)(report)
verb(blueberry)(reproduce)
verb(blueberry)(export)
verb(blueberry)(backup)
verb(blueberry)(clean)
verb(blueberry)(doctor)
verb(blueberry, "preflight")(preflight_command)


@verb(blueberry, "auto-research")
@_domain
@_focus_area
@click.option("--count", type=int, help="Ideas a round; max_experiments_per_suggestion by default.")
@click.option("--max-cycles", default=1, show_default=True, help="Rounds of suggest, review, improve, run, learn.")
@click.option("--start-runner", is_flag=True, help="Start the runner when something is queued.")
@click.option("--detach", is_flag=True, help="Do not follow; the research goes on by itself.")
def auto_research(
    desk: Desk,
    domain: str | None,
    focus_area: str | None,
    count: int | None,
    max_cycles: int,
    start_runner: bool,
    detach: bool,
) -> None:
    """Do the whole cycle, and follow it to its verdicts."""
    lab = desk.lab
    since = latest_event_id(lab.store)
    cycle = start_cycle(
        lab, domain=domain, focus_area=focus_area, count=count, max_cycles=max_cycles, start_runner=start_runner
    )
    wake(lab)
    if detach:
        desk.console.print(f"campaign {cycle.id} began; follow it with: blueberry status --cycle {cycle.id}")
        desk.say({"cycle_id": cycle.id})
        return

    desk.watch(lambda: get_cycle(lab.store, cycle.id).status != "running", since_event=since)
    cycle = get_cycle(lab.store, cycle.id)
    if cycle.status == "failed":
        raise desk.fail(f"campaign {cycle.id} stopped at {cycle.error}", FAILED)

    made = list_experiments(lab.store, cycle_id=cycle.id, oldest_first=True, limit=200)
    if cycle.error:
        desk.console.print(f"campaign {cycle.id}: {cycle.error}")

    _show_verdicts(desk, [item.id for item in made if item.status != "superseded"])
    desk.console.print(where_to_go(desk.lab), markup=False)


@verb(blueberry)
def mcp(desk: Desk) -> None:
    """Serve the lab to a chat client over MCP, on stdin and stdout."""
    from server.__main__ import serve  # the SDK takes most of a second to load

    serve(desk.folder)


@verb(blueberry)
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="0 takes any free one.")
def browse(desk: Desk, port: int) -> None:
    """Serve the lab, read-only, to a browser on this machine (Datasette)."""
    folder = str(desk.lab.folder)
    os.execv(sys.executable, [sys.executable, "-m", "db.notebook", folder, "--port", str(port)])


def _proposal(values: dict[str, Any]) -> Proposal:
    try:
        return Proposal.model_validate(values)
    except ValidationError as error:
        hint = "" if {"title", "hypothesis", "domain"} <= values.keys() else " (--title, --hypothesis, --domain, --set)"
        raise ArgumentsError(f"your proposal is not complete or not valid: {explain(error)}{hint}") from None


def _be_the_runner(desk: Desk) -> int:
    child = subprocess.Popen([sys.executable, "-m", "gpu_runner", str(desk.lab.folder)])
    # Ctrl-C reaches the child too, as one of the terminal's foreground group: it stops in order, and we wait for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a terminal that is closed ends the runner, like Ctrl-C
        signal.signal(number, lambda _number, _frame: child.terminate())

    return 0 if child.wait() == 0 else FAILED


def _show_verdicts(desk: Desk, ids: list[int]) -> None:
    rows = []
    for key in ids:
        verdict = latest_verdict(desk.lab.store, key)
        line = experiment_line(desk.lab, get_experiment(desk.lab.store, key))
        rows.append((line, verdict_view(verdict) if verdict else None))

    desk.console.print()
    desk.console.print(verdict_table(rows))
    desk.say(
        [
            line.model_dump(mode="json") | {"verdict": verdict.model_dump(mode="json") if verdict else None}
            for line, verdict in rows
        ]
    )


def main() -> None:
    """The entry point `blueberry`."""
    try:
        code = blueberry.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED

    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
