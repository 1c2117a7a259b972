"""A lab that grows: what is asked all the time costs no more, the counts stay exact, an old lab is brought along."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlite_utils import Database

from benchmarks.lab_size import build
from db.clock import now
from db.comparisons import scored_pairs
from db.experiments import (
    add_verdict,
    experiments_to_judge,
    final_verdicts,
    latest_verdict,
    list_experiments,
    mark_judged,
    move_experiment,
    moves_judged,
)
from db.interactions import open_interaction
from db.lab import Lab
from db.migrations import MIGRATIONS
from db.notebook.pages import read_front
from db.order import head_of_line, place_of
from db.queries import flops_per_second, overview, running_runs, tally
from db.queue import Outcome, Point, claim_run, finish_attempt, ingest
from db.runners import get_runner
from db.store import Store, to_column
from server.tools.status import status

if TYPE_CHECKING:
    from tests.db.conftest import Filled

SMALL, LARGE = 150, 900


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Lab]]:
    folder = tmp_path_factory.mktemp("labs")
    for n in (SMALL, LARGE):
        build(folder / str(n), n, metric_rows=20)

    labs = {n: Lab(folder / str(n)) for n in (SMALL, LARGE)}
    yield labs
    for lab in labs.values():
        lab.close()


def claim_and_ingest(lab: Lab, _: int) -> None:
    claim = claim_run(lab.store, get_runner(lab.store, 1), now(), lease_seconds=30.0)
    assert claim is not None
    point = Point(step=1, tokens=1, seconds=1.0, values={"train_loss": 2.0})
    ingest(lab.store, claim.attempt, [point], 1, now(), lease_seconds=30.0)
    finish_attempt(lab.store, claim.attempt, Outcome(status="completed", score={}), max_failures=1)


ASKED: dict[str, Callable[[Lab, int], object]] = {
    "status of the lab": lambda lab, n: status(lab),
    "status of an experiment": lambda lab, n: status(lab, experiment_id=n // 2),
    "status of a run": lambda lab, n: status(lab, run_id=n // 4 * 3),
    "front page": lambda lab, n: read_front(lab.store.path),
    "next in line": lambda lab, n: head_of_line(lab.store, "cpu"),
    "what runs": lambda lab, n: running_runs(lab.store),
    "experiments to judge": lambda lab, n: experiments_to_judge(lab.store),
    "experiments approved": lambda lab, n: list_experiments(lab.store, status="approved"),
    "latest verdict": lambda lab, n: latest_verdict(lab.store, 1),
    "verdicts of the optimizer": lambda lab, n: final_verdicts(lab.store, limit=20),
    "verdicts that insights rest on": lambda lab, n: moves_judged(lab.store, limit=20),
    "speed of the hardware": lambda lab, n: flops_per_second(lab.store, "cpu"),
    "claim, ingest and finish": claim_and_ingest,
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_all_the_time_does_not_grow(
    labs: dict[int, Lab], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts steps of SQLite's virtual machine, which are the same on any machine, however busy."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    opened = Store.__init__

    def watched(store: Store, *arguments: Any, **options: Any) -> None:
        opened(store, *arguments, **options)
        store.database.conn.set_progress_handler(count, 10)

    monkeypatch.setattr(Store, "__init__", watched)
    taken = []
    for n, lab in labs.items():
        lab.close()
        ASKED[name](lab, n)
        before = steps
        ASKED[name](lab, n)
        taken.append(steps - before)

    assert taken[1] <= 1.25 * taken[0] + 20, f"{taken[0]} steps became {taken[1]}"


def test_place_of_a_run_is_read_from_the_index_alone(labs: dict[int, Lab]) -> None:
    store = labs[LARGE].store
    last = store.value("SELECT run_id FROM queue_order ORDER BY position DESC LIMIT 1")
    place = place_of(store, last)
    assert place is not None
    assert place.position == store.value("SELECT count(*) FROM queue_order")


def counted(store: Store) -> dict[str, dict[str, int]]:
    """What the tallies say, counted."""
    queries = {
        "experiments": "SELECT status AS word, count(*) AS n FROM experiments GROUP BY 1",
        "runs": "SELECT status AS word, count(*) AS n FROM runs GROUP BY 1",
        "queued": "SELECT kind AS word, count(*) AS n FROM runs WHERE status = 'queued' GROUP BY 1",
        "verdicts": """
            SELECT verdict AS word, count(*) AS n FROM verdicts
            WHERE id IN (SELECT max(id) FROM verdicts GROUP BY experiment_id) GROUP BY 1
            """,
        "interactions": "SELECT 'all' AS word, count(*) AS n FROM interactions HAVING n > 0",
    }
    return {name: {row["word"]: row["n"] for row in store.rows(query)} for name, query in queries.items()}


def tallied(store: Store) -> dict[str, dict[str, int]]:
    return {name: tally(store, name) for name in ("experiments", "runs", "queued", "verdicts", "interactions")}


def verdict(word: str, *, final: bool, effect: float) -> dict[str, object]:
    """The columns of a verdict."""
    values = {"sentence": "s", "method": "m", "metric": "val_bpb", "pairs": 2, "seeds": [1, 2], "cost_seconds": 1.0}
    return {**values, "verdict": word, "final": final, "effect": effect}


def test_counts_stay_exact(filled: Filled) -> None:
    store, draw, runner = filled.store, random.Random(5), filled.runner()
    with store.transaction():
        experiments = [filled.experiment(draw.choice(["queued", "approved", "rejected"])) for _ in range(20)]
        for number in range(60):
            filled.run(draw.choice(experiments), fingerprint=f"{number % 40}", kind=draw.choice(["train", "probe"]))
            if draw.random() < 0.6 and (claim := claim_run(store, runner, now(), lease_seconds=30.0)):
                outcome = Outcome(status=draw.choice(["completed", "pruned", "failed", "cancelled"]), score={})
                finish_attempt(store, claim.attempt, outcome, max_failures=2)

            if draw.random() < 0.5:
                chosen = draw.choice(experiments)
                word = draw.choice(["improved", "worse", "no evidence yet"])
                add_verdict(store, {**verdict(word, final=True, effect=0.1), "experiment_id": chosen.id})
                open_interaction(store, {"agent": "a", "model": "m", "prompt": "p", "usd": 0.1})
                assert latest_verdict(store, chosen.id) == final_verdicts(store, limit=1)[0][1]

            assert tallied(store) == counted(store)

    assert overview(store).queued == counted(store)["runs"]["queued"]
    assert all(len(words) > 1 for name, words in tallied(store).items() if name != "interactions")


def test_an_old_lab_is_brought_along(tmp_path: Path, filled: Filled) -> None:
    path = tmp_path / "lab" / "lab.db"
    filled.lab.close()
    path.unlink()
    old = Database(path)

    def insert(table: str, row: dict[str, object]) -> None:
        marks = ", ".join("?" for _ in row)
        old.conn.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(map(to_column, row.values())))

    old.conn.execute("PRAGMA journal_mode = WAL")
    MIGRATIONS.apply(old, stop_before="m005_queue_order")
    stamp = "2026-11-01T00:00:00.000Z"
    common = {"created_at": stamp, "updated_at": stamp, "hypothesis": "", "method": "", "domain": "d", "preset": "nano"}
    common |= {"baseline": '{"lr": 1}', "treatment": "{}", "metric": "val_bpb", "proposer": "catalog"}
    for title, state, direction in (("open", "running", "lower"), ("done", "concluded", "higher")):
        insert("experiments", {**common, "title": title, "status": state, "direction": direction})

    runs = [("probe", "completed", 30, None), ("train", "queued", 131, 1), ("train", "queued", -100, 1)]
    runs += [("probe", "queued", 30, None), ("train", "queued", 0, 4), ("train", "failed", 0, None)]
    for number, (kind, state, priority, needs) in enumerate(runs):
        row = {"kind": kind, "status": state, "priority": priority, "needs_run_id": needs, "fingerprint": str(number)}
        row |= {"seed": 1, "hardware_class": "cpu", "code": "c", "config": "{}", "created_at": stamp}
        insert("runs", row | {"passed": 1 if state == "completed" else None})
        insert("experiment_runs", {"experiment_id": 1, "run_id": number + 1, "arm": "treatment"})

    for word, effect in (("no evidence yet", 0.1), ("improved", 0.2)):
        row = verdict(word, final=word == "improved", effect=effect)
        insert("verdicts", row | {"experiment_id": 2, "created_at": stamp})

    insert("interactions", {"agent": "", "model": "", "prompt": "", "status": "sent", "usd": 1, "created_at": stamp})
    old.conn.commit()
    old.close()

    store = filled.lab.store
    assert [(place.run_id, place.priority) for place in head_of_line(store, "cpu")] == [(2, 2), (4, 0), (3, -1)]
    assert head_of_line(store, "cpu")[1].why == "first come, first served"
    assert tallied(store) == counted(store)
    assert store.rows("SELECT id, current, gain FROM verdicts") == [
        {"id": 1, "current": 0, "gain": 0.1},
        {"id": 2, "current": 1, "gain": 0.2},
    ]
    [open_still] = experiments_to_judge(store)
    mark_judged(store, open_still.id)
    assert experiments_to_judge(store) == []
    assert scored_pairs(store, open_still, "val_bpb", same_checkpoint=False) == []
    move_experiment(store, open_still.id, "concluded", allowed=["running"])
    assert tallied(store) == counted(store)
    assert store.value("PRAGMA integrity_check") == "ok"
    assert store.rows("PRAGMA foreign_key_check") == []
