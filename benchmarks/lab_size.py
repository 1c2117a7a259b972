"""How the answers of a lab slow down as it grows: status, the front page, a claim, an ingest, at several sizes.

.venv/bin/python -m benchmarks.lab_size [--experiments 1000 10000 100000] [--keep FOLDER]

Each lab has 3 runs and 500 metric rows an experiment, a third of the runs queued; the largest takes some minutes to
build and 3 GB of disk, in a temporary folder. Rows are made in bulk; everything that is timed is the real function.
Times are medians of processor time on a warm file, which other work disturbs least. The last column is the exponent of
growth between the smallest and the largest lab: 0 does not grow, 1 grows with the lab.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agents.analyst import learn
from db.clock import now
from db.comparisons import scored_pairs
from db.experiments import experiments_to_judge, get_experiment, list_experiments, search_experiments
from db.health import check_lab
from db.lab import Lab
from db.notebook.pages import read_experiment, read_front, read_run
from db.queries import flops_per_second
from db.queue import Point, claim_run, ingest, live_attempts
from db.runners import get_runner
from db.store import to_column
from moe.presets import PRESETS
from server.tools.status import status

RUNS = 3
METRIC_ROWS = 500
LEASE = 30.0
_GROUP = 500
"""Experiments that share one baseline."""

_SERIES = "WITH RECURSIVE series (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM series WHERE i < :n) "

_EXPERIMENTS = """
INSERT INTO experiments (id, title, hypothesis, method, domain, preset, baseline, treatment, metric, direction,
                         proposer, status, seeds, judged_runs, hardware_class, created_at, updated_at)
SELECT i, 'Experiment ' || i || ' on ' || (i % 40), 'Changing knob ' || (i % 40) || ' lowers val_bpb because of it',
       'Train both sides with two seeds', 'optimization', 'micro',
       json_set(:baseline, '$.lr', 0.001 + (i / :group) * 0.000001),
       json_object('knob' || (i % 40), 0.001 * i), 'val_bpb', 'lower', 'optimizer',
       CASE WHEN i * 100 / :n < 55 THEN 'concluded' WHEN i * 100 / :n < 57 THEN 'failed'
            WHEN i * 100 / :n < 62 THEN 'superseded' WHEN i = :n * 62 / 100 + 1 THEN 'running'
            WHEN i * 100 / :n < 96 THEN 'queued' ELSE 'suggested' END,
       2, CASE WHEN i * 100 / :n < 57 THEN 5 ELSE 2 END, 'cpu', '2026-11-01T00:00:00.000Z', '2026-11-01T00:00:00.000Z'
FROM series
"""

_RUNS = """
INSERT INTO runs (kind, fingerprint, seed, hardware_class, code, config, needs_run_id, priority, status, step, steps,
                  tokens, seconds, train_loss, val_bpb, score, passed, created_at, started_at, ended_at)
SELECT kind, name || i, seed, 'cpu', 'code', :baseline, CASE WHEN name = 't' THEN (i - 1) * 3 + 1 END,
       CASE kind WHEN 'probe' THEN 30 ELSE 0 END,
       CASE WHEN i * 100 / :n < 62 THEN 'completed' WHEN i = :n * 62 / 100 + 1 THEN 'running' ELSE 'queued' END,
       200, 200, 100000, 50.0, 3.0, 2.0 + (i % 97) * 0.001,
       CASE WHEN i * 100 / :n < 62 THEN json_object('val_bpb', 2.0 + (i % 97) * 0.001, 'flops', 1e12, 'train_seconds',
                                                                50) END,
       CASE WHEN i * 100 / :n < 62 THEN 1 END,
       '2026-11-01T00:00:00.000Z', '2026-11-01T00:00:00.000Z', '2026-11-01T00:01:00.000Z'
FROM series, (SELECT 'probe' AS kind, 'p' AS name, 0 AS seed UNION ALL SELECT 'train', 't', 1
              UNION ALL SELECT 'train', 't', 2) ORDER BY i, seed
"""

_BASELINES = """
INSERT INTO runs (kind, fingerprint, seed, hardware_class, code, config, status, steps, score, passed, created_at)
SELECT 'train', 'b' || ((i + 1) / 2), 1 + i % 2, 'cpu', 'code', :baseline, 'completed', 200,
       json_object('val_bpb', 2.05, 'flops', 1e12, 'train_seconds', 50), 1, '2026-11-01T00:00:00.000Z' FROM series
"""

_REST = """
INSERT INTO experiment_runs SELECT i, (i - 1) * 3 + 1, 'probe' FROM series;

INSERT INTO experiment_runs SELECT i, (i - 1) * 3 + 2, 'treatment' FROM series;

