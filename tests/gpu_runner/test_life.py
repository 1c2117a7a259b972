"""A run's life when nobody interferes: done, failed, diverged, probed, cancelled, put back."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

from db.queries import curve
from db.queue import cancel_experiment_runs
from db.runners import list_runners
from db.weights import has_weights
from gpu_runner.attempts import KILL_SECONDS
from gpu_runner.drive import STOP_SECONDS
from gpu_runner.shim import GRACE_SECONDS
from moe.presets import PRESETS

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench


def test_real_nano_run_is_trained_and_scored(bench: Bench) -> None:
    nano = PRESETS["nano"]
    key = bench.enqueue(config=nano.model_dump(), steps=nano.steps)
    bench.start(standin=False)
    bench.until(lambda: bench.run(key).status != "queued" and bench.run(key).step, "a first point")
    bench.until_status(key, "completed")

    run = bench.run(key)
    assert (run.step, run.passed, run.error) == (40, True, None)
    assert run.score is not None
    assert run.val_bpb == run.score["val_bpb"]
    assert 1.0 < run.score["val_bpb"] < 8.0
    points = curve(bench.store, key, "train_loss")
    assert len(points) == len((bench.directory(key) / "metrics.jsonl").read_text().splitlines())
    assert points[-1].step == 40
    assert bench.statuses(key) == ["completed"]


def test_crash_is_recorded_with_its_log_and_tried_again_until_it_is_failed(bench: Bench) -> None:
    key = bench.enqueue("crash")
    bench.start(variables={"OPENROUTER_API_KEY": "sk-do-not-show"})
    bench.until_status(key, "failed")

    run = bench.run(key)
    assert run.error == "moe.train ended without saying why (exit code 3)"
    assert run.log_tail == "\n".join(f"line {number}" for number in range(20, 50))
    assert (run.failures, run.lost) == (2, 0)
    assert [(attempt.status, attempt.exit_code) for attempt in bench.attempts(key)] == [("failed", 3), ("failed", 3)]
    bench.assert_ended_once(key, "failed")
    assert "secret: False" in (bench.directory(key) / "log.txt").read_text()
    bench.until(lambda: (bench.lab.folder / "minds").exists(), "the mind is woken")


def test_second_attempt_may_succeed(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("crash once")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run ended")

    first, second = bench.attempts(key)
    assert (first.status, first.error) == ("failed", "RuntimeError: bad luck")
    assert second.status == "completed"
    assert bench.run(key).error is None
    bench.assert_ended_once(key)


def test_divergence_is_a_result_and_not_tried_again(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("diverge")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "pruned", "the run ended")

    assert bench.run(key).error == "training loss is not finite at step 3"
    assert bench.statuses(key) == ["completed"]
    assert bench.steps(key) == [1, 2]
    bench.assert_ended_once(key, "pruned")


def test_confirmations_alone_are_scored_on_the_sealed_split(bench: Bench) -> None:
    bench.register()
    screening, confirming = bench.enqueue(), bench.enqueue(purpose="confirm")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(confirming).status == "completed", "both runs ended")
    asked = [json.loads((bench.directory(key) / "config.json").read_text())["split"] for key in (screening, confirming)]
    assert asked == ["val", "test"]


def test_training_waits_for_a_probe_that_passed(bench: Bench) -> None:
    bench.register()
    scores = [{"acts": {"lr": {"acts": acts}}, "causal": True, "fits": True} for acts in (False, True)]
    probes = [bench.enqueue(kind="probe", arm="probe", config={"score": json.dumps(score)}) for score in scores]
    gated = [bench.enqueue(needs_run_id=probe) for probe in probes]
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(gated[1]).status == "completed", "the gated run done")
    assert [bench.run(probe).passed for probe in probes] == [False, True]
    assert bench.run(gated[0]).status == "queued"


def test_cancelled_run_ends_soon_and_is_not_tried_again(bench: Bench) -> None:
    bench.register()
    key, waiting = bench.enqueue("wait"), bench.enqueue("wait")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).step, "training")
    assert cancel_experiment_runs(bench.store, bench.experiment_id) == 2
    bench.step_until(daemon, lambda: bench.run(key).status == "cancelled", "the run ended")

    assert bench.run(waiting).status == "cancelled"
    assert bench.statuses(key) == ["cancelled"]
    bench.assert_ended_once(key, "cancelled")


def test_sigterm_puts_the_run_back_even_from_a_child_that_ignores_it(bench: Bench) -> None:
    key = bench.enqueue("stubborn")
    daemon = bench.start()
    bench.until_training(key)
    assert GRACE_SECONDS < KILL_SECONDS < STOP_SECONDS < 10  # what SIGTERM may take, on a machine with time to spare
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0

    run = bench.run(key)
    assert (run.status, run.failures, run.lost, run.error) == ("queued", 0, 0, "its runner was stopped")
    assert bench.statuses(key) == ["cancelled"]
    assert [(runner.status, runner.pid) for runner in list_runners(bench.store)] == [("stopped", None)]

    bench.go()
    bench.start()
    bench.until_status(key, "completed")
    bench.assert_ended_once(key)


def test_garbage_among_the_metrics_is_skipped_and_told_once(bench: Bench) -> None:
    bench.register()
    key = bench.enqueue("babble")
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(key).status == "completed", "the run ended")

    assert [(p.step, p.value) for p in curve(bench.store, key, "train_loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, None),
    ]
    assert curve(bench.store, key, "lr")[0].value is None
    told = bench.store.rows("SELECT message FROM events WHERE kind = 'garbage'")
    assert [row["message"] for row in told] == [
        f"run {key}: metrics.jsonl has lines that are not points; they are skipped"
    ]


def test_run_of_other_code_is_refused_not_done_as_if_it_were_the_same(bench: Bench) -> None:
    stale = bench.enqueue("train", code="another version of moe/")
    sound = bench.enqueue("train")
    bench.start()
    bench.until_status(sound, "completed")
    run = bench.run(stale)
    assert (run.status, run.failures) == ("failed", 1)
    assert "moe/ has changed since this run was queued" in (run.error or "")


def test_a_post_run_whose_checkpoint_was_cleaned_away_says_so(bench: Bench) -> None:
    bench.register()
    training = bench.enqueue()
    daemon = bench.daemon()
    bench.step_until(daemon, lambda: bench.run(training).status == "completed", "trained")
    key = bench.enqueue(kind="post", fingerprint="g", needs_run_id=training)
    bench.step_until(daemon, lambda: bench.run(key).status == "failed", "refused")

    assert bench.run(key).error == (
        f"the weights of run {training} are gone from {bench.directory(training)}; enqueue again, and they are trained "
        "anew"
    )
    assert not has_weights(bench.store, training)
    assert bench.statuses(key) == ["failed"]
