"""run: starts, stops and pauses the runner daemon, puts an experiment first, or cancels one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from agents.answers import wake
from agents.hands import alive_runners, restart_runners, set_modes, start_runner, state_of, stop_runners
from db.budget import reached
from db.clock import utc_now
from db.errors import RefusedError
from db.experiments import get_experiment, move_experiment
from db.lab import Lab
from db.queries import overview
from db.queue import cancel_experiment_runs, prioritize_experiment
from db.records import ExperimentStatus, Runner, RunnerMode
from db.runners import list_runners
from server.calls import PATIENCE_SECONDS, Asking
from server.views import RunLine, RunnerLine, View, rounded, run_line, runner_line

Action = Literal["start", "stop", "restart", "pause", "resume", "drain", "cancel"]

_MODES: dict[Action, RunnerMode] = {"pause": "paused", "drain": "draining", "resume": "open"}
_OPEN: tuple[ExperimentStatus, ...] = ("suggested", "approved", "needs_work", "queued", "running")


class RunHandle(View):
    """The runner and its queue."""

    done: str
    """what this call did"""
    experiment_id: int | None
    runners: list[RunnerLine]
    running: list[RunLine]
    queued: int
    """runs that wait"""
    seconds_left: float | None
    """until the queue is done, as far as past runs tell"""
    budget: str | None
    """which cap of the day is reached, so that nothing trains, and how to go on; null: none"""
    next: str


def run(
    lab: Lab,
    *,
    action: Annotated[
        Action,
        Field(
            description="start: wake or start the runner; stop: have it leave checkpoints, put its runs back and end; "
            "pause: it finishes what trains and claims nothing more, until resume; drain: it finishes what trains, "
            "then ends; restart: it starts anew (after an upgrade or a change of the configuration) while what trains "
            "goes on; cancel: give up the experiment experiment_id"
        ),
    ] = "start",
    experiment_id: Annotated[
        int | None,
        Field(ge=1, description="with start: do this experiment first, queueing it if it is approved; with cancel: it"),
    ] = None,
    patience: float = PATIENCE_SECONDS,
) -> RunHandle:
    """Starts the runner daemon and returns at once; it trains whatever is queued, and outlives this conversation.

    Use it after `enqueue`. With experiment_id that experiment goes before all others. action="stop" ends the daemon
    (its runs return to the queue, nothing is lost); "pause", "drain" and "resume" say whether it may take new runs, and
    hold until the next of them, whatever is restarted; action="cancel" with experiment_id gives an experiment up.
    Comes back with the runner's process, what runs, and how much waits; follow with status(wait_seconds=20).
    """
    if action == "cancel":
        done = _cancel(lab, experiment_id)
    elif action == "start":
        done = _start(lab, experiment_id, patience)
    elif action == "stop":
        count = stop_runners(lab)
        done = f"stopped {count} runner{'s' * (count != 1)}" if count else "no runner was alive"
    elif action == "restart":
        done = f"{_in_words(lab, restart_runners(lab))}: started anew, and what trained goes on"
    else:
        done = _in_words(lab, set_modes(lab, _MODES[action]))

    wake(lab)
    seen = overview(lab.store)
    runners = [runner_line(lab, runner) for runner in list_runners(lab.store)[:8]]
    return RunHandle(
        done=done,
        experiment_id=experiment_id,
        runners=runners,
        running=[run_line(item) for item in seen.running[:20]],
        queued=seen.queued,
        seconds_left=rounded(seen.seconds_left, 0),
        budget=reached(lab.store, lab.settings.runner, utc_now()),
        next=_next(lab, action, experiment_id, seen.queued + len(seen.running)),
    )


def _start(lab: Lab, experiment_id: int | None, patience: float) -> str:
    prepared = "" if experiment_id is None else _put_first(lab, experiment_id, patience)
    start_runner(lab)
    return prepared + _in_words(lab, alive_runners(lab))


def _put_first(lab: Lab, experiment_id: int, patience: float) -> str:
    experiment = get_experiment(lab.store, experiment_id)
    if experiment.status in ("approved", "failed", "cancelled"):
        Asking(lab, None, patience).ask("enqueue", {"experiment_ids": [experiment_id], "seeds": None, "priority": 0})
    elif experiment.status not in ("queued", "running"):
        advice = {"suggested": "review it first", "needs_work": "improve it first"}
        raise RefusedError(
            f"experiment {experiment_id} is {experiment.status}, so it cannot be run; "
            f"{advice.get(experiment.status, 'see status(experiment_id)')}"
        )

    count = prioritize_experiment(lab.store, experiment_id)
    return f"experiment {experiment_id} goes first with {count} waiting run{'s' * (count != 1)}; "


def _cancel(lab: Lab, experiment_id: int | None) -> str:
    if experiment_id is None:
        raise RefusedError('action="cancel" needs experiment_id; to end the runner use action="stop"')

    with lab.store.transaction("cancel"):
        move_experiment(lab.store, experiment_id, "cancelled", allowed=_OPEN, reason="cancelled on request")
        count = cancel_experiment_runs(lab.store, experiment_id)

    return f"experiment {experiment_id} is cancelled, with {count} run{'s' * (count != 1)}"


def _in_words(lab: Lab, runners: Sequence[Runner]) -> str:
    said = []
    for runner in runners:
        state = state_of(lab, runner)
        where = f"(pid {runner.pid}, {runner.device_name})" if runner.pid else f"({runner.device_name})"
        said.append(f"runner {runner.id} {f'is alive {where}' if state == 'alive' else f'{where} is {state}'}")

    return "; ".join(said)


def _next(lab: Lab, action: str, experiment_id: int | None, work: int) -> str:
    if action == "cancel":
        return "status() shows what goes on"

    if action in ("stop", "drain"):
        return "run() starts the runner again; the queue is kept"

    if action == "pause":
        return "run(action='resume') lets it take runs again"

    if not alive_runners(lab):
        return "run() starts the runner"

    if not work:
        return "the queue is empty: enqueue approved experiments, or suggest() new ones"

    return f"status({f'experiment_id={experiment_id}, ' if experiment_id else ''}wait_seconds=20) follows it"