INSERT INTO experiment_runs SELECT i, i * 3, 'treatment' FROM series;

INSERT INTO experiment_runs SELECT i, id, 'baseline' FROM series CROSS JOIN runs
    ON runs.kind = 'train' AND runs.fingerprint = 'b' || (1 + i / :group) AND runs.seed IN (1, 2);

INSERT INTO attempts (run_id, runner_id, token, status, directory, boot_id, lease_until, started_at, heartbeat_at,
                      ended_at)
SELECT id, 1, 1, CASE status WHEN 'running' THEN 'live' ELSE 'completed' END, id || '-1', 'boot', 0.0,
       '2026-11-01T00:00:00.000Z', '2026-11-01T00:00:00.000Z',
       CASE status WHEN 'completed' THEN '2026-11-01T00:01:00.000Z' END
FROM runs WHERE status != 'queued';

INSERT INTO reviews (experiment_id, reviewer, novelty, feasibility, impact, clarity, efficiency, score, decision,
                     feedback, success_probability, facts, created_at)
SELECT i, 'rubric', 7, 7, 7, 7, 7, 7, 'approve', 'clear', 0.1 + (i % 8) * 0.1, '{}', '2026-11-01T00:00:00.000Z'
FROM series;

INSERT INTO verdicts (experiment_id, verdict, final, sentence, method, metric, pairs, seeds, effect, low, high,
                      cost_seconds, created_at)
SELECT experiments.id, CASE experiments.id % 3 WHEN 0 THEN 'improved' WHEN 1 THEN 'worse' ELSE 'equivalent' END, look,
       'what it says', 'm', 'val_bpb', 2, '[1, 2]', (experiments.id % 97) * 0.001, -0.01, 0.1, 300.0,
       '2026-11-01T00:00:00.000Z'
FROM experiments, (SELECT 0 AS look UNION ALL SELECT 1) WHERE status = 'concluded' ORDER BY experiments.id, look;

INSERT INTO interactions (experiment_id, agent, model, prompt, status, usd, created_at)
SELECT i, 'suggester', 'm', 'a prompt', 'answered', 0.001,
       CASE WHEN i % 100 = 0 THEN :today ELSE '2026-11-01T00:00:00.000Z' END FROM series;

INSERT INTO events (at, kind, message, experiment_id)
SELECT '2026-11-01T00:00:00.000Z', 'queued', 'queued', i FROM series;

INSERT INTO events (at, kind, message, run_id)
SELECT '2026-11-01T00:00:00.000Z', 'ended', 'ended', id FROM runs WHERE status = 'completed';

INSERT INTO insights (knob, direction, preset, metric, statement, verdict, verdict_count, created_at, updated_at)
SELECT 'knob' || (i % 40), CASE i % 2 WHEN 0 THEN 'up' ELSE 'down' END || i, 'micro', 'val_bpb', 'what was learned',
       'improved', i, '2026-11-01T00:00:00.000Z', '2026-11-01T00:00:00.000Z' FROM series WHERE i <= 80;

UPDATE runs SET ticket = id, turn = id + 64 + id % 97, gains = 0.25, expected_seconds = 60.0,
                ready = needs_run_id IS NULL
WHERE status = 'queued';

