"""The champion of a lab: confirmed gains stack into a new baseline, one at a time, each on top of what was confirmed.

The lineage is a tree for each preset and hardware class. Its root is a baseline that something was compared with; a
confirmed gain makes a child of the config that it was measured against. The champion is the config with the largest
expected gain along its path. A gain that was confirmed against an older config does not count beside it until the
combination is confirmed: interactions are tested, not assumed, so the combination becomes a question of its own.
"""

from __future__ import annotations

from agents.admission import METRIC, NotAdmittedError, admit
from agents.lineage import best_from, is_config, path_of
from agents.pairs import configs_of
from agents.preflight import Base
from agents.proposals import Proposal
from agents.treatments import changes_of, describe
from db.champions import add_champion, combines, list_champions, note_combination, uncrowned
from db.experiments import get_experiment, latest_verdict
from db.lab import Lab
from db.records import Champion, Experiment
from moe.config import Config, ConfigError


def crown(lab: Lab) -> list[Experiment]:
    """Takes new confirmed gains into the lineage; the combinations that are suggested for it, ready for review."""
    asked = []
    with lab.store.transaction():
        for experiment in uncrowned(lab.store):
            added = _add(lab, experiment)
            known = list_champions(lab.store, experiment.preset, experiment.hardware_class)
            path = path_of(known, added)
            best = best_from(known, Config.model_validate(path[0].config))
            if best is not None and added not in path_of(known, best) and best not in path:
                question = _combine(lab, best, experiment)
                asked += [question] if question else []

    return asked


def _add(lab: Lab, experiment: Experiment) -> Champion:
    baseline, treatment = configs_of(experiment)
    hardware_class = experiment.hardware_class or ""
    known = list_champions(lab.store, experiment.preset, hardware_class)
    parent = next((item for item in known if is_config(item, baseline)), None)
    columns = {"preset": experiment.preset, "hardware_class": hardware_class}
    if parent is None:
        root = {"parent_id": None, "experiment_id": None, "config": baseline.model_dump(), "gain": 0.0}
        parent = add_champion(lab.store, columns | root)

    verdict = latest_verdict(lab.store, experiment.id)
    gain = 0.0 if verdict is None else -(verdict.expected if verdict.expected is not None else verdict.effect or 0.0)
    return add_champion(
        lab.store,
        columns
        | {
            "parent_id": parent.id,
            "experiment_id": experiment.id,
            "config": treatment.model_dump(),
            "gain": parent.gain + gain,
        },
    )


def _combine(lab: Lab, champion: Champion, experiment: Experiment) -> Experiment | None:
    if combines(lab.store, champion.id, experiment.id) or champion.experiment_id is None:
        return None

    config = Config.model_validate(champion.config)
    first = get_experiment(lab.store, champion.experiment_id)
    try:
        change = describe(changes_of(config, experiment.treatment))
        proposal = Proposal(
            title=f"Together: {first.title[:80]}, and {experiment.title[:80]}",
            hypothesis=f"{change} lowers val_bpb also on top of the champion, because both gains were confirmed alone; "
            "if they use the same slack, it will be less.",
            method=f"Experiment {experiment.id} was confirmed against an older baseline than the champion's "
            f"(experiment {first.id}). Interactions are tested, not assumed.",
            domain=experiment.domain,
            treatment={name: value for name, value in experiment.treatment.items() if value is not None},
            metric=METRIC,
            source=f"the lab's own lineage: experiments {first.id} and {experiment.id}",
        )
        made = admit(lab, Base(preset=champion.preset, config=config), proposal, proposer="optimizer")
    except (NotAdmittedError, ConfigError):  # the champion has the knob already, or the two exclude each other
        return None

    note_combination(lab.store, made.id, champion_id=champion.id, combined_id=experiment.id)
    return get_experiment(lab.store, made.id)
