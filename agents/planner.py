"""From an approved experiment to runs in the queue: pre-flight, then one transaction.

A treatment waits until its probe has passed; what goes first otherwise is said in db/order.py. Equal fingerprint and
seed is the same run, done once. Where post runs are compared, each waits for the training run whose checkpoint it
reads: a treatment that changes no training shares the baseline's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from agents.hands import target_runner
from agents.preflight import preflight
from agents.room import disk_note, disk_problem
from db.errors import RefusedError
from db.experiments import get_experiment, move_experiment, plan_experiment
from db.lab import Lab
from db.queries import trained_runs
from db.queue import Queued, add_run
from db.records import Arm, Experiment, ExperimentStatus, RunKind, Runner
from db.runners import list_runners
from db.store import to_column
from db.weights import free_identity, has_run, has_weights
from moe.accounting import disk_bytes
from moe.config import Config, ConfigError, after_training, apply, apply_treatment, scientific
from moe.fingerprint import code_hash, fingerprint, pin
from moe.post.stages import as_trained, needs_post
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
    lab: Lab, experiment_ids: Iterable[int], *, seeds: int | None = None, priority: int = 0, ablate: bool = False
) -> Plans:
    """Queues experiments, all or none.

    Args:
        experiment_ids: approved ones; also concluded ones that shall get more seeds, failed and cancelled ones.
        seeds: pairs of runs to begin with; the judge may add more, up to max_seeds of the configuration.
        priority: higher goes first.
        ablate: instead, take the trained models of concluded ones apart, and score each without each of its parts.

    Raises:
        NotFoundError, RefusedError: one of them does not exist, is in another state, breaks a limit, or asks for a
            text that is not there or not the one it was; or no runner is registered (agents.hands.register).
    """
    with lab.store.transaction():
        if ablate:
            return Plans(plans=[_ablate(lab, key, priority=priority) for key in experiment_ids])

        return Plans(plans=[_enqueue(lab, key, seeds=seeds, priority=priority) for key in experiment_ids])


def add_pairs(lab: Lab, experiment: Experiment, seeds: Sequence[int]) -> list[Queued]:
    """Queues the runs of both sides for every seed; a treatment's training waits for the experiment's probe."""
    store = lab.store
    baseline, treatment = configs_of(experiment)
    hardware_class = experiment.hardware_class or ""
    runner = next((item for item in list_runners(store) if item.hardware_class == hardware_class), None)
    probe = add_run(
        store,
        experiment.id,
        "probe",
        {
            "kind": "probe",
            "fingerprint": fingerprint(
                "probe",
                treatment,
                hardware_class,
                post=after_training(treatment),
                baseline=scientific(baseline) | after_training(baseline),
            ),
            "seed": 0,
            "hardware_class": hardware_class,
            "code": code_hash(),
            "config": treatment.model_dump(),
            "baseline": baseline.model_dump(),
            "needs_run_id": None,
            "priority": experiment.priority,
        },
    )
    added = {probe.run.id: probe}
    posted = needs_post(experiment.metric, baseline, treatment)
    trains_anew = scientific(treatment) != scientific(baseline)
    arms: tuple[tuple[Arm, Config, int | None], ...] = (
        ("baseline", baseline, None),
        ("treatment", treatment, probe.run.id if trains_anew else None),
    )
    for arm, config, needs in arms:
        cost = preflight(lab, config, runner)
        fitted = apply(config, {"micro_batch_size": cost.micro_batch_size})
        for seed in seeds:
            first: Arm = "checkpoint" if posted else arm
            values = _values("train", as_trained(fitted), hardware_class, seed)
            values |= {"priority": experiment.priority, "needs_run_id": needs, "expected_seconds": cost.seconds}
            after = _values("post", fitted, hardware_class, seed)
            if posted and not has_run(store, after):
                free_identity(store, values)

            queued = add_run(store, experiment.id, first, values)
            added.setdefault(queued.run.id, queued)
            if posted:
                after |= {"priority": experiment.priority, "needs_run_id": queued.run.id}
                queued = add_run(store, experiment.id, arm, after)
                added.setdefault(queued.run.id, queued)

    plan_experiment(store, experiment.id, seeds=max(seeds))
    return list(added.values())


def configs_of(experiment: Experiment) -> tuple[Config, Config]:
    """The whole configs of both sides: baseline, treatment.

    Raises:
        RefusedError: the stored config is no longer valid with this version of moe/.
    """
    try:
        baseline = Config.model_validate(experiment.baseline)
        return baseline, apply_treatment(baseline, experiment.treatment)
    except (ConfigError, ValueError) as error:
        raise RefusedError(f"experiment {experiment.id} cannot be run: {error}") from None


def _enqueue(lab: Lab, experiment_id: int, *, seeds: int | None, priority: int) -> Plan:
    experiment = get_experiment(lab.store, experiment_id)
    if experiment.status not in _MAY_QUEUE:
        raise RefusedError(_why_not(experiment))

    count = lab.settings.min_seeds if seeds is None else seeds
    if count < lab.settings.min_seeds or count > lab.settings.max_seeds:
        raise RefusedError(
            f"seeds={count} is outside {lab.settings.min_seeds} to {lab.settings.max_seeds} (min_seeds, max_seeds)"
        )

    if experiment.status == "concluded" and count <= experiment.seeds:
        raise RefusedError(
            f"experiment {experiment_id} is concluded with {experiment.seeds} seeds; to go on, ask for more than that"
        )

    runner = target_runner(lab)
    if runner is None:
        raise RefusedError("no runner is known yet, so the hardware class of the runs is not; start one with run")

    _same_hardware(experiment, runner)
    baseline, treatment = configs_of(_pin_text(lab, experiment))
    cost = preflight(lab, treatment, runner)
    problems = [*cost.problems, *preflight(lab, baseline, runner).problems]
    problems += filter(None, (disk_problem(lab, baseline), disk_problem(lab, treatment)))
    if problems:
        raise RefusedError(f"experiment {experiment_id} is refused: {'; '.join(dict.fromkeys(problems))}")

    # judged_runs: nothing of it is weighed, so that it is judged even where all its runs are done already.
    columns = {"hardware_class": runner.hardware_class, "priority": priority, "judged_runs": -1}
    plan_experiment(lab.store, experiment_id, **columns)
    move_experiment(lab.store, experiment_id, "queued", allowed=_MAY_QUEUE)
    added = add_pairs(lab, get_experiment(lab.store, experiment_id), range(1, count + 1))
    training = sum(1 for item in added if item.new and item.run.kind == "train")
    return Plan(
        experiment_id=experiment_id,
        title=experiment.title,
        hardware_class=runner.hardware_class,
        seeds=list(range(1, count + 1)),
        runs_new=sum(item.new for item in added),
        runs_shared=sum(not item.new for item in added),
        seconds=None if cost.seconds is None else cost.seconds * training,
        memory_bytes=cost.memory_bytes,
        micro_batch_size=cost.micro_batch_size,
        notes=_notes(lab, experiment, runner),
    )


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
    trained = [run for run in trained_runs(lab.store, experiment_id) if run.code == code_hash()]
    runner = target_runner(lab)
    if experiment.status != "concluded" or not trained or runner is None:
        raise RefusedError(
            f"experiment {experiment_id} is {experiment.status} with {len(trained)} trained models of today's moe/; to "
            "take them apart it must be concluded and have some"
        )

    added, anew = [], 0
    for run in trained:
        config, needs = Config.model_validate(run.config), run
        values = _values("ablate", config, run.hardware_class, run.seed)
        if not has_weights(lab.store, run.id) and not has_run(lab.store, values):
            training = _values("train", config, run.hardware_class, run.seed)
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


def _notes(lab: Lab, experiment: Experiment, runner: Runner) -> list[str]:
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
        notes.append(f"refitted to micro-batches of {ours.micro_batch_size} sequences; the gradients are the same")

    larger = max(baseline, treatment, key=disk_bytes)
    return [*notes, *filter(None, [disk_note(lab, larger)])]


def _values(kind: RunKind, config: Config, hardware_class: str, seed: int) -> dict[str, object]:
    done = after_training(config) if kind == "post" else {}
    return {
        "kind": kind,
        "fingerprint": fingerprint(kind, config, hardware_class, **done),
        "seed": seed,
        "hardware_class": hardware_class,
        "code": code_hash(),
        "config": config.model_dump(),
        "baseline": None,
        "steps": config.steps if kind == "train" else None,
    }


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