INSERT INTO metric_names (name) VALUES ('train_loss'), ('val_bpb')
"""


def build(folder: Path, n: int, *, metric_rows: int = METRIC_ROWS) -> None:
    """Makes a lab of `n` experiments in `folder`, with about so many metric rows an experiment."""
    lab = Lab(folder)
    store = lab.store
    store.execute("PRAGMA synchronous = OFF")
    store.execute("PRAGMA cache_size = -500000")
    stamp = "2026-11-01T00:00:00.000Z"
    values = {
        "n": n,
        "group": _GROUP,
        "baseline": to_column(PRESETS["micro"].model_dump()),
        "today": time.strftime("%Y-%m-%dT00:00:00.000Z", time.gmtime()),
    }
    with store.transaction():
        runner = {"hostname": "host", "device": "cpu", "device_name": "CPU", "device_key": "cpu", "precision": "fp32"}
        runner |= {"torch": "2", "hardware_class": "cpu", "status": "registered", "started_at": stamp}
        store.insert("runners", {**runner, "memory_bytes": 2**30, "threads": 2, "heartbeat_at": stamp})
        for statement in (_EXPERIMENTS, _RUNS):
            store.execute(_insert(statement), values)

        store.execute(_insert(_BASELINES), values | {"n": 2 * (n // _GROUP + 1) + 1})
        for statement in _REST.split(";\n\n"):
            store.execute(_insert(statement), values)

    trained = store.rows(
        "SELECT attempts.id FROM attempts JOIN runs ON runs.id = run_id WHERE kind = 'train' ORDER BY 1"
    )
    steps = metric_rows * n // (2 * len(trained))
    for start in range(0, len(trained), 1000):
        chunk = trained[start : start + 1000]
        rows = [
            (row["id"], name, step, 2.0 + 1.0 / step)
            for row in chunk
            for name in (1, 2)
            for step in range(1, steps + 1)
        ]
        with store.transaction():
            store.execute_many("INSERT INTO metrics VALUES (?, ?, ?, ?)", rows)

    lab.close()


def _insert(statement: str) -> str:
    head, _, tail = statement.strip().partition("SELECT")
    return f"{head}{_SERIES}SELECT{tail}" if "series" in tail else statement


def measure(folder: Path, n: int) -> Iterator[tuple[str, float]]:
    """Milliseconds of each answer, by name."""
    lab = Lab(folder)
    store, path = lab.store, folder / "lab.db"
    yield "status of the lab", _time(lambda: status(lab))
    yield "status of an experiment", _time(lambda: status(lab, experiment_id=n // 2))
    yield "status of a run", _time(lambda: status(lab, run_id=n // 4 * RUNS))
    yield "status of a queued run", _time(lambda: status(lab, run_id=n * 9 // 10 * RUNS))
    yield "notebook, front page", _time(lambda: read_front(path))
    yield "notebook, an experiment", _time(lambda: read_experiment(path, n // 2))
    yield "notebook, a run", _time(lambda: read_run(path, n // 4 * RUNS))
    yield "experiments to judge", _time(lambda: experiments_to_judge(store))
    yield "experiments approved (none is)", _time(lambda: list_experiments(store, status="approved"))
    yield "search of 12 words", _time(lambda: search_experiments(store, _WORDS))
    yield (
        "pairs of a noise floor",
        _time(lambda: scored_pairs(store, get_experiment(store, n // 2), "val_bpb", same_checkpoint=False)),
    )
    yield "insights, nothing new", _time(lambda: learn(lab))
    yield "speed of the hardware", _time(lambda: flops_per_second(store, "cpu"))
    runner = get_runner(store, 1)
    yield "claim_run", _time(lambda: claim_run(store, runner, now(), lease_seconds=LEASE))
    attempt = live_attempts(store)[-1]
    steps = itertools.count()

    def ingest_hundred() -> None:
        points = [
            Point(step=step, tokens=step, seconds=1.0, values={"train_loss": 2.0})
            for step in itertools.islice(steps, 100)
        ]
        ingest(store, attempt, points, 0, now(), lease_seconds=LEASE)

    yield "ingest of 100 rows", _time(ingest_hundred)
    lab.close()


_WORDS = "changing knob 17 lowers val_bpb because experiment train both sides with seeds"


def _time(call: Callable[[], object], *, seconds: float = 2.0) -> float:
    call()
    taken: list[float] = []
    while sum(taken) < seconds and len(taken) < 50:
        before = time.process_time()
        call()
        taken.append(time.process_time() - before)

    return 1000.0 * statistics.median(taken)


def main() -> None:
    """Builds the labs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--keep", type=Path, help="build here, use what is there already, and delete nothing")
    options = parser.parse_args()
    sizes = sorted(options.experiments)
    table: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="blueberry-labs-") as temporary:
        for n in sizes:
            folder = (options.keep or Path(temporary)) / str(n)
            before = time.perf_counter()
            if not (folder / "lab.db").exists():
                build(folder, n)
                print(f"{n} experiments built in {time.perf_counter() - before:.0f} s", flush=True)

            before = time.perf_counter()
            Lab(folder).store.close()
            print(
                f"{n}: opened in {time.perf_counter() - before:.2f} s, {(folder / 'lab.db').stat().st_size >> 20} MiB"
            )
            for name, taken in measure(folder, n):
                table.setdefault(name, []).append(taken)
                print(f"    {name}: {taken:.2f} ms", flush=True)

            before = time.perf_counter()
            worst = [check for check in check_lab(folder) if check.level != "ok"]
            table.setdefault("doctor", []).append(1000.0 * (time.perf_counter() - before))
            print(f"    doctor {table['doctor'][-1]:.0f} ms, {[check.says for check in worst]}", flush=True)

    print(f"\n| ms, median | {' | '.join(f'{n:,}' for n in sizes)} | growth |\n|---|{'---|' * (len(sizes) + 1)}")
    for name, row in table.items():
        growth = math.log(row[-1] / row[0]) / math.log(sizes[-1] / sizes[0]) if len(sizes) > 1 else math.nan
        print(f"| {name} | {' | '.join(f'{taken:,.2f}' for taken in row)} | n^{growth:.2f} |")


if __name__ == "__main__":
    main()
