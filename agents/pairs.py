"""The runs behind a comparison: for each seed, both sides; a probe before them, post runs behind them where needed.

Equal fingerprint and seed is the same run, done once and shared. The runs of a confirmation have seeds that nobody else
has, and are scored on the sealed test split: they are never shared.
"""

from __future__ import annotations

from collections.abc import Sequence

from agents.preflight import preflight
from db.errors import RefusedError
from db.experiments import plan_experiment
from db.lab import Lab
from db.queue import Queued, add_run
from db.records import Arm, Experiment, RunKind, Stage
from db.runners import list_runners
from db.weights import free_identity, has_run
from moe.accounting import account
from moe.config import Config, ConfigError, after_training, apply, apply_treatment, scientific
from moe.fingerprint import code_hash, fingerprint
from moe.post.stages import as_trained, needs_post


def configs_of(experiment: Experiment, stage: Stage = "confirm") -> tuple[Config, Config]:
    """The whole configs of both sides as they are trained: baseline, treatment.

    Args:
        stage: a screening may train for a part of the budget, a confirmation never does.

    Raises:
        RefusedError: the stored config is no longer valid with this version of moe/.
    """
    try:
        baseline = shortened(Config.model_validate(experiment.baseline), experiment.share_in(stage))
        treatment = apply_treatment(baseline, experiment.treatment)
        return baseline, at_equal_flops(baseline, treatment) if experiment.equal_flops else treatment
    except (ConfigError, ValueError) as error:
        raise RefusedError(f"experiment {experiment.id} cannot be run: {error}") from None


def shortened(config: Config, share: float) -> Config:
    """The config with a part of its budget: a complete training of its own, since schedules are shares of the budget.

    Raises:
        ConfigError: the part is less than one batch.
    """
    if share == 1.0:
        return config

    if config.budget_tokens is not None:
        return apply(config, {"budget_tokens": round(share * config.budget_tokens)})

    return apply(config, {"budget_seconds": share * (config.budget_seconds or 0.0)})


def at_equal_flops(baseline: Config, treatment: Config) -> Config:
    """The treatment with as many tokens as cost what the baseline costs, to the last whole batch.

    Raises:
        ConfigError: the budget is in seconds, so that both sides get equal time already.
    """
    if baseline.budget_tokens is None:
        raise ConfigError("equal_flops needs a budget in tokens; with budget_seconds both sides get equal time")

    ratio = account(treatment).flops_per_token / account(baseline).flops_per_token
    return apply(treatment, {"budget_tokens": round(baseline.budget_tokens / ratio)})


def trains_nothing(experiment: Experiment) -> bool:
    """Whether both sides are made of the same trained model, so that they differ far less."""
    baseline, treatment = configs_of(experiment)
    return scientific(baseline) == scientific(treatment)


def add_pairs(lab: Lab, experiment: Experiment, seeds: Sequence[int], stage: Stage = "screen") -> list[Queued]:
    """Queues the runs of both sides for every seed; a treatment's training waits for the experiment's probe."""
    store = lab.store
    baseline, treatment = configs_of(experiment)  # a probe looks at the whole config, whatever screening trains of it
    probed = apply(treatment, {"budget_tokens": baseline.budget_tokens})  # equal FLOPs are no knob of the treatment
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
                probed,
                hardware_class,
                post=after_training(treatment),
                baseline=scientific(baseline) | after_training(baseline),
            ),
            "seed": 0,
            "hardware_class": hardware_class,
            "code": code_hash(),
            "config": probed.model_dump(),
            "baseline": baseline.model_dump(),
            "needs_run_id": None,
            "priority": experiment.priority,
        },
    )
    added = {probe.run.id: probe}
    baseline, treatment = configs_of(experiment, stage)
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
            values = run_values("train", as_trained(fitted), hardware_class, seed, stage, experiment.metric_text)
            values |= {"priority": experiment.priority, "needs_run_id": needs, "expected_seconds": cost.seconds}
            after = run_values("post", fitted, hardware_class, seed, stage, experiment.metric_text)
            if posted and not has_run(store, after):
                free_identity(store, values)

            queued = add_run(store, experiment.id, first, values)
            added.setdefault(queued.run.id, queued)
            if posted:
                after |= {"priority": experiment.priority, "needs_run_id": queued.run.id}
                queued = add_run(store, experiment.id, arm, after)
                added.setdefault(queued.run.id, queued)

    if stage == "screen":
        plan_experiment(store, experiment.id, seeds=max(seeds))

    return list(added.values())


def run_values(
    kind: RunKind,
    config: Config,
    hardware_class: str,
    seed: int,
    stage: Stage = "screen",
    metric_text: str | None = None,
) -> dict[str, object]:
    """The columns of a run that trains, or starts from a checkpoint.

    Args:
        metric_text: which text its experiment is judged by, where that is a named set: a run that was scored when the
            set was not there, or another one, is not the same.
    """
    judged = {} if metric_text is None else {"text_set": metric_text}
    sealed = {"split": "test"} if stage == "confirm" else {}
    done = after_training(config) if kind == "post" else {}
    return {
        "kind": kind,
        "fingerprint": fingerprint(kind, config, hardware_class, **done, **sealed, **judged),
        "seed": seed,
        "purpose": stage,
        "hardware_class": hardware_class,
        "code": code_hash(),
        "config": config.model_dump(),
        "baseline": None,
        "steps": config.steps if kind == "train" else None,
    }
