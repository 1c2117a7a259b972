"""The champions in the report of a lab: the tree as a picture and as a table, and interactions with their verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from db.champions import add_champion, note_combination
from db.experiments import add_verdict
from db.lab import Lab
from db.records import Champion, Experiment
from tests.server.conftest import put_experiment
from tests.server.test_cli import answer, verdict_of


def judged(lab: Lab, effect: float, **changes: Any) -> Experiment:
    """An experiment, confirmed with this effect."""
    experiment = put_experiment(lab, **changes)
    ends = {"effect": effect, "low": effect - 0.008, "high": effect + 0.008, "stage": "confirm"}
    add_verdict(lab.store, verdict_of(experiment.id) | ends)
    return experiment


def crowned(lab: Lab, parent: Champion | None, experiment: Experiment | None, gain: float) -> Champion:
    """A champion that grew from another one."""
    return add_champion(
        lab.store,
        {
            "preset": "nano",
            "hardware_class": "cpu-2-fp32",
            "parent_id": parent.id if parent else None,
            "experiment_id": experiment.id if experiment else None,
            "config": {},
            "gain": gain,
        },
    )


@pytest.fixture
def stacked(lab: Lab) -> Lab:
    """Two gains over one baseline, the second of which was lost on top of the first; a third that is still asked."""
    root = crowned(lab, None, None, 0.0)
    first = judged(lab, -0.0523, title="Half the rate", treatment={"lr": 0.005})
    second = judged(lab, -0.0213, title="Costs $5 to $9", treatment={"beta1": 0.8})
    best = crowned(lab, root, first, 0.0487)
    crowned(lab, root, second, 0.0194)
    together = judged(lab, 0.0111, title="Together", treatment={"beta1": 0.8})
    asked = put_experiment(lab, title="Together with the third")
    for question in (together, asked):
        note_combination(lab.store, question.id, champion_id=best.id, combined_id=second.id)

    return lab


def test_the_lineage_has_verdicts_on_its_edges(stacked: Lab) -> None:
    made = answer(stacked, "report")
    text = Path(made["markdown"]).read_text()
    assert "| 1 | – | preset nano | – | – | – | – |" in text
    assert (
        "| 2 (best) | 1 | lr 0.01 → 0.005 | 1 Half the rate | improved | −0.0523 [−0.0603, −0.0443] | −0.0487 |" in text
    )
    assert "| 3 | 1 | beta1 0.9 → 0.8 | 2 Costs $5 to $9 |" in text
    assert "![Preset nano on cpu-2-fp32." in text
    drawn = Path(made["markdown"]).with_name("lineage-1.svg").read_text()
    assert drawn.count('class="edge"') == 2
    assert "−0.0523 [−0.0603, −0.0443]" in drawn
    assert 'class="best"' in Path(made["html"]).read_text()
    [image] = [path for path in map(Path, made["images"]) if path.name.startswith("lineage")]
    assert image.read_bytes().startswith(b"\x89PNG")


def test_interactions_are_named_with_their_verdicts(stacked: Lab) -> None:
    text = Path(answer(stacked, "report")["markdown"]).read_text()
    assert (
        "| 3 | 2 | 1 | improved | the two interact | −0.0213 [−0.0293, −0.0133] | +0.0111 [+0.0031, +0.0191] |" in text
    )
    assert "| 4 | 2 | 1 | suggested | not known yet | −0.0213 [−0.0293, −0.0133] | – |" in text


def test_a_lab_without_champions_says_nothing_of_them(lab: Lab) -> None:
    judged(lab, 0.01)
    assert "hampion" not in Path(answer(lab, "report")["markdown"]).read_text()
