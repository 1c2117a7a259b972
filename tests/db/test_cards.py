"""Energy, disturbances, the day's budget, and the micro-batches that were too large."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from db.budget import reached, usage
from db.cards import GpuSample, add_gpu_sample, experiment_kwh, lab_kwh, note_disturbance, run_kwh
from db.clock import Instant, utc_now
from db.micro_batches import KnownFit, known_fit, note_fit, note_out_of_memory
from db.queries import experiment_seconds
from db.queue import Outcome, claim_run, finish_attempt, get_run
from db.records import Attempt
from db.settings import Runner as RunnerSettings

if TYPE_CHECKING:
    from tests.db.conftest import Filled


def at(seconds: float) -> Instant:
    return Instant(seconds=seconds, boot_id="boot")


def seen(
    watts: float | None = None,
    joules: float | None = None,
    slowdowns: tuple[str, ...] | None = (),
    others: int | None = 0,
) -> GpuSample:
    return GpuSample(
        utilization_percent=100.0,
        memory_bytes=2**30,
        temperature_celsius=60.0,
        power_watts=watts,
        energy_joules=joules,
        slowdowns=slowdowns,
        others=others,
    )


def train(filled: Filled, seed: int = 0) -> Attempt:
    """A live attempt of a new run of a new experiment."""
    filled.run(filled.experiment(), seed)
    claim = claim_run(filled.store, filled.runner(), at(0.0), lease_seconds=30.0)
    assert claim is not None
    return claim.attempt


@pytest.mark.parametrize(
    ("samples", "joules"),
    [
        ([(0.0, seen(60.0)), (10.0, seen(80.0)), (30.0, seen(80.0))], 700.0 + 1600.0),
        ([(0.0, seen(60.0, 5_000.0)), (10.0, seen(80.0, 5_720.0))], 720.0),
        ([(0.0, seen(60.0, 5_000.0)), (10.0, seen(80.0, 20.0))], 700.0),  # the driver was loaded anew
        ([(0.0, seen(60.0)), (10.0, seen(None)), (20.0, seen(60.0))], 1200.0),
        ([(0.0, seen(None)), (10.0, seen(None))], None),
        ([(0.0, seen(60.0))], None),
    ],
    ids=["power", "counter", "counter restarted", "gap", "not measured", "one look"],
)
def test_energy_between_two_looks(filled: Filled, samples: list[tuple[float, GpuSample]], joules: float | None) -> None:
    attempt = train(filled)
    for seconds, sample in samples:
        add_gpu_sample(filled.store, attempt.runner_id, attempt.id, sample, at(seconds))

    expected = None if joules is None else pytest.approx(joules / 3.6e6)
    assert run_kwh(filled.store, attempt.run_id) == expected
    assert experiment_kwh(filled.store, 1) == expected
    assert lab_kwh(filled.store) == lab_kwh(filled.store, utc_now()[:10]) == expected
    assert lab_kwh(filled.store, "2020-01-01") is None


def test_a_card_at_rest_uses_nothing_of_a_run(filled: Filled) -> None:
    attempt = train(filled)
    for seconds in (0.0, 10.0):
        add_gpu_sample(filled.store, attempt.runner_id, None, seen(60.0), at(seconds))

    add_gpu_sample(filled.store, attempt.runner_id, attempt.id, seen(60.0), at(20.0))
    assert lab_kwh(filled.store) is None


def test_what_disturbed_a_run_is_in_its_row(filled: Filled) -> None:
    attempt = train(filled)
    looks = [seen(), seen(slowdowns=("power brake",)), seen(slowdowns=("power brake", "thermal slowdown")), seen()]
    for number, look in enumerate(looks):
        add_gpu_sample(filled.store, attempt.runner_id, attempt.id, look, at(number))

    add_gpu_sample(filled.store, attempt.runner_id, attempt.id, seen(others=2, slowdowns=None), at(9.0))
    assert get_run(filled.store, attempt.run_id).disturbance == (
        "the card was throttled in 2 of 5 looks (power brake, thermal slowdown); "
        "another process computed on the card in 1 of 5 looks"
    )
    note_disturbance(filled.store, attempt.id, "the card had 1 uncorrectable memory error")
    disturbance = get_run(filled.store, attempt.run_id).disturbance or ""
    assert disturbance.endswith("in 1 of 5 looks; the card had 1 uncorrectable memory error")


def test_undisturbed_run_has_nothing_to_say(filled: Filled) -> None:
    attempt = train(filled)
    add_gpu_sample(filled.store, attempt.runner_id, attempt.id, seen(others=None, slowdowns=None), at(0.0))
    note_disturbance(filled.store, attempt.id)
    assert get_run(filled.store, attempt.run_id).disturbance is None


def test_hours_of_a_day_are_those_since_midnight_utc(filled: Filled) -> None:
    times = [
        ("2026-11-22T22:00:00.000Z", "2026-11-22T23:00:00.000Z"),  # yesterday
        ("2026-11-22T23:00:00.000Z", "2026-11-23T01:00:00.000Z"),  # half of it
        ("2026-11-23T03:00:00.000Z", "2026-11-23T03:30:00.000Z"),
        ("2026-11-23T05:00:00.000Z", None),  # still at it
    ]
    for seed, (started, ended) in enumerate(times):
        attempt = train(filled, seed)
        if ended is not None:
            finish_attempt(filled.store, attempt, Outcome(status="completed", score={}), max_failures=2)

        filled.store.execute(
            "UPDATE attempts SET started_at = ?, ended_at = ? WHERE id = ?", (started, ended, attempt.id)
        )

    assert usage(filled.store, "2026-11-23T07:00:00.000Z").gpu_hours == pytest.approx(1.0 + 0.5 + 2.0)
    assert usage(filled.store, "2026-11-24T01:00:00.000Z").gpu_hours == pytest.approx(1.0)
    filled.store.execute("UPDATE runners SET cards = 2")  # which train each run together
    assert usage(filled.store, "2026-11-24T01:00:00.000Z").gpu_hours == pytest.approx(2.0)
    assert experiment_seconds(filled.store, 1) == pytest.approx(2 * 3600.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        ({"gpu_hours_per_day": 3}, None),
        (
            {"gpu_hours_per_day": 2},
            "the day's 2 GPU-hours are used; goes on at 00:00 UTC, or raise gpu_hours_per_day under [runner]",
        ),
        ({"kwh_per_day": 0.25}, None),
        (
            {"kwh_per_day": 0.2},
            "the day's 0.2 kWh are used; goes on at 00:00 UTC, or raise kwh_per_day under [runner]",
        ),
        (
            {"gpu_hours_per_day": 0, "kwh_per_day": 0},
            "the day's 0 GPU-hours are used; goes on at 00:00 UTC, or raise gpu_hours_per_day under [runner]",
        ),
    ],
)
def test_cap_of_the_day(filled: Filled, settings: dict[str, float], said: str | None) -> None:
    attempt = train(filled)
    day = utc_now()[:10]
    filled.store.execute("UPDATE attempts SET started_at = ?", (f"{day}T00:00:00.000Z",))
    add_gpu_sample(filled.store, attempt.runner_id, attempt.id, seen(100.0), at(0.0))
    add_gpu_sample(filled.store, attempt.runner_id, attempt.id, seen(100.0), at(7200.0))
    assert reached(filled.store, RunnerSettings(**settings), f"{day}T02:00:00.001Z") == said


def test_micro_batches_are_remembered_by_class_and_model(filled: Filled) -> None:
    store = filled.store
    assert known_fit(store, "T4", "model") == KnownFit()
    assert KnownFit().most is None
    assert note_out_of_memory(store, "T4", "model", 24).most == 12
    assert note_out_of_memory(store, "T4", "model", 12).most == 6
    note_fit(store, "T4", "model", 8)
    assert known_fit(store, "T4", "model") == KnownFit(fits=8, fails=12)
    assert known_fit(store, "T4", "model").most == 8  # more than half of what failed, and known to fit
    assert known_fit(store, "T4", "another") == known_fit(store, "V100", "model") == KnownFit()

    note_fit(store, "T4", "model", 12)  # what failed was not the model's fault
    assert known_fit(store, "T4", "model") == KnownFit(fits=12)
    note_out_of_memory(store, "T4", "model", 8)
    assert known_fit(store, "T4", "model") == KnownFit(fails=8)


def test_what_ran_out_of_memory_is_forgotten_after_a_while(filled: Filled) -> None:
    note_out_of_memory(filled.store, "T4", "model", 24)
    filled.store.execute("UPDATE micro_batches SET updated_at = '2026-01-01T00:00:00.000Z'")
    assert known_fit(filled.store, "T4", "model") == KnownFit()
