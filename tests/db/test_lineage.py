"""The tree of champions, laid out and drawn from rows."""

from __future__ import annotations

import re

from db.lineage import Step, draw_tree, layout


def step(key: int, parent: int | None, gain: float = 0.0, *, knob: str = "lr", word: str = "improved") -> Step:
    """A champion; a root where it has no parent."""
    return Step(
        id=key,
        parent_id=parent,
        experiment_id=None if parent is None else 10 * key,
        preset="micro",
        hardware_class="cpu",
        gain=gain,
        title="<b>",
        baseline={knob: 0.006},
        treatment=None if parent is None else {knob: 0.01},
        verdict=None if parent is None else word,
        effect=None if parent is None else -0.02134,
        low=-0.03011,
        high=None,
        noise=0.006,
    )


def test_a_config_stands_below_what_it_grew_from_and_the_best_stands_out() -> None:
    drawn = str(draw_tree([step(1, None), step(2, 1, 0.03), step(3, 2, 0.05), step(4, 1, 0.04), step(5, None)]))
    boxes = re.findall(r'<g class="(\w+)"><title>.*?<rect x="(\d+)" y="(\d+)"', drawn)
    assert boxes == [
        ("config", "1", "1"),
        ("config", "33", "57"),
        ("best", "65", "113"),
        ("config", "33", "169"),
        ("config", "1", "225"),
    ]
    assert drawn.count('class="edge"') == 3
    assert "lr 0.006 → 0.01" in drawn
    assert "−0.0500 val_bpb to expect in all" in drawn


def test_an_edge_says_what_its_experiment_found_and_links_to_it_where_there_are_pages() -> None:
    steps = [step(1, None), step(2, 1)]
    drawn = str(draw_tree(steps, "lab/experiments/"))
    assert 'href="lab/experiments/20"><title>&lt;b&gt;' in drawn
    assert "−0.0213 [−0.0301, +∞]" in drawn
    assert "href" not in str(draw_tree(steps))


def test_gains_over_different_baselines_are_not_compared() -> None:
    placed = layout([step(1, None), step(2, 1, 0.03), step(3, None), step(4, 3, 0.02), step(5, 3, 0.02)])
    assert [spot.step.id for spot in placed if spot.best] == [2, 4]


def test_a_lineage_that_is_cut_off_begins_with_what_is_left() -> None:
    drawn = str(draw_tree([step(8, 7, 0.3, knob="a_knob_with_a_very_long_name_" * 2), step(9, 8, 0.4)]))
    assert drawn.count('class="edge"') == 1
    assert "a_knob_with_a_very_long_name_a_knob_with_…" in drawn


def test_an_interaction_that_was_withdrawn_is_named_on_its_edge() -> None:
    assert 'class="word no-evidence-yet"' in str(draw_tree([step(1, None), step(2, 1, word="no evidence yet")]))
