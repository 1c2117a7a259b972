"""enqueue: approved experiments become runs in the queue."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agents.hands import start_runner
from agents.planner import Plan, Plans
from db.lab import Lab
from db.queries import overview
from db.runners import list_runners
from server.calls import PATIENCE_SECONDS, Asking, IdempotencyKey
from server.views import RunnerLine, StillWorking, View, rounded, runner_line, still_working


class Enqueued(View):
    """What was queued, and what it will cost."""

    plans: list[Plan]
    """one for each experiment: new and shared runs, seeds, seconds of training, memory, notes"""
    queued: int
    """runs that wait in the whole lab"""
    seconds_left: float | None
    """until the queue is done, as far as past runs tell"""
    runners: list[RunnerLine]
    working: StillWorking | None = None
    next: str


def enqueue(
    lab: Lab,
    *,
    experiment_ids: Annotated[
        list[Annotated[int, Field(ge=1)]],
        Field(min_length=1, max_length=20, description="approved experiments; all of them are queued, or none"),
    ],
    seeds: Annotated[
        int | None,
        Field(
            ge=1,
            le=50,
            description="exactly so many pairs of runs (baseline and treatment) screen each experiment. By default as "
            "few as will do: one where the noise is known and that pair tells enough, otherwise two",
        ),
    ] = None,
    priority: Annotated[int, Field(ge=-9, le=9, description="higher goes first")] = 0,
    confirm: Annotated[
        bool,
        Field(
            description="confirm them on new pairs whatever the screening says, also to learn how bad or how equal "
            "something is; concluded ones go on with more pairs"
        ),
    ] = False,
    ablate: Annotated[
        bool,
        Field(description="for concluded experiments, instead: score their trained models without each of their parts"),
    ] = False,
    idempotency_key: IdempotencyKey = None,
    patience: float = PATIENCE_SECONDS,
) -> Enqueued:
    """Puts approved experiments into the queue of runs: a probe first, then treatment and baseline on each seed.

    Those first pairs screen an experiment and claim nothing; if it is promising it is registered as a hypothesis, and
    confirmed on new pairs by itself. Use it after `review` has approved an experiment; also to give a concluded one
    more pairs, or to take up a failed or cancelled one again. What cannot fit the card is refused with the number. Runs
    that an earlier experiment has done already are shared, not repeated. Comes back with a plan for each experiment and
    what a confirmation would take; `run` then starts training.
    """
    task = Asking(lab, idempotency_key, patience).ask(
        "enqueue",
        {"experiment_ids": experiment_ids, "seeds": seeds, "priority": priority, "confirm": confirm, "ablate": ablate},
    )
    working = still_working(task)
    if lab.settings.auto_start_runner and working is None:
        start_runner(lab)

    return enqueued(lab, [] if working else Plans.model_validate(task.result).plans, working)


def enqueued(lab: Lab, plans: list[Plan], working: StillWorking | None) -> Enqueued:
    """The state of the queue after these plans."""
    seen = overview(lab.store)
    runners = [runner_line(lab, runner) for runner in list_runners(lab.store)[:8]]
    if working:
        after = f"status(task_id={working.task_id}, wait_seconds=20)"
    elif any(runner.alive for runner in runners):
        after = "the runner is at work: status(wait_seconds=20) follows it; verdicts appear by themselves"
    else:
        after = "run() starts the runner; training then goes on without you"

    return Enqueued(
        plans=plans,
        queued=seen.queued,
        seconds_left=rounded(seen.seconds_left, 0),
        runners=runners,
        working=working,
        next=after,
    )
