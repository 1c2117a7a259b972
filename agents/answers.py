"""Answering a call to the agents: here and now where no model is needed, otherwise by the mind process.

Every call is a row of `tasks`. Without a model the row, the work and the answer are one transaction; with one, the row
is due work that agents/mind.py takes, whether or not the caller stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from agents.coordinator import due_cycles
from agents.hands import register
from agents.improver import improve
from agents.llm import has_model
from agents.planner import enqueue
from agents.proposals import GivenReview, Improvements, Proposal
from agents.reviewer import review
from agents.suggester import suggest
from db.errors import RefusedError
from db.experiments import experiments_to_judge, list_experiments
from db.lab import Lab
from db.processes import is_locked, spawn_module
from db.records import ExperimentStatus, Task
from db.tasks import add_task, finish_task, get_task, open_tasks, start_task, task_of_key

_POLL_SECONDS = 0.1

_Model = TypeVar("_Model", bound=BaseModel)


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
                finish_task(lab.store, task.id, result=handle(lab, kind, arguments, task.id))
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
    if has_due(lab) and not is_locked(lab.lock("mind")):
        spawn_module("agents", [str(lab.folder)], log=lab.log("mind"))


def has_due(lab: Lab) -> bool:
    """Whether there is work for the mind process."""
    return bool(open_tasks(lab.store) or experiments_to_judge(lab.store) or due_cycles(lab))


def handle(lab: Lab, kind: str, arguments: Mapping[str, Any], task_id: int) -> dict[str, Any]:
    """Does what a call asks for; its answer as JSON values.

    Raises:
        LabError: the call was refused or failed.
    """
    return _HANDLERS[kind](lab, arguments, task_id).model_dump(mode="json")


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
        lab,
        _targets(lab, arguments, "approved"),
        seeds=arguments.get("seeds"),
        priority=arguments.get("priority", 0),
        confirm=arguments.get("confirm", False),
        ablate=arguments.get("ablate", False),
    )


_HANDLERS: dict[str, Callable[[Lab, Mapping[str, Any], int], BaseModel]] = {
    "suggest": _suggest,
    "review": _review,
    "improve": _improve,
    "enqueue": _enqueue,
}


def _targets(lab: Lab, arguments: Mapping[str, Any], status: ExperimentStatus) -> list[int]:
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
