"""The report of an experiment and of a lab: what it says, by the command line and by a real MCP client."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from mcp import Client, StdioServerParameters

from db.clock import now
from db.draw import Effect, draw_forest
from db.experiments import add_verdict, move_experiment
from db.hypotheses import add_hypothesis, note_claim, note_evidence
from db.lab import Lab
from db.queries import CurvePoint
from db.queue import Outcome, Point, claim_run, finish_attempt, ingest
from db.records import Arm, Experiment
from db.reporting import mean_curve
from db.runners import list_runners
from moe.presets import PRESETS
from tests.server.conftest import ROOT, put_experiment, put_run
from tests.server.test_cli import answer, do, verdict_of

HOSTILE = "<script>alert('lab')</script> | [a](b) *c*"
SENTENCE = "lr 0.01 → 0.001 improves val_bpb -0.021 [-0.030, -0.013] over 2 new pairs."
CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)


def finish(lab: Lab, outcome: Outcome) -> None:
    """Takes the next run of the queue to its end."""
    [runner] = list_runners(lab.store)
    claim = claim_run(lab.store, runner, now(), lease_seconds=30)
    assert claim is not None
    points = [
        Point(step=step, tokens=512 * step, seconds=step / 10, values={"train_loss": 6 / step, "val_bpb": 4 / step})
        for step in range(1, 41)
    ]
    ingest(lab.store, claim.attempt, points, 900, now(), lease_seconds=30)
    finish_attempt(lab.store, claim.attempt, outcome, max_failures=2)


def train(lab: Lab, experiment: Experiment, arm: Arm, seed: int, val_bpb: float | None, fingerprint: str) -> None:
    """One confirming run from the queue to its end; without a score, one that diverged."""
    put_run(lab, experiment.id, seed, arm=arm, fingerprint=fingerprint, purpose="confirm")
    score = {"val_bpb": val_bpb, "train_seconds": 4.0, "train_tokens": 20_480, "evaluator": 2, "split": "test"}
    diverged = Outcome(status="pruned", error="the loss was not finite at step 12")
    finish(lab, diverged if val_bpb is None else Outcome(status="completed", score=score))


@pytest.fixture
def found(lab: Lab) -> Lab:
    """A lab whose experiment 1 is claimed improved, 2 registered and not claimed, 3 hostile and without a verdict."""
    improved = put_experiment(lab, title="A tenth of the rate", source="Bjorck et al., arXiv:2409.19913")
    open_one = put_experiment(lab, title="Twice the rate", treatment={"lr": 0.02})
    put_experiment(lab, title=HOSTILE, hypothesis=HOSTILE)
    for seed in (1_000_001, 1_000_002):
        train(lab, improved, "baseline", seed, 2.1, "a" * 16)
        train(lab, improved, "treatment", seed, 2.0787, "b" * 16)

    train(lab, open_one, "treatment", 1_000_003, None, "c" * 16)
    for experiment in (improved, open_one):
        values = {"campaign": "night", "seeds": [1_000_001, 1_000_002], "max_pairs": 8, "noise_sd": 0.004}
        item = add_hypothesis(lab.store, {"experiment_id": experiment.id, "noise_df": 12.0, **values})
        gain = 812.3 if experiment is improved else 3.21
        note_evidence(lab.store, item, {"improved": gain, "worse": 0.004, "equivalent": 0.2})
        if experiment is improved:
            note_claim(lab.store, item, claim="improved")
            note_claim(lab.store, item, lab_claim="improved")

    stored = {
        "stage": "confirm",
        "sentence": SENTENCE,
        "expected": -0.01834,
        "margin": 0.00283,
        "evidence": 812.3,
        "needed": 144.0,
        "noise_df": 12.0,
        "baseline_parameters": 41_400,
        "treatment_parameters": 41_400,
        "baseline_flops": 7.9e9,
        "treatment_flops": 7.9e9,
        "baseline_seconds": 4.0,
        "treatment_seconds": 4.0,
    }
    add_verdict(lab.store, verdict_of(improved.id) | stored)
    move_experiment(lab.store, improved.id, "concluded", allowed=["suggested", "queued", "running"])
    return lab


def test_the_report_of_an_experiment_says_what_its_rows_say(found: Lab) -> None:
    made = answer(found, "report", "1")
    assert made["summary"][-1] == f"improved: {SENTENCE}"
    text = Path(made["markdown"]).read_text()
    assert "−0.0213 [−0.0301, −0.0125]" in text
    assert "| effect to expect (shrunk) | −0.0183 |" in text
    assert "| e-value that it is better, of what it needs | 812 of 144 |" in text
    assert "| claimed in the campaign; over the lab's life | improved; improved |" in text
    assert "| baseline | 2.1000 | 41.4k | – | 7.9G | 4.0 s | 20.5k |" in text
    assert "| 1000001 | confirmation |  | 2.1000 | 2.0787 | −0.0213 |" in text
    assert "| lr | schedule | AdamW, arXiv:1711.05101 | 0.01 | 0.001 |" in text
    assert "arXiv:2409.19913" in text
    assert "val_bpb along the curve: part of val; the score: 4,096 tokens of test." in text
    assert "which is the lab's whole life, 2 hypotheses were registered; claimed: 1 improved." in text
    assert "cpu-2-fp32" in text
    for picture in re.findall(r"\]\((.+?\.svg)\)", text):
        assert Path(made["markdown"]).with_name(picture).read_text().startswith("<svg xmlns=")


def test_the_report_of_a_lab_names_what_was_not_claimed_and_what_diverged(found: Lab) -> None:
    made = answer(found, "report")
    text = Path(made["markdown"]).read_text()
    assert made["summary"][0] == "1 experiment with a verdict: 1 improved."
    assert "| 2 | Twice the rate | night | 2 | 3.2 | under 0.01 | 0.2 |" in text
    assert re.search(r"\| 5 \| pruned \| 1000003 \| 2 \| the loss was not finite at step 12 \|", text)
    assert f"> **improved.** {SENTENCE}" in text
    assert re.search(r"\| preset nano( with .+)? \| .+ \| 1 \| .+ \| 41.4k \| – \| 7.9G \|", text)
    assert "| 1 | 1, 2 |" in text  # the seeds of experiment 1
    assert "Written by Blueberry" in text


def test_every_pair_of_a_guarded_experiment_has_the_guard_too(lab: Lab) -> None:
    guarded = {"metric": "weight_bytes", "guard_metric": "val_bpb", "guard_margin": 0.02}
    experiment = put_experiment(lab, **guarded)
    arms: tuple[tuple[Arm, float, float], ...] = (("baseline", 100_000.0, 2.1), ("treatment", 25_000.0, 2.1112))
    for arm, size, val_bpb in arms:
        put_run(lab, experiment.id, 5, arm=arm, fingerprint=arm.ljust(16, "0"))
        finish(lab, Outcome(status="completed", score={"weight_bytes": size, "val_bpb": val_bpb}))

    found = {"metric": "weight_bytes", "effect": -75_000.0, "low": -75_000.0, "high": -75_000.0, "noise": 0.0}
    guard = {"guard_effect": 0.0112, "guard_low": 0.0012, "guard_high": 0.0212, "margin": 0.0, "pairs": 1}
    add_verdict(lab.store, verdict_of(experiment.id) | found | guard | {"stage": "screen"})
    text = Path(answer(lab, "report", "1")["markdown"]).read_text()
    assert "| noise floor (deviation of single runs over seeds) | 0 |" in text
    assert "| guard: val_bpb, margin 0.02 | +0.0112 [+0.0012, +0.0212] |" in text
    assert "| 5 | screening |  | 100,000 | 25,000 | −75,000 | 2.1000 | 2.1112 | +0.0112 |" in text


def test_the_page_needs_nothing_else_and_runs_nothing(found: Lab) -> None:
    for arguments in (["3"], ["1"], []):
        page = Path(answer(found, "report", *arguments)["html"]).read_text()
        assert "<script" not in page
        assert not re.search(r"(?:src|href|url)\s*[=(]", page)
        assert "prefers-color-scheme: dark" in page
        assert "@media print" in page

    assert "&lt;script&gt;" in Path(answer(found, "report", "3")["html"]).read_text()
    assert "\\<script\\>" in Path(answer(found, "report", "3")["markdown"]).read_text()


def test_a_lab_without_experiments_has_a_report(lab: Lab) -> None:
    made = answer(lab, "report")
    assert made["summary"][0] == "No experiment has a verdict yet."
    assert made["images"] == []
    assert "there is no experiment 7" in do(lab, "report", "7").stderr


def test_a_chat_client_gets_the_plots_as_images(found: Lab) -> None:
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "server", "--lab", str(found.folder)], cwd=ROOT, env={}
    )
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Client(server, read_timeout_seconds=60)) as client,
    ):
        result = portal.call(client.call_tool, "report", {"experiment_id": 1})

    assert not result.is_error, result.content
    text, *images = result.content
    assert text.type == "text"
    assert json.loads(text.text) == result.structured_content
    assert len(text.text) < 5_000
    assert len(images) == len(result.structured_content["images"]) == 2
    for image in images:
        assert image.type == "image"
        assert image.mime_type == "image/png"
        data = b64decode(image.data)
        assert data.startswith(b"\x89PNG")
        assert 5_000 < len(data) <= 200_000


def test_without_matplotlib_the_report_has_its_own_pictures(found: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made = answer(found, "report", "1")
    assert made["images"] == []
    assert "pip install 'blueberry-lab[report]'" in made["note"]
    assert '<svg class="forest"' in Path(made["html"]).read_text()


def test_a_mean_curve_is_the_mean_where_all_curves_are_known() -> None:
    first = [CurvePoint(step=step, value=float(step)) for step in (0, 500, 1000)]
    second = [CurvePoint(step=step, value=2.0) for step in (250, 1000)]
    assert [(point.step, point.value) for point in mean_curve([first, second])] == [
        (250, 126.0),
        (500, 251.0),
        (1000, 501.0),
    ]
    assert mean_curve([first, []]) == []


def test_an_effect_beyond_the_scale_becomes_an_arrow() -> None:
    rows = [Effect(label=f"{k}", effect=0.01 * (-1) ** k, low=-0.03, high=0.03, word="equivalent") for k in range(5)]
    drawn = str(draw_forest([*rows, Effect(label="lost", effect=40.0, word="worse")]))
    assert drawn.count("<circle") == 5
    assert drawn.count('class="beyond"') == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_the_page_renders_in_a_browser(found: Lab, tmp_path: Path) -> None:
    page = answer(found, "report", "1")["html"]
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,2400"),
            *(f"--screenshot={tmp_path / 'page.png'}", "--dump-dom", f"file://{page}"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert SENTENCE in done.stdout
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_effects_against_different_baselines_stand_apart_and_what_was_left_is_named(lab: Lab) -> None:
    for tokens in (20_480, 102_400):
        experiment = put_experiment(lab, baseline={**PRESETS["nano"].model_dump(), "budget_tokens": tokens})
        add_verdict(
            lab.store,
            verdict_of(experiment.id) | {"verdict": "no evidence yet", "stage": "screen", "screening": "not promising"},
        )

    made = answer(lab, "report")
    text = Path(made["markdown"]).read_text()
    assert "val_bpb, compared with preset nano:\n" in text
    assert "val_bpb, compared with preset nano with budget_tokens 102400:\n" in text
    assert sorted(set(re.findall(r"\((forest-.+?\.svg)\)", text))) == ["forest-1.svg", "forest-2.svg"]
    assert "more than max_pairs): experiments 1, 2." in text
