"""Experiments: found by words whatever the words are, moved only where they may go, insights cited row by row."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from db.errors import NotFoundError, RefusedError
from db.events import events_after
from db.experiments import (
    add_verdict,
    experiments_on_knobs,
    final_verdicts,
    get_experiment,
    latest_verdict,
    list_experiments,
    list_insights,
    move_experiment,
    put_insight,
    search_experiments,
)

if TYPE_CHECKING:
    from tests.db.conftest import Filled

HOSTILE = [
    "",
    "   ",
    '"',
    "'; DROP TABLE experiments; --",
    "title:secret",
    "a AND OR NOT (",
    "NEAR(a b, 3)",
    "* ^ + -",
    "\0\x01",
    "ünïcödé 漢字 🫐",
    "x" * 1_000_000,
    "word " * 200_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_any_text_can_be_searched_for_and_stored(filled: Filled, text: str) -> None:
    kept = filled.experiment(title=f"balance {text}", hypothesis=text)
    filled.experiment(title="learning rate")
    started = time.monotonic()
    found = search_experiments(filled.store, f"{text} balance")
    assert time.monotonic() - started < 2.0
    assert kept.id in [experiment.id for experiment in found] or text.count("word") > 40
    assert get_experiment(filled.store, kept.id).hypothesis == text
    assert filled.store.value("SELECT count(*) FROM experiments") == 2


def test_nearest_first_and_changes_are_indexed(filled: Filled) -> None:
    far = filled.experiment(title="warm-up", method="change the router once")
    near = filled.experiment(title="router router", treatment={"router_z_weight": 0.1})
    assert [e.id for e in search_experiments(filled.store, "router")] == [near.id, far.id]
    assert [e.id for e in search_experiments(filled.store, "router_z_weight")] == [near.id]
    assert search_experiments(filled.store, "nothing like it") == []


def test_same_knobs_are_found_without_superseded_ones(filled: Filled) -> None:
    one = filled.experiment(treatment={"top_k": 1, "lr": 0.1})
    filled.experiment(treatment={"lr": 0.3}, status="superseded")
    two = filled.experiment(treatment={"lr": 0.2})
    assert [e.id for e in experiments_on_knobs(filled.store, ["lr"])] == [two.id, one.id]
    assert [e.id for e in experiments_on_knobs(filled.store, ["top_k"])] == [one.id]
    assert experiments_on_knobs(filled.store, []) == []


def test_move_only_from_where_it_is_allowed(filled: Filled) -> None:
    experiment = filled.experiment(status="approved")
    with pytest.raises(RefusedError, match="experiment 1 is approved; only queued or running can become concluded"):
        move_experiment(filled.store, experiment.id, "concluded", allowed=("queued", "running"))

    move_experiment(filled.store, experiment.id, "queued", allowed=["approved"], reason="asked for")
    moved = get_experiment(filled.store, experiment.id)
    assert (moved.status, moved.reason) == ("queued", "asked for")
    assert events_after(filled.store, 0)[-1].message == "More experts: queued (asked for)"


def test_unknown_experiment_names_the_known_ones(filled: Filled) -> None:
    with pytest.raises(NotFoundError, match="there is no experiment 7; the lab is empty; suggest one"):
        get_experiment(filled.store, 7)

    filled.experiment()
    with pytest.raises(NotFoundError, match="there is no experiment 7; ids go from 1 to 1"):
        get_experiment(filled.store, 7)


def test_pages_of_a_list(filled: Filled) -> None:
    ids = [filled.experiment().id for _ in range(5)]
    page = list_experiments(filled.store, limit=2)
    assert [e.id for e in page] == [ids[4], ids[3]]
    assert [e.id for e in list_experiments(filled.store, limit=9, before_id=page[-1].id)] == [ids[2], ids[1], ids[0]]
    assert list_experiments(filled.store, status="failed") == []


def test_insight_is_rewritten_only_when_something_changed(filled: Filled) -> None:
    verdicts = [_verdict(filled, filled.experiment().id) for _ in range(2)]
    insight: dict[str, Any] = {"knob": "lr", "direction": "up", "preset": "nano", "metric": "val_bpb"}
    insight |= {"verdict": "improved", "effect": -0.1}
    assert put_insight(filled.store, **insight, statement="helps", verdict_ids=verdicts[:1]) is True
    assert put_insight(filled.store, **insight, statement="helps", verdict_ids=verdicts[:1]) is False
    assert put_insight(filled.store, **insight, statement="helps", verdict_ids=verdicts) is True
    (kept,) = list_insights(filled.store)
    assert (kept.statement, kept.verdict_count) == ("helps", 2)
    assert filled.store.value("SELECT count(*) FROM insight_verdicts") == 2


def test_newest_verdict_counts(filled: Filled) -> None:
    experiment = filled.experiment()
    _verdict(filled, experiment.id, final=False)
    assert final_verdicts(filled.store) == []
    last = _verdict(filled, experiment.id)
    found = latest_verdict(filled.store, experiment.id)
    assert found is not None
    assert (found.id, found.final, found.seeds) == (last, True, [0, 1])
    assert [(e.id, v.id) for e, v in final_verdicts(filled.store)] == [(experiment.id, last)]


def _verdict(filled: Filled, experiment_id: int, *, final: bool = True) -> int:
    values = {"experiment_id": experiment_id, "verdict": "improved", "final": final, "sentence": "better"}
    values |= {"method": "m", "metric": "val_bpb", "pairs": 2, "seeds": [0, 1], "cost_seconds": 1.0}
    return add_verdict(filled.store, values).id
