"""The mind process: all that outlives a call. Judging, slow model calls, insights, automatic campaigns.

One per lab, held by a file lock. It takes due rows, each step a transaction, and exits when there are none; whoever
makes a row due calls wake(). A client may leave right after enqueue, and verdicts still appear.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from agents.analyst import learn
from agents.coordinator import advance, due_cycles
from agents.hands import register
from agents.improver import improve
from agents.judge import judge_experiment
from agents.llm import has_model
from agents.planner import enqueue
from agents.proposals import GivenReview, Improvements, Proposal
from agents.reviewer import review
from agents.suggester import suggest
from db.errors import LabError, LabUnusableError, RefusedError
from db.events import add_event
from db.experiments import list_experiments
from db.lab import Lab
from db.processes import FileLock, is_locked, spawn_module
from db.queue import experiments_to_judge, mark_judged
from db.records import Task
from db.tasks import (
    add_task,
    fail_interrupted_tasks,
    finish_task,
    get_task,
    move_cycle,
    open_tasks,
    start_task,
    task_of_key,
)

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.1

_Model = TypeVar("_Model", bound=BaseModel)

_INTERRUPTED = (
    "the mind process was killed while it worked on this; what it had written stands, a model call that was under "
    "way is charged at its worst case; ask again with a new idempotency key"
)


def answer(
    lab: Lab,
    kind: str,
    arguments: Mapping[str, Any],
    *,
    idempotency_key: str | None = None,
    wait_seconds: float = 18.0,
) -> Task:
    """Answers a call of kind suggest, review, improve or enqueue: at once where no model is needed, otherwise in the
    mind process, for which it waits up to `wait_seconds`; a task that is still queued or running is the handle.

    Raises:
        LabError: the call was refused or failed; a refused one leaves nothing behind.
    """
    known = task_of_key(lab.store, idempotency_key) if idempotency_key else None
    if known is None and not _needs_model(lab, kind, arguments):
        if kind == "enqueue":
            register(lab)

        with lab.store.transaction():
            task = add_task(lab.store, kind, arguments, idempotency_key)
            if task.status == "queued":
                start_task(lab.store, task.id)
                result = _HANDLERS[kind](lab, arguments, task.id)
                finish_task(lab.store, task.id, result=result.model_dump(mode="json"))
    else:
        task = add_task(lab.store, kind, arguments, idempotency_key)

    wake(lab)
    deadline = time.monotonic() + wait_seconds
    while (task := get_task(lab.store, task.id)).status in ("queued", "running") and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)

    if task.status == "failed":
        raise RefusedError(task.error or "the call failed")

    return task


def wake(lab: Lab) -> None:
    """Starts the mind process if there is due work and none lives.

    A living one looks again after it has let go of the lock, so work that was committed before this call is seen.
    """
    if _has_due(lab) and not is_locked(lab.lock("mind")):
        spawn_module("agents", [str(lab.folder)], log=lab.log("mind"))


def work(lab: Lab) -> None:
    """Does all due work of the lab, unless another process does; returns when nothing is due."""
    with FileLock(lab.lock("mind")) as lock:
        while lock.acquire(timeout=0.5):
            fail_interrupted_tasks(lab.store, _INTERRUPTED)
            while _step(lab):
                pass

            lock.release()
            if not _has_due(lab):  # what became due between the last step and the release
                break


def _has_due(lab: Lab) -> bool:
    return bool(open_tasks(lab.store) or experiments_to_judge(lab.store) or due_cycles(lab))


def _step(lab: Lab) -> bool:
    for task in open_tasks(lab.store):
        if start_task(lab.store, task.id):
            _do_task(lab, task)
            return True

    for experiment in experiments_to_judge(lab.store):
        try:
            with lab.store.transaction():
                verdict = judge_experiment(lab, experiment)
                if verdict is not None and verdict.final:
                    learn(lab)
        except LabUnusableError:
            raise
        except Exception as error:
            # Weighed as far as we can: the next run that ends brings it back, and until then it must not spin.
            _LOG.exception("experiment %d could not be judged", experiment.id)
            mark_judged(lab.store, experiment.id)
            add_event(lab.store, "error", f"could not be judged: {error}", experiment_id=experiment.id)

        return True

    for cycle in due_cycles(lab):
        try:
            advance(lab, cycle)
        except LabUnusableError:
            raise
        except Exception as error:
            if not isinstance(error, LabError):
                _LOG.exception("campaign %d stopped", cycle.id)

            move_cycle(lab.store, cycle.id, status="failed", error=f"{cycle.step}: {error}")
            add_event(lab.store, "error", f"campaign {cycle.id} stopped at {cycle.step}: {error}")

        return True

    return False


def _do_task(lab: Lab, task: Task) -> None:
    try:
        result = _HANDLERS[task.kind](lab, task.arguments, task.id)
        finish_task(lab.store, task.id, result=result.model_dump(mode="json"))
    except LabUnusableError:
        raise
    except LabError as error:
        finish_task(lab.store, task.id, error=str(error))
    except Exception as error:
        _LOG.exception("task %d failed", task.id)
        finish_task(lab.store, task.id, error=f"internal error, {type(error).__name__}; see {lab.log('mind')}")


def _needs_model(lab: Lab, kind: str, arguments: Mapping[str, Any]) -> bool:
    if kind == "suggest":
        wanted = not arguments.get("proposals") and arguments.get("proposer", "auto") in ("auto", "llm")
    elif kind == "review":
        wanted = arguments.get("given") is None and arguments.get("reviewer", "auto") in ("auto", "llm")
    elif kind == "improve":
        wanted = arguments.get("revision") is None
    else:
        wanted = False

    return wanted and has_model(lab)


def _suggest(lab: Lab, arguments: Mapping[str, Any], task_id: int) -> BaseModel:
    return suggest(
        lab,
        count=arguments.get("count", 1),
        domain=arguments.get("domain"),
        focus_area=arguments.get("focus_area"),
        proposer=arguments.get("proposer", "auto"),
        proposals=[_validated(Proposal, item) for item in arguments.get("proposals") or ()],
        task_id=task_id,
    )


def _review(lab: Lab, arguments: Mapping[str, Any], task_id: int) -> BaseModel:
    given = arguments.get("given")
    return review(
        lab,
        _targets(lab, arguments, "suggested"),
        given=None if given is None else _validated(GivenReview, given),
        reviewer=arguments.get("reviewer", "auto"),
        task_id=task_id,
    )


def _improve(lab: Lab, arguments: Mapping[str, Any], task_id: int) -> BaseModel:
    revision = arguments.get("revision")
    targets = _targets(lab, arguments, "needs_work")
    if revision is not None and len(targets) != 1:
        raise RefusedError("a revision belongs to one experiment; name exactly one id")

    proposal = None if revision is None else _validated(Proposal, revision)
    return Improvements(improvements=[improve(lab, key, revision=proposal, task_id=task_id) for key in targets])


def _enqueue(lab: Lab, arguments: Mapping[str, Any], task_id: int) -> BaseModel:
    return enqueue(
        lab, _targets(lab, arguments, "approved"), seeds=arguments.get("seeds"), priority=arguments.get("priority", 0)
    )


_HANDLERS: dict[str, Callable[[Lab, Mapping[str, Any], int], BaseModel]] = {
    "suggest": _suggest,
    "review": _review,
    "improve": _improve,
    "enqueue": _enqueue,
}


def _targets(lab: Lab, arguments: Mapping[str, Any], status: Any) -> list[int]:
    named = list(arguments.get("experiment_ids") or ())
    if named:
        return list(dict.fromkeys(named))

    waiting = list_experiments(lab.store, status=status, oldest_first=True, limit=arguments.get("limit") or 10)
    if not waiting:
        raise RefusedError(
            f"no experiment is {status} now, so there is nothing to do; name experiment ids, or see status"
        )

    return [experiment.id for experiment in waiting]


def _validated(schema: type[_Model], value: Any) -> _Model:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)
        )
        raise RefusedError(f"the {schema.__name__} is not valid: {problems}") from None
