"""`blueberry clean`: it shows and asks before it deletes, and never touches what anybody needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from db.clock import now
from db.experiments import move_experiment
from db.lab import Lab
from db.logs import LOG_BYTES, rotate
from db.processes import FileLock
from db.queue import Outcome, claim_run, finish_attempt
from db.records import Arm, Experiment
from db.runners import register_runner
from db.weights import has_weights
from moe.presets import PRESETS
from tests.server.conftest import RUNNER, put_experiment, put_run
from tests.server.test_cli import answer, do

KEPT = ["1-1/checkpoint.pt", "1-1/metrics.jsonl", "2-1/metrics.jsonl", "3-1/.checkpoint.pt.9.tmp"]
GONE = ["2-1/checkpoint.pt", "2-1/resume-000000010.pt", "1-1/.checkpoint.pt.9.tmp", "77-1", "77-1/checkpoint.pt"]


@pytest.fixture
def runs(lab: Lab) -> Path:
    """Of a concluded experiment a baseline (1) and a treatment (2), a run that trains (3), a stranger (77)."""
    over, under_way = put_experiment(lab), put_experiment(lab)
    runner = register_runner(lab.store, RUNNER)
    sides: list[tuple[Experiment, Arm]] = [(over, "baseline"), (over, "treatment"), (under_way, "treatment")]
    for seed, (experiment, arm) in enumerate(sides):
        put_run(lab, experiment.id, seed, arm=arm)
        claim = claim_run(lab.store, runner, now(), lease_seconds=60)
        assert claim is not None
        directory = lab.runs_folder / claim.attempt.directory
        directory.mkdir()
        for name in ("checkpoint.pt", "metrics.jsonl", "resume-000000010.pt", ".checkpoint.pt.9.tmp"):
            (directory / name).write_bytes(b"x" * 1000)

        if experiment is over:
            done = Outcome(status="completed", score={"val_bpb": 1.0})
            finish_attempt(lab.store, claim.attempt, done, max_failures=1)

    move_experiment(lab.store, over.id, "concluded", allowed=["queued", "running", "suggested", "approved"])
    (lab.runs_folder / "77-1").mkdir()
    (lab.runs_folder / "77-1" / "checkpoint.pt").touch()
    return lab.runs_folder


def test_it_shows_and_asks_and_a_no_deletes_nothing(lab: Lab, runs: Path) -> None:
    for result in (do(lab, "clean"), do(lab, "clean", "--json")):
        assert result.exit_code == 0
        assert all((runs / name).exists() for name in KEPT + GONE)

    said = do(lab, "clean").stdout
    assert "run 2: its experiment is over" in said
    assert "runs/77-1" in said
    assert "nothing was deleted" in said


def test_a_yes_deletes_what_nothing_needs_and_no_more(lab: Lab, runs: Path) -> None:
    said = answer(lab, "clean", "--yes")
    assert said["deleted"] == len(said["found"])
    assert sorted({item["kind"] for item in said["found"]}) == ["checkpoint", "orphan", "temporary", "weights"]
    assert all((runs / name).exists() for name in KEPT)
    assert not any((runs / name).exists() for name in GONE)
    assert (runs / "3-1" / "resume-000000010.pt").exists()
    assert (has_weights(lab.store, 1), has_weights(lab.store, 2)) == (True, False)
    assert do(lab, "clean", "--yes").stdout == "there is nothing to delete\n"
    assert [row["status"] for row in lab.store.rows("SELECT status FROM runs ORDER BY id")] == [
        "completed",
        "completed",
        "running",
    ]


def test_weights_of_baselines_go_only_when_that_is_said(lab: Lab, runs: Path) -> None:
    found = answer(lab, "clean", "--kept-weights", "--yes")["found"]
    assert sorted(item["path"] for item in found if item["kind"] == "weights") == [
        "runs/1-1/checkpoint.pt",
        "runs/2-1/checkpoint.pt",
    ]
    assert not has_weights(lab.store, 1)


def test_what_a_queued_run_reads_stays_whatever_is_said(lab: Lab, runs: Path) -> None:
    reader = put_run(lab, put_experiment(lab).id, 9, kind="ablate", needs_run_id=2)
    found = answer(lab, "clean", "--kept-weights", "--yes")["found"]
    assert "runs/2-1/checkpoint.pt" not in {item["path"] for item in found}
    assert (runs / "2-1" / "checkpoint.pt").exists()
    assert reader.needs_run_id == 2


def test_what_a_process_holds_and_what_a_link_leads_to_stays(lab: Lab, runs: Path, tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "checkpoint.pt").touch()
    (runs / "88-1").symlink_to(treasure)
    (runs / "a folder of mine").mkdir()
    (runs / "77-1" / "link").symlink_to(treasure)
    with FileLock(runs / "77-1" / "lock") as lock:
        assert lock.acquire()
        assert "77-1" not in do(lab, "clean", "--yes").stdout

    answer(lab, "clean", "--yes")
    assert not (runs / "77-1").exists()
    assert (treasure / "checkpoint.pt").exists()
    assert (runs / "88-1").is_symlink()
    assert (runs / "a folder of mine").exists()


def test_logs_that_were_set_aside_and_torn_copies_go(lab: Lab) -> None:
    log = lab.log("runner")
    log.write_bytes(b"x" * LOG_BYTES)
    rotate(log)
    log.touch()
    (lab.folder / "backups").mkdir()
    old, new = (lab.folder / "backups" / f".lab-{name}.db.part" for name in ("old", "new"))
    for path in (old, new, lab.folder / "backups" / "lab-20261123-000000.db"):
        path.touch()

    os.utime(old, (0, 0))
    found = {item["path"] for item in answer(lab, "clean", "--yes")["found"]}
    assert found == {"logs/runner.log.1", "backups/.lab-old.db.part"}
    assert log.exists()
    assert new.exists()


def test_tokenized_text_goes_only_where_it_can_be_made_again(lab: Lab) -> None:
    nano = PRESETS["nano"]
    here = f"{nano.corpus}-{nano.tokenizer}-{nano.vocab_size}-0123456789ab"
    waits, unused, mine = (
        "wikipedia-bpe-512-0123456789ab",
        "wikipedia-bpe-1024-0123456789ab",
        "mine-byte-256-0123456789ab",
    )
    for name in (here, waits, unused, mine, "texts"):
        (lab.data_folder / name).mkdir()

    run = put_run(lab, put_experiment(lab).id, 1)
    config = nano.model_copy(update={"tokenizer": "bpe", "vocab_size": 512}).model_dump_json()
    lab.store.execute("UPDATE runs SET config = ? WHERE id = ?", (config, run.id))
    assert answer(lab, "clean", "--yes")["found"] == []
    found = answer(lab, "clean", "--data", "--yes")["found"]
    assert [item["path"] for item in found] == [f"data/{unused}"]
    left = {path.name for path in lab.data_folder.iterdir() if path.is_dir()}
    assert left == {here, waits, mine, "texts"}
