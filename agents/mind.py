"""The mind process: all that outlives a call. Judging, slow model calls, insights, automatic campaigns.

One per lab, held by a file lock. It takes due rows, each step a transaction, and exits when there are none; whoever
makes a row due calls agents.answers.wake(). A client may leave right after enqueue, and verdicts still appear.
"""

from __future__ import annotations

import logging

from agents.analyst import learn
from agents.answers import handle, has_due
from agents.champion import crown
from agents.coordinator import advance, due_cycles
from agents.judge import judge_experiment
from db.errors import LabError, LabUnusableError
from db.events import add_event
from db.experiments import experiments_to_judge, mark_judged, move_experiment
from db.failpoints import failpoint
from db.lab import Lab
from db.processes import FileLock
from db.queue import cancel_experiment_runs
from db.records import Task
from db.tasks import fail_interrupted_tasks, finish_task, move_cycle, open_tasks, start_task

_LOG = logging.getLogger(__name__)

_INTERRUPTED = (
    "the mind process was killed while it worked on this; what it had written stands, a model call that was under "
    "way is charged at its worst case; ask again with a new idempotency key"
)


def work(lab: Lab) -> None:
    """Does all due work of the lab, unless another process does; returns when nothing is due."""
    with FileLock(lab.lock("mind")) as lock:
        while lock.acquire(timeout=0.5):
            failpoint("mind.locked")
            fail_interrupted_tasks(lab.store, _INTERRUPTED)
            while _step(lab):
                pass

            lock.release()
            failpoint("mind.released")
            if not has_due(lab):  # what became due between the last step and the release
                break


def _step(lab: Lab) -> bool:
    for task in open_tasks(lab.store):
        if start_task(lab.store, task.id):
            _do_task(lab, task)
            return True

    for experiment in experiments_to_judge(lab.store):
        try:
            with lab.store.transaction("judge"):
                verdict = judge_experiment(lab, experiment)
                if verdict is not None and verdict.final:
                    learn(lab)
                    crown(lab)
        except LabUnusableError:
            raise
        except LabError as error:  # its config is none of this moe/ any more: it has ended, and may be asked again
            with lab.store.transaction():
                cancel_experiment_runs(lab.store, experiment.id)
                move_experiment(lab.store, experiment.id, "failed", allowed=("queued", "running"), reason=str(error))
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
        finish_task(lab.store, task.id, result=handle(lab, task.kind, task.arguments, task.id))
    except LabUnusableError:
        raise
    except LabError as error:
        finish_task(lab.store, task.id, error=str(error))
    except Exception as error:
        _LOG.exception("task %d failed", task.id)
        finish_task(lab.store, task.id, error=f"internal error, {type(error).__name__}; see {lab.log('mind')}")
