"""The day's budget of device time and energy, from 00:00 to 24:00 UTC: what is used, and whether a cap is reached."""

from __future__ import annotations

from dataclasses import dataclass

from db.cards import lab_kwh
from db.settings import Runner
from db.store import Store


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the lab's attempts have used on one UTC day. kwh is None where nothing measures it."""

    gpu_hours: float
    kwh: float | None


def usage(store: Store, stamp: str) -> Usage:
    """What was used between the midnight before `stamp` (UTC, as utc_now() writes it) and then, on all devices.

    Hours in which an attempt held its device count whole, on a CPU as well; two cards at once count twice, also where
    they train one run together.
    """
    hours = store.value(
        """
        SELECT coalesce(sum(runners.cards * (julianday(min(coalesce(held.ended_at, :now), :now))
                                             - julianday(max(held.started_at, :day)))), 0.0) * 24.0
        FROM (SELECT runner_id, started_at, ended_at FROM attempts WHERE status = 'live'
              UNION ALL
              SELECT runner_id, started_at, ended_at FROM attempts WHERE ended_at >= :day) AS held
        JOIN runners ON runners.id = held.runner_id
        """,
        {"now": stamp, "day": stamp[:10]},
    )
    return Usage(gpu_hours=max(0.0, float(hours)), kwh=lab_kwh(store, stamp[:10]))


def reached(store: Store, settings: Runner, stamp: str) -> str | None:
    """Which cap of the day is reached and how to go on, in words; None while there is something left."""
    if settings.gpu_hours_per_day is None and settings.kwh_per_day is None:
        return None

    used = usage(store, stamp)
    for amount, cap, unit, key in (
        (used.gpu_hours, settings.gpu_hours_per_day, "GPU-hours", "gpu_hours_per_day"),
        (used.kwh or 0.0, settings.kwh_per_day, "kWh", "kwh_per_day"),
    ):
        if cap is not None and amount >= cap:
            return f"the day's {cap:g} {unit} are used; goes on at 00:00 UTC, or raise {key} under [runner]"

    return None
