"""Hypotheses: what was registered to be confirmed, in which order, at which level, on which seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from db.clock import utc_now
from db.events import add_event
from db.records import Claim, Hypothesis
from db.store import Store, to_column


def get_hypothesis(store: Store, experiment_id: int) -> Hypothesis | None:
    """What was registered of an experiment; None while it is only being screened."""
    row = store.row("SELECT * FROM hypotheses WHERE experiment_id = ?", (experiment_id,))
    return Hypothesis.of(row) if row else None


def list_hypotheses(store: Store, campaign: str | None = None) -> list[Hypothesis]:
    """The hypotheses of a campaign, or of the lab's whole life, in the order of their registration."""
    rows = store.rows(
        "SELECT * FROM hypotheses WHERE :campaign IS NULL OR campaign = :campaign ORDER BY id", {"campaign": campaign}
    )
    return [Hypothesis.of(row) for row in rows]


def open_hypotheses(store: Store) -> set[int]:
    """Ids of those that are being confirmed: neither claimed nor given up."""
    rows = store.rows(
        """
        SELECT hypotheses.id FROM experiments JOIN hypotheses ON hypotheses.experiment_id = experiments.id
        WHERE experiments.status IN ('queued', 'running') AND hypotheses.claim IS NULL
        """
    )
    return {row["id"] for row in rows}


def add_hypothesis(store: Store, values: dict[str, Any]) -> Hypothesis:
    """Registers one; `values` are its columns without id, evidence and times."""
    stamp = utc_now()
    key = store.insert("hypotheses", {**values, "registered_at": stamp, "updated_at": stamp})
    count = store.value("SELECT count(*) FROM hypotheses WHERE campaign = ?", (values["campaign"],))
    message = f"registered as hypothesis {count} of campaign {values['campaign']}, to be confirmed on new pairs"
    add_event(store, "registered", message, experiment_id=values["experiment_id"])
    return Hypothesis.of(store.rows("SELECT * FROM hypotheses WHERE id = ?", (key,))[0])


def extend_hypothesis(store: Store, hypothesis: Hypothesis, *, seeds: Sequence[int], max_pairs: int) -> Hypothesis:
    """Notes the seeds drawn so far, all of them, and how many pairs there may be."""
    store.execute(
        "UPDATE hypotheses SET seeds = ?, max_pairs = ?, updated_at = ? WHERE id = ?",
        (to_column(list(seeds)), max_pairs, utc_now(), hypothesis.id),
    )
    return Hypothesis.of(store.rows("SELECT * FROM hypotheses WHERE id = ?", (hypothesis.id,))[0])


def fix_noise(
    store: Store, hypothesis: Hypothesis, *, noise: tuple[float, float] | None, guard: tuple[float, float] | None
) -> Hypothesis:
    """Notes the noise, deviation and degrees of freedom, that the metric and its guard are weighed against for good."""
    store.execute(
        "UPDATE hypotheses SET noise_sd = ?, noise_df = ?, guard_sd = ?, guard_df = ?, updated_at = ? WHERE id = ?",
        (*(noise or (None, None)), *(guard or (None, None)), utc_now(), hypothesis.id),
    )
    return Hypothesis.of(store.rows("SELECT * FROM hypotheses WHERE id = ?", (hypothesis.id,))[0])


def note_evidence(store: Store, hypothesis: Hypothesis, values: Mapping[Claim, float]) -> None:
    """Writes the e-values that all pairs so far come to. Those that a claim rests on stay as they were."""
    store.execute(
        """
        UPDATE hypotheses SET improved = ?, worse = ?, equivalent = ?, updated_at = ?
        WHERE id = ? AND claim IS NULL
        """,
        (values["improved"], values["worse"], values["equivalent"], utc_now(), hypothesis.id),
    )


def note_claim(
    store: Store, hypothesis: Hypothesis, *, claim: Claim | None = None, lab_claim: Claim | None = None
) -> None:
    """Writes that something may be claimed, of the campaign or of the lab's life. The first claim stays."""
    store.execute(
        """
        UPDATE hypotheses SET claim = coalesce(claim, ?), lab_claim = coalesce(lab_claim, ?), updated_at = ?
        WHERE id = ?
        """,
        (claim, lab_claim, utc_now(), hypothesis.id),
    )
