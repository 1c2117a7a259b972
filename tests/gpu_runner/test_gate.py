"""What stands before a claim: the day's budget, the memory that a run needs, and a card that works."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from agents.preflight import preflight
from db.clock import Instant, now, utc_now
from db.queue import get_run
from db.runners import get_runner, register_runner
from db.settings import GpuOptimization
from gpu_runner.fit import fit_run
from gpu_runner.oom_killer import count_oom_kills
from moe.accounting import peak_memory_bytes
from moe.config import apply
from moe.presets import PRESETS
from tests.gpu_runner.conftest import CARD, SETTINGS

if TYPE_CHECKING:
    from pathlib import Path

    from gpu_runner.daemon import Daemon
    from tests.gpu_runner.conftest import Bench

CONFIG = apply(PRESETS["nano"], {"batch_size": 16, "micro_batch_size": 16, "routing_group": 2})
TRAIN: dict[str, Any] = {"steps": CONFIG.steps, "config": CONFIG.model_dump()}

UNMEASURED = (
    "kwh_per_day is set, but test does not measure its power, so nothing is started; "
    "take it out of [runner], or use gpu_hours_per_day"
)


def act(bench: Bench, text: str) -> None:
    """What children of runs with a real config do."""
    (bench.lab.folder / "act").write_text(text)


def configure(bench: Bench, line: str) -> None:
    """Adds a line to [runner] in the configuration of the tests."""
    (bench.lab.folder / "blueberry.toml").write_text(f"{SETTINGS}{line}\n")


def says(bench: Bench) -> str:
    return str(bench.store.value("SELECT message FROM runners"))


def sizes(bench: Bench, run_id: int) -> list[tuple[str, int | None]]:
    return [(attempt.status, attempt.micro_batch_size) for attempt in bench.attempts(run_id)]


def finish(bench: Bench, daemon: Daemon, run_id: int, status: str = "completed") -> None:
    bench.step_until(daemon, lambda: bench.run(run_id).status == status, f"run {run_id} {status}")


def later(seconds: float) -> Instant:
    at = now()
    return Instant(seconds=at.seconds + seconds, boot_id=at.boot_id)


def test_a_run_out_of_memory_goes_on_with_less_which_is_remembered(bench: Bench) -> None:
    bench.register()
    key, daemon = bench.enqueue(**TRAIN), bench.daemon()
    act(bench, "fit 4")
    finish(bench, daemon, key)
    assert sizes(bench, key) == [("failed", 16), ("failed", 8), ("completed", 4)]
    assert bench.attempts(key)[0].error == (
        "micro-batches of 16 sequences were too large, 8 are tried: "
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    run = bench.run(key)
    assert (run.failures, run.lost, run.error) == (0, 0, None)
    assert run.config["micro_batch_size"] == 16  # its identity is not changed
    bench.assert_ended_once(key)

    same = bench.enqueue(**TRAIN)
    finish(bench, daemon, same)
    assert sizes(bench, same) == [("completed", 4)]
    events = bench.store.rows("SELECT message FROM events WHERE kind = 'refitted' AND run_id = ?", (same,))
    assert [row["message"] for row in events] == [
        f"run {same} is refitted to the card: micro-batches of 4 sequences instead of 16, the gradients are the same"
    ]
    assert preflight(bench.lab, CONFIG, daemon.runner).micro_batch_size == 4
    assert preflight(bench.lab, apply(CONFIG, {"lr": 0.02}), daemon.runner).micro_batch_size == 4
    assert preflight(bench.lab, apply(CONFIG, {"d_model": 64}), daemon.runner).micro_batch_size == 16


def test_a_run_that_does_not_fit_in_the_smallest_pieces_fails_with_the_numbers(bench: Bench) -> None:
    bench.register()
    key, daemon = bench.enqueue(**TRAIN), bench.daemon()
    act(bench, "fit 1")
    finish(bench, daemon, key, "failed")
    assert [size for _, size in sizes(bench, key)] == [16, 8, 4, 2, None]
    assert "no micro-batch of 64-token sequences fits: the smallest (2, one routing group) needs" in str(
        bench.run(key).error
    )
    assert "; 2 ran out of memory on this card" in str(bench.run(key).error)
    next_key = bench.enqueue(**TRAIN)
    finish(bench, daemon, next_key, "failed")
    assert [size for _, size in sizes(bench, next_key)] == [None]  # it was known before anything was started
    [problem] = preflight(bench.lab, CONFIG, daemon.runner).problems
    assert problem.endswith("; 2 ran out of memory on this card")


def _peak(size: int) -> int:
    return peak_memory_bytes(apply(CONFIG, {"micro_batch_size": size}), "fp32")


@pytest.mark.parametrize(
    ("memory", "in_use", "size", "said"),
    [
        (_peak(16), 0, 16, None),
        (_peak(16) - 1, 0, 8, None),
        (_peak(16), _peak(16) - _peak(4), 4, None),
        (_peak(16), _peak(16) - _peak(2) + 1, None, "waits, because others use"),
        (_peak(2) - 1, 0, None, "no micro-batch of 64-token sequences fits"),
    ],
    ids=["fits", "refitted", "refitted beside others", "waits", "refused"],
)
def test_preflight_at_the_claim(bench: Bench, memory: int, in_use: int, size: int | None, said: str | None) -> None:
    bench.register()
    runner = get_runner(bench.store, 1).model_copy(update={"memory_bytes": memory, "precision": "fp32"})
    run = get_run(bench.store, bench.enqueue(**TRAIN))
    fit = fit_run(bench.store, runner, run, GpuOptimization(memory_safety_margin=1.0), in_use)
    assert fit.micro_batch_size == size
    if said is not None:
        assert said in str(fit.problem or fit.waits)
        assert (fit.waits is not None) == ("waits" in said)

    if fit.waits is not None:  # as soon as so much is free, it fits
        again = fit_run(bench.store, runner, run, GpuOptimization(memory_safety_margin=1.0), fit.in_use_bytes)
        assert again.micro_batch_size == 2


def test_a_run_waits_until_others_leave_it_memory(bench: Bench) -> None:
    card = replace(CARD, memory_bytes=2**50)  # most of which others have, on any machine
    bench.hardware_class = register_runner(bench.store, card.columns()).hardware_class
    sizes = dict.fromkeys(("batch_size", "micro_batch_size", "routing_group"), 1024)
    big = apply(CONFIG, {**sizes, "seq_len": 8192, "d_model": 1024, "budget_tokens": 1024 * 8192})
    key = bench.enqueue(steps=big.steps, config=big.model_dump())
    daemon = bench.daemon(card=card)
    daemon.step(now())
    assert (bench.run(key).status, bench.statuses(key)) == ("queued", ["cancelled"])
    assert "and waits, because others use" in says(bench)
    daemon.step(now())
    daemon.step(later(60.0))
    assert len(bench.attempts(key)) == 1  # and is not claimed again and again


@pytest.mark.parametrize(
    ("cap", "reason"),
    [
        (
            "gpu_hours_per_day = 0.0003",
            "the day's 0.0003 GPU-hours are used; goes on at 00:00 UTC, or raise gpu_hours_per_day under [runner]",
        ),
        ("kwh_per_day = 0.1", UNMEASURED),
    ],
)
def test_what_trains_is_put_back_when_the_days_budget_is_used(bench: Bench, cap: str, reason: str) -> None:
    bench.register()
    key, daemon = bench.enqueue("linger"), bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).step, "training")
    configure(bench, cap)
    daemon.lab.reload()
    bench.step_until(daemon, lambda: bench.statuses(key) == ["cancelled"], "the end of the attempt")
    assert bench.attempts(key)[0].error == reason
    assert says(bench) == f"training on the CPU; {reason}"
    daemon.step(now())
    assert len(bench.attempts(key)) == 1

    configure(bench, "")
    daemon.lab.reload()
    finish(bench, daemon, key)
    assert says(bench) == "training on the CPU"
    assert (bench.run(key).failures, bench.run(key).lost) == (0, 0)


def test_a_new_day_has_a_budget_of_its_own(bench: Bench) -> None:
    bench.register()
    first, daemon = bench.enqueue(), bench.daemon()
    finish(bench, daemon, first)
    today, times = (
        utc_now()[:10],
        "UPDATE attempts SET started_at = ? || 'T00:00:00.000Z', ended_at = ? || 'T23:59:59Z'",
    )
    bench.store.execute(times, (today, today))
    configure(bench, "gpu_hours_per_day = 0.0003")
    daemon.lab.reload()
    bench.step_until(daemon, lambda: "GPU-hours are used" in says(bench), "the day's end")
    second = bench.enqueue()
    daemon.step(now())
    assert bench.attempts(second) == []
    bench.store.execute(times, ("2026-01-01", "2026-01-01"))
    bench.step_until(daemon, lambda: bench.attempts(second), "the next day's run")


def test_a_card_that_fails_run_after_run_is_left_alone_for_longer_and_longer(bench: Bench) -> None:
    bench.register()
    keys = [bench.enqueue("no card"), bench.enqueue("no card")]
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: "lost" in bench.statuses(keys[0]), "a first failure")
    assert "the card failed 1 time, device is cuda, but torch sees no CUDA device here" in says(bench)
    daemon.step(later(4.0))
    assert len(bench.attempts(keys[0])) == 1
    daemon.step(later(6.0))
    assert len(bench.attempts(keys[0])) == 2
    bench.step_until(daemon, lambda: bench.statuses(keys[0]) == ["lost", "lost"], "a second failure")
    daemon.step(later(9.0))
    assert [len(bench.attempts(key)) for key in keys] == [2, 0]
    assert (bench.run(keys[0]).status, bench.run(keys[0]).failures) == ("queued", 0)


def test_kernels_counters_tell_an_out_of_memory_kill(tmp_path: Path) -> None:
    group, machine, missing = tmp_path / "memory.events", tmp_path / "vmstat", tmp_path / "missing"
    group.write_text("low 0\nhigh 7\noom 3\noom_kill 2\noom_group_kill 1\n")
    machine.write_text("nr_free_pages 9\noom_kill 5\n")
    counters = ((group, "oom_kill"), (machine, "oom_kill"), (missing, "oom_kill"))
    assert count_oom_kills(counters) == 7
    machine.write_text("oom_kill of another kind\n")
    assert count_oom_kills(counters) == 2
    assert count_oom_kills() >= 0
