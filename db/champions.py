"""Champions: the configs that confirmed gains have led to, each with the one it was compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from db.clock import utc_now
from db.events import add_event
from db.experiments import latest_verdict
from db.records import Champion, Experiment, Verdict
from db.store import Store


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The question whether the gain of one experiment adds to a champion, which `champion_experiment_id` confirmed.

    `verdict` is of both together, `alone` that of the gain by itself.
    """

    experiment: Experiment
    champion_experiment_id: int
    verdict: Verdict | None
    alone: Verdict | None


def list_champions(store: Store, preset: str | None = None, hardware_class: str | None = None) -> list[Champion]:
    """All champions, parents before children; of one preset and hardware class, or of all."""
    rows = store.rows(
        """
        SELECT * FROM champions
        WHERE (:preset IS NULL OR preset = :preset) AND (:class IS NULL OR hardware_class = :class) ORDER BY id
        """,
        {"preset": preset, "class": hardware_class},
    )
    return [Champion.of(row) for row in rows]


def add_champion(store: Store, values: Mapping[str, Any]) -> Champion:
    """Inserts a champion; `values` are its columns without id and time. A root has no experiment behind it."""
    key = store.insert("champions", {**values, "created_at": utc_now()})
    if values.get("experiment_id") is not None:
        message = f"its config is champion {key} of preset {values['preset']}"
        add_event(store, "champion", message, experiment_id=values["experiment_id"])

    return Champion.of(store.rows("SELECT * FROM champions WHERE id = ?", (key,))[0])


def uncrowned(store: Store) -> list[Experiment]:
    """Experiments whose gain in val_bpb at equal tokens was claimed, oldest first, and that are no champions yet."""
    rows = store.rows(
        """
        SELECT experiments.* FROM hypotheses JOIN experiments ON experiments.id = hypotheses.experiment_id
        JOIN current_verdicts ON current_verdicts.experiment_id = experiments.id
        WHERE hypotheses.claim = 'improved' AND current_verdicts.verdict = 'improved' AND current_verdicts.final = 1
          AND experiments.metric = 'val_bpb' AND experiments.equal_flops = 0
          AND NOT EXISTS (SELECT 1 FROM champions WHERE champions.experiment_id = experiments.id)
        ORDER BY hypotheses.id
        """
    )
    return [Experiment.of(row) for row in rows]


def combines(store: Store, champion_id: int, experiment_id: int) -> bool:
    """Whether the gain of an experiment has been proposed on top of a champion already."""
    return bool(
        store.value(
            "SELECT count(*) FROM experiments WHERE on_champion_id = ? AND combines_id = ?",
            (champion_id, experiment_id),
        )
    )


def list_combinations(store: Store) -> list[Combination]:
    """All questions whether a gain adds to a champion, oldest first."""
    rows = store.rows(
        """
        SELECT experiments.*, champions.experiment_id AS champion_experiment_id
        FROM experiments JOIN champions ON champions.id = experiments.on_champion_id ORDER BY experiments.id
        """
    )
    return [
        Combination(
            experiment=Experiment.of(row),
            champion_experiment_id=row["champion_experiment_id"],
            verdict=latest_verdict(store, row["id"]),
            alone=latest_verdict(store, row["combines_id"]),
        )
        for row in rows
    ]


def note_combination(store: Store, experiment_id: int, *, champion_id: int, combined_id: int) -> None:
    """Notes that an experiment asks whether the gain of another one adds to a champion."""
    store.execute(
        "UPDATE experiments SET on_champion_id = ?, combines_id = ? WHERE id = ?",
        (champion_id, combined_id, experiment_id),
    )
