"""What the cards measured: samples, the energy that runs used, and what disturbed them.

Energy is added up as samples come in: between two samples of one attempt it is the difference of the card's own counter
where there is one, otherwise the trapezoid under its power. It is null where nothing measures it, as on a CPU; never 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from db.clock import Instant, utc_now
from db.records import JOULES_PER_KWH
from db.store import Store


@dataclass(frozen=True, kw_only=True)
class GpuSample:
    """One look at a card while an attempt trained on it, or none. None where the card does not say.

    `energy_joules` is a counter of which only differences mean something, `slowdowns` why the card was slower than
    meant, `others` how many processes that are not the attempt's computed on it.
    """

    utilization_percent: float | None
    memory_bytes: int | None
    temperature_celsius: float | None
    power_watts: float | None
    energy_joules: float | None
    slowdowns: tuple[str, ...] | None
    others: int | None


def add_gpu_sample(store: Store, runner_id: int, attempt_id: int | None, sample: GpuSample, at: Instant) -> None:
    """Stores one look at the card, and what the attempt has used since the last one."""
    stamp = utc_now()
    with store.transaction():
        joules = None if attempt_id is None else _joules_since_last(store, attempt_id, sample, at)
        store.insert(
            "gpu_samples",
            {
                "runner_id": runner_id,
                "attempt_id": attempt_id,
                "at": stamp,
                "uptime": at.seconds,
                "utilization_percent": sample.utilization_percent,
                "memory_bytes": sample.memory_bytes,
                "temperature_celsius": sample.temperature_celsius,
                "power_watts": sample.power_watts,
                "energy_joules": sample.energy_joules,
                "slowdowns": ", ".join(sample.slowdowns) if sample.slowdowns else None,
                "others": sample.others,
            },
        )
        if joules is not None:
            store.execute("UPDATE attempts SET joules = coalesce(joules, 0.0) + ? WHERE id = ?", (joules, attempt_id))
            store.execute(
                """
                INSERT INTO energy_days (day, runner_id, joules) VALUES (?, ?, ?)
                ON CONFLICT (day, runner_id) DO UPDATE SET joules = joules + excluded.joules
                """,
                (stamp[:10], runner_id, joules),
            )

        if attempt_id is not None and (sample.slowdowns or sample.others):
            note_disturbance(store, attempt_id)


def note_disturbance(store: Store, attempt_id: int, fault: str | None = None) -> None:
    """Writes into the run's row what disturbed it, over all of its attempts, since later ones resume earlier ones.

    Args:
        fault: what else there is to say, such as memory errors of the card.
    """
    with store.transaction():
        run_id = store.value("SELECT run_id FROM attempts WHERE id = ?", (attempt_id,))
        if fault is not None:
            store.execute(
                "UPDATE attempts SET card_fault = coalesce(card_fault || '; ', '') || ? WHERE id = ?",
                (fault, attempt_id),
            )

        rows = store.rows(
            """
            SELECT coalesce(gpu_samples.slowdowns, '') AS slowdowns, coalesce(gpu_samples.others, 0) > 0 AS shared,
                   count(*) AS looks
            FROM attempts JOIN gpu_samples ON gpu_samples.attempt_id = attempts.id
            WHERE attempts.run_id = ? GROUP BY 1, 2
            """,
            (run_id,),
        )
        total = sum(row["looks"] for row in rows)
        slow = sum(row["looks"] for row in rows if row["slowdowns"])
        shared = sum(row["looks"] for row in rows if row["shared"])
        words = sorted({word for row in rows for word in row["slowdowns"].split(", ") if word})
        parts = []
        if slow:
            parts.append(f"the card was throttled in {slow} of {total} looks ({', '.join(words)})")

        if shared:
            parts.append(f"another process computed on the card in {shared} of {total} looks")

        faults = store.rows(
            "SELECT DISTINCT card_fault FROM attempts WHERE run_id = ? AND card_fault IS NOT NULL ORDER BY 1", (run_id,)
        )
        parts += [row["card_fault"] for row in faults]
        store.execute("UPDATE runs SET disturbance = ? WHERE id = ?", ("; ".join(parts) or None, run_id))


def run_kwh(store: Store, run_id: int) -> float | None:
    """What all attempts of a run have used; None where nothing measured it."""
    return _kwh(store.value("SELECT sum(joules) FROM attempts WHERE run_id = ?", (run_id,)))


def experiment_kwh(store: Store, experiment_id: int) -> float | None:
    """What the runs of an experiment have used, shared runs in full; None where nothing measured it."""
    return _kwh(
        store.value(
            """
            SELECT sum(attempts.joules) FROM experiment_runs JOIN attempts ON attempts.run_id = experiment_runs.run_id
            WHERE experiment_runs.experiment_id = ?
            """,
            (experiment_id,),
        )
    )


def lab_kwh(store: Store, day: str | None = None) -> float | None:
    """What the lab's runs have used in all, or on one UTC day such as 2026-11-23; None where nothing measured it."""
    return _kwh(store.value("SELECT sum(joules) FROM energy_days WHERE :day IS NULL OR day = :day", {"day": day}))


def _joules_since_last(store: Store, attempt_id: int, sample: GpuSample, at: Instant) -> float | None:
    last = store.row(
        """
        SELECT uptime, power_watts, energy_joules FROM gpu_samples
        WHERE attempt_id = ? AND uptime <= ? AND (power_watts IS NOT NULL OR energy_joules IS NOT NULL)
        ORDER BY id DESC LIMIT 1
        """,
        (attempt_id, at.seconds),
    )
    if last is None:
        return None

    before, after = last["energy_joules"], sample.energy_joules
    if before is not None and after is not None and after > before:  # it starts again with the driver
        return float(after - before)

    if last["power_watts"] is None or sample.power_watts is None:
        return None

    return float((last["power_watts"] + sample.power_watts) / 2.0 * (at.seconds - last["uptime"]))


def _kwh(joules: float | None) -> float | None:
    return None if joules is None else joules / JOULES_PER_KWH
