"""A card that fails, is shared, throttled or not measured, with the real NVML binding on the fake library: what trains
goes on, the state is said, and the queue is not burnt.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db.cards import run_kwh
from tests.gpu_runner.conftest import fake_card

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench


class FakeCard:
    """A daemon on the fake library, and what that tells it."""

    def __init__(self, bench: Bench, library: Path) -> None:
        self.bench = bench
        self.library = library
        self.path = bench.lab.folder / "state"
        settings = bench.lab.folder / "blueberry.toml"
        settings.write_text(settings.read_text().replace('"cpu"', '"cuda"') + "sample_seconds = 0.05\n")
        bench.hardware_class = "Tesla T4 fp16 torch 2.13.0"

    def set(self, state: str) -> None:
        """What the card is from now on, such as "error 15, count 2"."""
        temporary = self.path.with_suffix(".new")
        temporary.write_text(state.replace(",", "\n") + "\n")
        temporary.replace(self.path)

    def start(self, state: str) -> None:
        """Starts the daemon."""
        self.set(state)
        self.bench.start(variables=fake_card(self.library, self.path))

    def says(self, text: str) -> bool:
        """Whether a runner's message holds this."""
        return any(text in row["message"] for row in self.bench.store.rows("SELECT message FROM runners"))

    def looks(self) -> int:
        """How often it was looked at so far."""
        return int(self.bench.store.value("SELECT count(*) FROM gpu_samples"))


@pytest.fixture
def card(bench: Bench, library: Path) -> FakeCard:
    """A fake card, and no daemon yet."""
    return FakeCard(bench, library)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("error 15", "NVML: GPU is lost; it has fallen off the bus; restart the machine"),
        ("hang 1", "NVML did not answer within 3 s; if it stays so, restart the machine"),
    ],
)
def test_what_trains_goes_on_and_nothing_new_starts_on_a_card_that_cannot_be_read(
    bench: Bench, card: FakeCard, state: str, said: str
) -> None:
    first = bench.enqueue("wait")
    card.start("milliwatts 60000")
    bench.until_training(first)
    card.set(state)
    bench.until(lambda: card.says(said), "a complaint")
    second = bench.enqueue()
    bench.go()
    bench.until_status(first, "completed")
    assert bench.attempts(second) == []
    assert card.says("nothing new is started on it")

    card.set("milliwatts 60000")
    bench.until_status(second, "completed")
    assert not card.says("cannot be read")
    assert len(bench.attempts(second)) == 1
    bench.assert_ended_once(first)


@pytest.mark.parametrize(
    ("state", "reason", "disturbance"),
    [
        ("error 15", "the card was lost: NVML: GPU is lost", None),
        ("ecc 3", "the card had 3 uncorrectable memory errors", "the card had 3 uncorrectable memory errors"),
    ],
)
def test_a_failure_of_the_card_is_none_of_the_run(
    bench: Bench, card: FakeCard, state: str, reason: str, disturbance: str | None
) -> None:
    first, second = bench.enqueue("lose the card"), bench.enqueue()
    card.start("ecc 0")
    bench.until_training(first)
    seen = card.looks()
    bench.until(lambda: card.looks() > seen, "a look")
    card.set(state)
    bench.go()
    bench.until(lambda: bench.statuses(first)[0] == "lost", "the end of the attempt")
    said = "; the run said: AcceleratorError: CUDA error: unspecified launch failure"
    error = bench.attempts(first)[0].error or ""
    assert error.startswith(reason)
    assert error.endswith(said)
    run = bench.run(first)
    assert (run.failures, run.lost, run.disturbance) == (0, 1, disturbance)
    assert bench.attempts(second) == []
    if "error" in state:
        card.set("ecc 0")
        bench.until_status(second, "completed")
        assert bench.statuses(first) == ["lost", "completed"]


def test_a_throttled_card_that_others_use_is_flagged_on_the_run(bench: Bench, card: FakeCard) -> None:
    first = bench.enqueue("wait")
    card.start("milliwatts 60000, reasons 33, pid1 1, used 3000000000")  # process 1 is there, and not the run's
    bench.until_training(first)
    bench.until(lambda: (bench.run(first).disturbance or "").count("looks") == 2, "a flag")
    bench.go()
    bench.until_status(first, "completed")
    disturbance = bench.run(first).disturbance or ""
    assert disturbance.startswith("the card was throttled in ")
    assert "looks (thermal slowdown); another process computed on the card in " in disturbance
    assert disturbance.endswith("; others used 2.8 GiB of the card's memory when it started")
    assert (run_kwh(bench.store, first) or 0.0) > 0.0

    card.set("milliwatts -1, millijoules -1, reasons 5")  # it rests, and is at its power cap, as a T4 always is
    seen = card.looks()
    bench.until(lambda: card.looks() > seen + 1, "a look since then")
    second = bench.enqueue("wait")
    bench.until_status(second, "completed")
    assert bench.run(second).disturbance is None
    assert run_kwh(bench.store, second) is None


def test_the_next_run_waits_until_the_memory_of_the_last_is_free(bench: Bench, card: FakeCard) -> None:
    first = bench.enqueue("wait")
    card.start("used 100000000")
    bench.until_training(first)
    card.set("used 9000000000")
    second = bench.enqueue()
    bench.go()
    bench.until(lambda: card.says("waits until the memory of the last run is free; 8.4 GiB"), "a wait")
    assert (bench.run(first).status, bench.attempts(second)) == ("completed", [])
    card.set("used 100000000")
    bench.until_status(second, "completed")
    assert not card.says("waits until")


def test_a_lost_card_leaves_the_other_at_work(bench: Bench, card: FakeCard) -> None:
    card.start("count 2")
    bench.until(lambda: bench.store.value("SELECT count(*) FROM runners WHERE status = 'running'") == 2, "two cards")
    card.set("count 2, error@0 15")
    bench.until(lambda: card.says("GPU is lost"), "a complaint")
    keys = [bench.enqueue(), bench.enqueue()]
    for key in keys:
        bench.until_status(key, "completed")

    names = bench.store.rows("SELECT DISTINCT device_key FROM attempts JOIN runners ON runners.id = attempts.runner_id")
    assert names == [{"device_key": "GPU-bbbb"}]
