"""The door: what a proposal must pass to become an experiment, and the one place that writes one."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from agents.domains import load_domains
from agents.duplicates import Neighbour, find_duplicate
from agents.hands import target_runner
from agents.pairs import at_equal_flops
from agents.preflight import Base, preflight
from agents.proposals import Proposal
from agents.textsets import metrics_to_judge_by
from agents.treatments import changes_of, describe
from db.errors import RefusedError
from db.experiments import add_experiment
from db.lab import Lab
from db.records import Experiment, Proposer, Value
from moe.config import KNOBS, Config, ConfigError, apply_treatment
from moe.metrics import BENCHMARK, Metric
from moe.post.stages import needs_post
from moe.texts import BENCHMARKS

METRIC = "val_bpb"
"""The primary metric of most experiments, what the catalog is about, and the guard of all others; lower is better."""

GUARD_MARGIN = 0.02
"""Bits per byte of val_bpb that a gain in another metric may cost."""

POST_METRIC = "weight_bytes"
"""The primary metric where a treatment changes what is done to trained weights, unless another is asked for."""


SAME_FLOPS = 0.02
"""Costs that differ by less are the same."""


class NotAdmittedError(RefusedError):
    """A proposal that cannot become an experiment: an unknown domain or knob, over a limit, or asked before."""

    def __init__(self, reason: str, duplicate_of: int | None = None) -> None:
        super().__init__(reason)
        self.duplicate_of = duplicate_of


def admit(
    lab: Lab,
    base: Base,
    proposal: Proposal,
    *,
    proposer: Proposer,
    parent: Experiment | None = None,
    cycle_id: int | None = None,
    ignore: Collection[int] = (),
) -> Experiment:
    """Writes the proposal as an experiment with status suggested. Runs inside the caller's transaction.

    Raises:
        NotAdmittedError: it fails a check; the message says which, and what would pass.
    """
    if parent is not None and proposal.metric is None:
        proposal = proposal.model_copy(update={"metric": parent.metric})

    treatment = check(lab, base, proposal, anew=proposer == "assistant", ignore=ignore)
    metric = metric_of(lab, proposal)
    guarded = metric.name != METRIC
    return add_experiment(
        lab.store,
        {
            "title": proposal.title,
            "hypothesis": proposal.hypothesis,
            "method": proposal.method,
            "domain": proposal.domain,
            "focus_area": proposal.focus_area,
            "preset": base.preset,
            "baseline": base.config.model_dump(),
            "treatment": treatment,
            "metric": metric.name,
            "direction": metric.better,
            "guard_metric": METRIC if guarded else None,
            "guard_margin": GUARD_MARGIN if guarded else None,
            "proposer": proposer,
            "equal_flops": proposal.equal_flops,
            "source": proposal.source,
            "parent_id": parent.id if parent else None,
            "revision": parent.revision + 1 if parent else 0,
            "cycle_id": cycle_id,
        },
    )


def usual_metric(knobs: Iterable[str]) -> str:
    """What the literature on these knobs, and so the catalog, speaks of."""
    return POST_METRIC if any(KNOBS[name].role == "post" for name in knobs) else METRIC


def metric_of_lab(lab: Lab) -> Metric:
    """What new ideas are judged by that name no metric, and leave trained weights as they are.

    Raises:
        NotAdmittedError: as metric_of().
    """
    return _known_metric(lab, lab.settings.metric)


def metric_of(lab: Lab, proposal: Proposal) -> Metric:
    """What the proposal is to be judged by.

    Raises:
        NotAdmittedError: there is no such metric or text set, or none that has a better side and is measured on both.
    """
    usual = usual_metric(proposal.treatment)
    return _known_metric(lab, proposal.metric or (lab.settings.metric if usual == METRIC else usual))


def _known_metric(lab: Lab, name: str) -> Metric:
    usable = metrics_to_judge_by(lab)
    metric = next((metric for metric in usable if metric.name == name), None)
    if metric is None:
        known = ", ".join(item.name for item in usable)
        folder = lab.data_folder / BENCHMARKS
        how = f"; a text set NAME in {folder} adds {BENCHMARK}NAME" if name.startswith(BENCHMARK) else ""
        raise NotAdmittedError(f"{name!r} is no metric to judge by; known: {known}{how}")

    return metric


def check(
    lab: Lab, base: Base, proposal: Proposal, *, anew: bool = False, ignore: Collection[int] = ()
) -> dict[str, Value]:
    """The proposal's treatment with each value in its knob's own type.

    Args:
        anew: whether to ask again what was answered only on other hardware or with another version of moe/. That is
            for whoever wants it: what is generated would be asked all over again after each upgrade.

    Raises:
        NotAdmittedError: it fails a check.
    """
    config = _config(lab, base, proposal)
    if proposal.equal_flops and (problem := _same_flops(base.config, config)):
        raise NotAdmittedError(problem)

    metric = metric_of(lab, proposal).name
    if needs_post(metric, base.config, config) and not (base.config.causal and config.causal):
        raise NotAdmittedError(
            "routing=expert_choice looks at later tokens, so such a model cannot generate, and its trained weights are "
            "not treated or timed; take a causal routing"
        )

    runner = target_runner(lab)
    problems = preflight(lab, config, runner).problems
    if problems:
        raise NotAdmittedError("; ".join(problems))

    treatment: dict[str, Value] = {name: getattr(config, name) for name in proposal.treatment}
    text = f"{proposal.title} {proposal.hypothesis}"
    twin = find_duplicate(
        lab.store,
        base.config,
        treatment,
        text,
        metric=metric,
        equal_flops=proposal.equal_flops,
        hardware_class=None if runner is None else runner.hardware_class,
        anew=anew,
        ignore=ignore,
    )
    if twin:
        raise NotAdmittedError(
            f"asked before: experiment {twin.experiment_id} ({twin.title}) tests "
            f"{describe(changes_of(base.config, twin.treatment))} on the same baseline by {metric}"
            + (f", verdict {twin.verdict}" if twin.verdict else f", {twin.status}")
            + _how_it_goes_on(twin),
            duplicate_of=twin.experiment_id,
        )

    return treatment


def _config(lab: Lab, base: Base, proposal: Proposal) -> Config:
    # All that is wrong is told at once: each answer that names one mistake costs its writer another try.
    domains = load_domains(lab)
    foreign = proposal.domain not in domains
    problem = f"there is no domain {proposal.domain!r}; known: {', '.join(domains)}"
    try:
        config = apply_treatment(base.config, proposal.treatment)
    except ConfigError as error:
        raise NotAdmittedError(f"{problem}; {error}" if foreign else str(error)) from None

    if foreign:
        raise NotAdmittedError(problem)

    return config


def _how_it_goes_on(twin: Neighbour) -> str:
    if twin.status in ("failed", "cancelled"):
        return f"; it has evidence, which goes on with enqueue(experiment_ids=[{twin.experiment_id}])"

    if twin.status == "concluded":
        return f"; enqueue(experiment_ids=[{twin.experiment_id}], confirm=true) gives it more pairs"

    return ""


def _same_flops(baseline: Config, treatment: Config) -> str | None:
    try:
        fewer = at_equal_flops(baseline, treatment).budget_tokens or 0
    except ConfigError as error:
        return str(error)

    if abs(fewer / (baseline.budget_tokens or 1) - 1.0) <= SAME_FLOPS:
        return "equal_flops changes nothing here: the treatment costs the baseline's FLOPs a token; leave it out"

    return None
