"""Learning rates against their closed forms; how batches and sequences grow through a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe.config import Config, ConfigError, apply
from moe.presets import PRESETS
from moe.schedule import Position, batch_at, learning_rate, pieces_at, progress_at

NANO = PRESETS["nano"]
CONFIG = apply(NANO, {"lr": 0.01, "min_lr_ratio": 0.1, "warmup_fraction": 0.2})


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("cosine", 0.0, 0.0),
        ("cosine", 0.05, 0.0025),
        ("cosine", 0.2, 0.01),
        ("cosine", 0.4, 0.001 + 0.009 * (1 + math.cos(math.pi / 4)) / 2),
        ("cosine", 0.6, 0.0055),
        ("cosine", 1.0, 0.001),
        ("cosine", 1.3, 0.001),  # the last step of a budget in seconds may end after it
        ("linear", 0.1, 0.005),
        ("linear", 0.2, 0.01),
        ("linear", 0.6, 0.0055),
        ("linear", 1.0, 0.001),
        ("wsd", 0.1, 0.005),
        ("wsd", 0.2, 0.01),
        ("wsd", 0.7, 0.01),
        ("wsd", 0.85, 0.0055),
        ("wsd", 1.1, 0.001),
    ],
)
def test_learning_rate_warms_up_and_comes_down(schedule: str, progress: float, expected: float) -> None:
    config = apply(CONFIG, {"schedule": schedule, "decay_fraction": 0.3})
    assert learning_rate(config, progress) == pytest.approx(expected)


def test_learning_rate_starts_at_its_peak_without_warm_up() -> None:
    assert learning_rate(apply(CONFIG, {"warmup_fraction": 0.0}), 0.0) == 0.01


def test_progress_counts_sequences_for_tokens_and_follows_the_clock_for_seconds() -> None:
    assert CONFIG.steps == 40
    middles = [progress_at(CONFIG, Position(sequences=8 * step, seconds=1e9)) for step in (0, 19, 39)]
    assert middles == [0.5 / 40, 19.5 / 40, 39.5 / 40]
    timed = apply(CONFIG, {"budget_tokens": None, "budget_seconds": 8.0})
    clock = [progress_at(timed, Position(sequences=99, seconds=seconds)) for seconds in (0.0, 2.0, 8.0)]
    assert clock == [0.0, 0.25, 1.0]
    assert [batch_at(timed, Position(seconds=seconds)) for seconds in (0.0, 7.9, 8.0)] == [8, 8, 0]


def test_batches_double_in_equal_parts_of_the_run() -> None:
    config = apply(NANO, {"batch_size": 16, "batch_doublings": 2, "budget_tokens": 64 * 192})
    sizes = _sizes(config)
    assert sizes == [4] * 16 + [8] * 8 + [16] * 4
    assert (config.steps, config.sequences) == (28, 192)


@pytest.mark.parametrize("changes", [{}, {"batch_doublings": 1}, {"batch_doublings": 3, "batch_size": 64}])
@pytest.mark.parametrize("budget", [64 * 64, 64 * 641 + 13, 64 * 1000])
def test_steps_are_counted_as_training_takes_them(changes: dict[str, Any], budget: int) -> None:
    config = apply(NANO, changes | {"budget_tokens": budget})
    sizes = _sizes(config)
    assert (len(sizes), sum(sizes)) == (config.steps, config.sequences)
    assert budget - sum(sizes) * 64 < config.batch_size * 64


def test_sequences_grow_in_equal_parts_of_the_run() -> None:
    config = apply(NANO, {"length_doublings": 2})
    assert [pieces_at(config, Position(sequences=s)) for s in (0, 106, 107, 213, 214, 319)] == [4, 4, 2, 2, 1, 1]
    timed = apply(config, {"budget_tokens": None, "budget_seconds": 9.0})
    assert [pieces_at(timed, Position(seconds=s)) for s in (0.0, 2.9, 3.1, 6.1, 99.0)] == [4, 4, 2, 1, 1]


@pytest.mark.parametrize("changes", [{"batch_doublings": 4}, {"batch_doublings": 2, "routing_group": 4}])
def test_batches_that_cannot_be_halved_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"batch_doublings=. must leave a whole number of routing groups"):
        apply(NANO, changes)


def test_sequences_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match="length_doublings=4 must cut seq_len=64 into equal pieces of at least 8"):
        apply(NANO, {"length_doublings": 4})


def _sizes(config: Config) -> list[int]:
    sizes: list[int] = []
    while size := batch_at(config, Position(sequences=sum(sizes))):
        sizes.append(size)

    return sizes
