"""From an approved experiment to runs in the queue: pre-flight, then one transaction.

A treatment waits until its probe has passed; what goes first otherwise is said in db/order.py. Equal fingerprint and
seed is the same run, done once. Where post runs are compared, each waits for the training run whose checkpoint it
reads: a treatment that changes no training shares the baseline's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict

from agents.class_noise import noise_here
from agents.confirmation import go_on
from agents.continuing import evidence_elsewhere
from agents.effort import minutes, what_it_takes
from agents.hands import target_runner
from agents.pairs import add_pairs, configs_of, run_values
from agents.preflight import preflight
from agents.room import disk_note, disk_problem
from agents.rungs import rung_for, rung_notes
from agents.screening import first_pairs
from agents.textsets import pin_text_set
from db.errors import RefusedError
from db.experiments import get_experiment, move_experiment, plan_experiment
from db.hypotheses import get_hypothesis
from db.lab import Lab
from db.queries import trained_runs
from db.queue import Queued, add_run
from db.records import Experiment, ExperimentStatus, Runner, Stage
from db.store import to_column
from db.weights import free_identity, has_run, has_weights
from moe.accounting import disk_bytes
from moe.config import Config, scientific
from moe.fingerprint import code_hash, pin
from moe.metrics import text_set_of
from moe.texts import CorpusError

_MAY_QUEUE: tuple[ExperimentStatus, ...] = ("approved", "concluded", "failed", "cancelled")


class Plan(BaseModel):
    """What enqueueing one experiment means. Times in seconds, memory in bytes; notes are for the reader."""

    model_config = ConfigDict(frozen=True)

    experiment_id: int
    title: str
    hardware_class: str
    seeds: list[int]
    runs_new: int
    runs_shared: int
    seconds: float | None
    memory_bytes: int
    micro_batch_size: int
    notes: list[str]


class Plans(BaseModel):
    """What enqueue did."""

    model_config = ConfigDict(frozen=True)

    plans: list[Plan]


def enqueue(
    lab: Lab,
    experiment_ids: Iterable[int],
    *,
    seeds: int | None = None,
    priority: int = 0,
    confirm: bool = False,
    ablate: bool = False,
) -> Plans:
    """Queues experiments, all or none.

    Args:
        experiment_ids: approved ones; also failed and cancelled ones, and concluded ones whose evidence shall grow: by
            more seeds of screening, or, where a confirmation has begun or is asked for, by more new pairs.
        seeds: pairs of runs that screen it, min_seeds to max_seeds of the configuration. If not given, as few as will
            do: two where the noise is not known well yet, otherwise one, and a second where that leaves it open.
        priority: higher goes first.
        confirm: confirm it on new pairs whatever the screening says.
        ablate: instead, take the trained models of concluded ones apart, and score each without each of its parts.

    Raises:
        NotFoundError, RefusedError: one of them does not exist, is in another state, breaks a limit, or asks for a
            text that is not there or not the one it was; or no runner is registered (agents.hands.register).
    """
    with lab.store.transaction():
        if ablate:
            return Plans(plans=[_ablate(lab, key, priority=priority) for key in experiment_ids])

        return Plans(
            plans=[_enqueue(lab, key, seeds=seeds, priority=priority, confirm=confirm) for key in experiment_ids]
        )


def _enqueue(lab: Lab, experiment_id: int, *, seeds: int | None, priority: int, confirm: bool) -> Plan:
    experiment = get_experiment(lab.store, experiment_id)
    if experiment.status not in _MAY_QUEUE:
        raise RefusedError(_why_not(experiment))

    runner = target_runner(lab)
    if runner is None:
        raise RefusedError("no runner is known yet, so the hardware class of the runs is not; start one with run")

    was = experiment.status
    _same_hardware(experiment, runner)
    if elsewhere := evidence_elsewhere(lab.store, experiment_id, runner.hardware_class):
        raise RefusedError(f"experiment {experiment_id} cannot go on here: {elsewhere}")

    experiment = _pin_text(lab, experiment)
    baseline, treatment = configs_of(experiment)
    cost = preflight(lab, treatment, runner)
    problems = [*cost.problems, *preflight(lab, baseline, runner).problems]
    problems += filter(None, (disk_problem(lab, baseline), disk_problem(lab, treatment)))
    if problems:
        raise RefusedError(f"experiment {experiment_id} is refused: {'; '.join(dict.fromkeys(problems))}")

    # judged_runs: nothing of it is weighed, so that it is judged even where all its runs are done already.
    rung = rung_for(lab, experiment)
    columns = {"hardware_class": runner.hardware_class, "priority": priority, "judged_runs": -1}
    columns |= {"screen_share": rung.share}
    if confirm:
        columns["confirm"] = "always"

    plan_experiment(lab.store, experiment_id, **columns)
    pin_text_set(lab, experiment)
    move_experiment(lab.store, experiment_id, "queued", allowed=_MAY_QUEUE)
    experiment = get_experiment(lab.store, experiment_id)
    count = _screening_seeds(lab, experiment, seeds, goes_on=was == "concluded" and not confirm)
    added = add_pairs(lab, experiment, range(1, count + 1))
    if get_hypothesis(lab.store, experiment_id) is not None:
        added += go_on(lab, experiment_id)

    short = preflight(lab, configs_of(experiment, "screen")[1], runner)
    notes = _notes(lab, experiment, runner, cost.seconds, confirm=confirm)
    return Plan(
        experiment_id=experiment_id,
        title=experiment.title,
        hardware_class=runner.hardware_class,
        seeds=list(range(1, count + 1)),
        runs_new=sum(item.new for item in added),
        runs_shared=sum(not item.new for item in added),
        seconds=_training_seconds(added, {"screen": short.seconds, "confirm": cost.seconds}),
        memory_bytes=cost.memory_bytes,
        micro_batch_size=cost.micro_batch_size,
        notes=[*rung_notes(experiment, rung, count), *([] if confirm else _second_pair(count, short.seconds)), *notes],
    )


def _second_pair(count: int, seconds: float | None) -> list[str]:
    if count > 1:
        return []

    time = "" if seconds is None else f" ({minutes(2 * seconds)})"
    return [f"screened on 1 pair; a second one{time} follows only where the first leaves the question open"]


def _training_seconds(added: Iterable[Queued], each: Mapping[Stage, float | None]) -> float | None:
    times = [each[item.run.purpose] for item in added if item.new and item.run.kind == "train"]
    known = [time for time in times if time is not None]
    return sum(known) if len(known) == len(times) else None


def _screening_seeds(lab: Lab, experiment: Experiment, seeds: int | None, *, goes_on: bool) -> int:
    """How many pairs screen the experiment, to begin with.

    Args:
        goes_on: whether more seeds of screening are what a concluded one is queued for, unless it is registered.

    Raises:
        RefusedError: too few or too many; or it is concluded, and nothing more is asked of it.
    """
    first = first_pairs(noise_here(lab, experiment, experiment.metric, "screen"))
    least, most = max(lab.settings.min_seeds, first), lab.settings.max_seeds
    count = max(least, experiment.seeds) if seeds is None else seeds
    if not least <= count <= most:
        why = "" if count != 1 or lab.settings.min_seeds > 1 else "; one will do once the noise is known better"
        raise RefusedError(f"seeds={count} is outside {least} to {most} (min_seeds, max_seeds{why})")

    if goes_on and get_hypothesis(lab.store, experiment.id) is None and count <= experiment.seeds:
        raise RefusedError(
            f"experiment {experiment.id} is concluded with {experiment.seeds} seeds; to go on, ask for more than that, "
            "or for its confirmation on new pairs (confirm)"
        )

    return max(count, experiment.seeds)


def _pin_text(lab: Lab, experiment: Experiment) -> Experiment:
    # From now on all runs of the experiment, also seeds that the judge adds later, read the text as it is today.
    baseline, _ = configs_of(experiment)
    try:
        pinned = pin(baseline, lab.data_folder)
    except CorpusError as error:
        raise RefusedError(f"experiment {experiment.id} has no text to train on: {error}") from None

    if pinned == baseline:
        return experiment

    plan_experiment(lab.store, experiment.id, baseline=to_column(pinned.model_dump()))
    return get_experiment(lab.store, experiment.id)


def _ablate(lab: Lab, experiment_id: int, *, priority: int) -> Plan:
    experiment = get_experiment(lab.store, experiment_id)
    trained = [
        run
        for run in trained_runs(lab.store, experiment_id)
        if run.code == code_hash() and experiment.share_in(run.purpose) == 1.0
    ]
    runner = target_runner(lab)
    if experiment.status != "concluded" or not trained or runner is None:
        raise RefusedError(
            f"experiment {experiment_id} is {experiment.status} with {len(trained)} trained models of today's moe/ and "
            "the whole budget; to take them apart it must be concluded and have some"
        )

    added, anew = [], 0
    for run in trained:
        config, needs = Config.model_validate(run.config), run
        values = run_values("ablate", config, run.hardware_class, run.seed)
        if not has_weights(lab.store, run.id) and not has_run(lab.store, values):
            training = run_values("train", config, run.hardware_class, run.seed)
            free_identity(lab.store, training)
            training |= {"priority": priority, "needs_run_id": None}
            queued = add_run(lab.store, experiment_id, "checkpoint", training)
            needs, anew = queued.run, anew + queued.new

        values |= {"priority": priority, "needs_run_id": needs.id}
        added.append(add_run(lab.store, experiment_id, "ablation", values))

    cost = preflight(lab, Config.model_validate(trained[0].config), runner)
    return Plan(
        experiment_id=experiment_id,
        title=experiment.title,
        hardware_class=trained[0].hardware_class,
        seeds=sorted({run.seed for run in trained}),
        runs_new=sum(item.new for item in added),
        runs_shared=sum(not item.new for item in added),
        seconds=None,
        memory_bytes=cost.memory_bytes,
        micro_batch_size=cost.micro_batch_size,
        notes=["each trained model is scored without each of its parts; no verdict changes", *_trained_anew(anew)],
    )


def _trained_anew(count: int) -> list[str]:
    if not count:
        return ["nothing is trained"]

    return [f"{count} of them are trained anew before, since their weights were dropped (keep, under [runner])"]


def _notes(lab: Lab, experiment: Experiment, runner: Runner, seconds: float | None, *, confirm: bool) -> list[str]:
    notes = []
    baseline, treatment = configs_of(experiment)
    if runner.device == "cpu":
        notes.append("no card: the runs train on the CPU")

    if scientific(treatment) == scientific(baseline):
        notes.append("the treatment trains nothing of its own: it is measured on the baseline's checkpoints")

    ours, theirs = preflight(lab, treatment, runner), preflight(lab, baseline, runner)
    ratio = ours.flops_per_token / theirs.flops_per_token
    if abs(ratio - 1.0) > 0.02:
        notes.append(f"the treatment uses {ratio:.2f} times the baseline's training FLOPs a token")

    if ours.micro_batch_size != treatment.micro_batch_size:
        how = "refitted to" if ours.processes == 1 else f"dealt out to {ours.processes} processes in"
        notes.append(f"{how} micro-batches of {ours.micro_batch_size} sequences; the gradients are the same")

    if (text_set := text_set_of(experiment.metric)) is not None:
        notes.append(f"judged by the whole text set {text_set!r} in both stages: nothing of it is sealed")

    when = "afterwards, whatever screening says," if confirm else "if screening finds it promising,"
    notes.append(f"{when} it is confirmed on new pairs: {what_it_takes(lab, experiment, seconds)}")
    larger = max(baseline, treatment, key=disk_bytes)
    return [*notes, *filter(None, [disk_note(lab, larger)])]


def _same_hardware(experiment: Experiment, runner: Runner) -> None:
    if experiment.status == "concluded" and experiment.hardware_class != runner.hardware_class:
        raise RefusedError(
            f"experiment {experiment.id} was measured on {experiment.hardware_class}, this lab now runs on "
            f"{runner.hardware_class}; hardware classes never mix in a comparison, suggest it anew"
        )


def _why_not(experiment: Experiment) -> str:
    advice = {
        "suggested": "review it first",
        "needs_work": "improve it first",
        "rejected": "it was rejected; suggest a better one",
        "superseded": "it was improved; enqueue its successor",
        "queued": "it is in the queue already",
        "running": "it is running already",
    }
    return f"experiment {experiment.id} is {experiment.status}: {advice[experiment.status]}"
