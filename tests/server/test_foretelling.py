"""Whether short runs foretell long ones: what a lab's report says of its own experiments."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.foretelling import rank_correlation, spearman
from db.clock import now
from db.experiments import add_verdict, plan_experiment
from db.hypotheses import add_hypothesis
from db.lab import Lab
from db.queue import Outcome, Point, claim_run, finish_attempt, ingest
from db.records import Arm, Stage
from db.runners import list_runners
from tests.server.conftest import put_experiment, put_run
from tests.server.test_cli import answer, verdict_of

HEADING = "## Do short runs foretell long ones?"
POINTS = 4


def run_pair(lab: Lab, experiment_id: int, seed: int, stage: Stage, curve: list[float], effect: float) -> None:
    """Trains both sides of a pair; the treatment is apart from the baseline by `curve`, and in the end by `effect`."""
    [runner] = list_runners(lab.store)
    sides: dict[Arm, tuple[list[float], float]] = {"baseline": ([0.0] * POINTS, 0.0), "treatment": (curve, effect)}
    for arm, (gaps, end) in sides.items():
        fingerprint = f"{experiment_id} {stage} {arm}".ljust(16)
        put_run(lab, experiment_id, seed, arm=arm, fingerprint=fingerprint, purpose=stage)
        claim = claim_run(lab.store, runner, now(), lease_seconds=30)
        assert claim is not None
        points = [
            Point(step=10 * k, tokens=512 * k, seconds=float(k), values={"val_bpb": 3.0 - 0.1 * k + gap})
            for k, gap in enumerate(gaps, start=1)
        ]
        ingest(lab.store, claim.attempt, points, 900, now(), lease_seconds=30)
        outcome = Outcome(status="completed", score={"val_bpb": 2.5 + end})
        finish_attempt(lab.store, claim.attempt, outcome, max_failures=2)


def put_screened_whole(lab: Lab, number: int) -> None:
    """An experiment of one whole pair. Its curve is the wrong way round at first, and right from the half on."""
    effect = 0.01 * number
    experiment = put_experiment(lab, title=f"idea {number}")
    plan_experiment(lab.store, experiment.id, screen_share=1.0, hardware_class="cpu-2-fp32")
    run_pair(lab, experiment.id, 1, "screen", [-effect, effect, effect, effect], effect)
    add_verdict(lab.store, verdict_of(experiment.id) | {"stage": "screen", "screening": "not promising"})


def put_confirmed_after_rung(lab: Lab, number: int) -> None:
    """An experiment that was screened at a quarter of the budget, and then confirmed."""
    experiment = put_experiment(lab, title=f"idea {number}")
    plan_experiment(lab.store, experiment.id, screen_share=0.25, hardware_class="cpu-2-fp32")
    run_pair(lab, experiment.id, 1, "screen", [0.0] * POINTS, -0.01 * number)
    run_pair(lab, experiment.id, 1_000_001, "confirm", [0.0, 0.0, 0.01, 0.02], -0.02 * number)
    values = {"campaign": "lab", "seeds": [1_000_001], "max_pairs": 8}
    add_hypothesis(lab.store, {"experiment_id": experiment.id, **values})
    add_verdict(lab.store, verdict_of(experiment.id) | {"stage": "confirm"})


def test_ranks_decide_and_ties_share_theirs() -> None:
    assert spearman([(1.0, 10.0), (2.0, 1000.0), (3.0, 1001.0)]) == pytest.approx(1.0)
    assert spearman([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]) == pytest.approx(-1.0)
    assert spearman([(1.0, 1.0), (1.0, 2.0), (2.0, 3.0)]) == pytest.approx(0.75**0.5)
    assert spearman([(1.0, 1.0), (1.0, 2.0)]) is None


def test_a_correlation_has_an_interval_and_few_experiments_have_none() -> None:
    points = [(float(k), float((5 * k) % 12)) for k in range(12)]
    found = rank_correlation(points)
    assert found is not None
    assert found == rank_correlation(points)
    assert -1.0 <= found.low < found.value < found.high <= 1.0
    assert rank_correlation(points[:7]) is None
    assert rank_correlation([(1.0, y) for _, y in points]) is None


def test_a_lab_that_trains_all_of_the_budget_shows_its_curves(lab: Lab) -> None:
    for number in range(1, 10):
        put_screened_whole(lab, number)

    made = answer(lab, "report")
    text = Path(made["markdown"]).read_text()
    section = text[text.index(HEADING) :]
    assert "| when 1/4 of training was done | 9 | −1.00 | −1.00 to −1.00 |" in section
    assert "| when 1/2 of training was done | 9 | +1.00 | +1.00 to +1.00 |" in section
    assert "both effects are of the same runs" in section
    assert "promising" not in section[: section.index("| early effect")]
    assert "](foretelling.svg)" in section
    assert (Path(made["markdown"]).parent / "foretelling.svg").read_text().count("<circle") == 9
    html = Path(made["html"]).read_text()
    assert "<title>1 idea 1: -0.0100, +0.0100</title>" in html


def test_a_lab_that_screens_short_shows_its_rungs_and_names_the_selection(lab: Lab) -> None:
    for number in range(1, 9):
        put_confirmed_after_rung(lab, number)

    section = Path(answer(lab, "report")["markdown"]).read_text()
    section = section[section.index(HEADING) :]
    assert "| screened at 1/4 of the budget | 8 | +1.00 | +1.00 to +1.00 |" in section
    assert "only what was promising was confirmed" in section
    assert "val_bpb screened at 1/4 of the budget" not in section  # that is in the picture
    assert "one spot an experiment: screened at 1/4 of the budget" in section


def test_with_few_experiments_no_number_is_given(lab: Lab) -> None:
    for number in range(1, 4):
        put_confirmed_after_rung(lab, number)

    text = Path(answer(lab, "report")["markdown"]).read_text()
    assert "Not known yet: 3 experiments have an effect early and at the end of the whole budget" in text
    assert "foretelling.svg" not in text


def test_a_lab_without_whole_effects_does_not_ask(lab: Lab) -> None:
    assert HEADING not in Path(answer(lab, "report")["markdown"]).read_text()
