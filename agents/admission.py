"""The door: what a proposal must pass to become an experiment, and the one place that writes one."""

from __future__ import annotations

from collections.abc import Collection

from agents.domains import load_domains
from agents.duplicates import find_duplicate
from agents.hands import target_runner
from agents.preflight import Base, preflight
from agents.proposals import Proposal
from agents.treatments import changes_of, describe
from db.errors import RefusedError
from db.experiments import add_experiment
from db.lab import Lab
from db.records import Experiment, Proposer, Value
from moe.config import ConfigError, apply_treatment

METRIC = "val_bpb"
"""The primary metric of every experiment today; lower is better."""


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
    treatment = check(lab, base, proposal, ignore=ignore)
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
            "metric": METRIC,
            "direction": "lower",
            "proposer": proposer,
            "source": proposal.source,
            "parent_id": parent.id if parent else None,
            "revision": parent.revision + 1 if parent else 0,
            "cycle_id": cycle_id,
        },
    )


def check(lab: Lab, base: Base, proposal: Proposal, *, ignore: Collection[int] = ()) -> dict[str, Value]:
    """The proposal's treatment with each value in its knob's own type.

    Raises:
        NotAdmittedError: it fails a check.
    """
    domains = load_domains(lab)
    if proposal.domain not in domains:
        raise NotAdmittedError(f"there is no domain {proposal.domain!r}; known: {', '.join(domains)}")

    try:
        config = apply_treatment(base.config, proposal.treatment)
    except ConfigError as error:
        raise NotAdmittedError(str(error)) from None

    problems = preflight(lab, config, target_runner(lab)).problems
    if problems:
        raise NotAdmittedError("; ".join(problems))

    treatment: dict[str, Value] = {name: getattr(config, name) for name in proposal.treatment}
    text = f"{proposal.title} {proposal.hypothesis}"
    twin = find_duplicate(lab.store, base.config, treatment, text, ignore=ignore)
    if twin:
        raise NotAdmittedError(
            f"asked before: experiment {twin.experiment_id} ({twin.title}) tests "
            f"{describe(changes_of(base.config, twin.treatment))} on the same baseline"
            + (f", verdict {twin.verdict}" if twin.verdict else f", {twin.status}"),
            duplicate_of=twin.experiment_id,
        )

    return treatment
