"""The classical proposer: what it asks for, and that it learns from the lab's verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from agents.admission import NotAdmittedError
from agents.domains import get_domain, load_domains
from agents.optimizer import propose
from agents.preflight import base_of
from agents.proposals import Proposal
from agents.suggester import brief, suggest
from agents.treatments import changes_of
from db.experiments import get_experiment
from db.lab import Lab
from moe.config import KNOBS, apply_treatment
from moe.texts import BENCHMARKS


def ask_for(lab: Lab, count: int, *names: str) -> list[Proposal]:
    domains = {name: get_domain(lab, name) for name in names} if names else load_domains(lab)
    return propose(lab, base_of(lab), domains, count)


def tried(
    lab: Lab, conclude: Callable[..., None], treatment: dict[str, Any], effect: float, *, metric: str | None = None
) -> None:
    past = Proposal(title="past", hypothesis="It was tried.", domain="optimization", treatment=treatment, metric=metric)
    made = suggest(lab, count=1, proposals=[past])
    assert made.refused == []
    conclude(lab, made.experiments[0].id, "improved" if effect < 0 else "worse", effect)


def test_it_asks_for_new_resolvable_moves_of_one_or_two_knobs_within_the_search_range(lab: Lab) -> None:
    base = base_of(lab).config
    found = ask_for(lab, 20)
    assert len(found) == 20
    for proposal in found:
        assert 1 <= len(proposal.treatment) <= 2
        apply_treatment(base, proposal.treatment)
        assert any(change.resolvable for change in changes_of(base, proposal.treatment))
        for name, value in proposal.treatment.items():
            search = KNOBS[name].search
            assert search is not None
            if search.choices:
                assert value in search.choices
            else:
                assert search.low is not None
                assert search.high is not None
                assert search.low <= float(value) <= search.high

    assert len({str(sorted(proposal.treatment.items())) for proposal in found}) == 20


def test_it_is_deterministic_given_the_rows(lab: Lab, conclude: Callable[..., None]) -> None:
    assert ask_for(lab, 3) == ask_for(lab, 3)
    before = ask_for(lab, 3)
    tried(lab, conclude, {"lr": 0.012}, -0.1)
    assert ask_for(lab, 3) != before
    assert ask_for(lab, 3) == ask_for(lab, 3)


def test_it_moves_only_the_domains_knobs(lab: Lab) -> None:
    knobs = set(get_domain(lab, "moe_architecture").knobs)
    for proposal in ask_for(lab, 8, "moe_architecture"):
        assert proposal.treatment.keys() <= knobs
        assert proposal.domain == "moe_architecture"


def test_it_respects_the_limits(configured: Callable[[str], Lab]) -> None:
    lab = configured("[gpu_optimization]\nmax_experts = 8\nmax_sequence_length = 128\n")
    for proposal in ask_for(lab, 20, "evaluation"):
        assert int(proposal.treatment.get("num_experts", 1)) <= 8
        assert int(proposal.treatment.get("seq_len", 1)) <= 128


def test_it_learns_which_knob_is_worth_moving_and_whereto(lab: Lab, conclude: Callable[..., None]) -> None:
    for step in range(5):
        tried(lab, conclude, {"beta1": 0.8 + step * 0.015}, 0.2 + step / 100)
        tried(lab, conclude, {"warmup_fraction": 0.14 + step * 0.03}, 0.1 + step / 100)
        tried(lab, conclude, {"lr": 0.009 * 1.33**step}, -0.5 - step / 100)

    found = ask_for(lab, 10, "optimization")
    moved = Counter(name for proposal in found for name in proposal.treatment)
    assert moved.most_common(1)[0][0] == "lr"
    assert float(found[0].treatment["lr"]) > 0.009
    assert "TPE over 15 verdicts by val_bpb on this baseline: its best guess" in found[0].hypothesis


def test_it_learns_from_verdicts_by_the_labs_metric_alone_in_its_direction(
    configured: Callable[[str], Lab], conclude: Callable[..., None]
) -> None:
    lab = configured('metric = "accuracy"\n')
    for step in range(5):
        tried(lab, conclude, {"beta1": 0.8 + step * 0.015}, -0.1 - step / 100)
        tried(lab, conclude, {"lr": 0.009 * 1.33**step}, 0.5 + step / 100)
        tried(lab, conclude, {"warmup_fraction": 0.14 + step * 0.03}, -1.0, metric="val_bpb")

    found = ask_for(lab, 10, "optimization")
    assert {proposal.metric for proposal in found} == {"accuracy"}
    assert Counter(name for proposal in found for name in proposal.treatment).most_common(1)[0][0] == "lr"
    assert "(TPE over 10 verdicts by accuracy on this baseline: its best guess) expects accuracy" in found[0].hypothesis


def test_a_labs_metric_may_be_a_text_set_and_is_then_that_of_all_new_ideas(configured: Callable[[str], Lab]) -> None:
    lab = configured('metric = "benchmark_code"\n')
    with pytest.raises(NotAdmittedError, match="'benchmark_code' is no metric to judge by; known: val_bpb"):
        suggest(lab, count=1)

    (lab.data_folder / BENCHMARKS).mkdir(parents=True)
    (lab.data_folder / BENCHMARKS / "code.txt").write_text("x = 1\n")
    made = suggest(lab, count=3)
    assert [(item.proposer, item.metric, item.guard_metric) for item in made.experiments] == [
        ("optimizer", "benchmark_code", "val_bpb")
    ] * 3
    own = Proposal(title="mine", hypothesis="It may help with code.", domain="optimization", treatment={"lr": 0.02})
    assert suggest(lab, count=1, proposals=[own]).experiments[0].metric == "benchmark_code"
    assert "on benchmark_code (val_bpb of the whole text set code, on which nothing trains" in brief(lab, None, None)
    # The catalog speaks of val_bpb, and is asked for by name.
    assert suggest(lab, count=1, proposer="catalog").experiments[0].metric == "val_bpb"


def test_rows_that_no_distribution_holds_do_no_harm(lab: Lab, conclude: Callable[..., None]) -> None:
    for treatment in (
        {"router_z_weight": 0.0},
        {"lr": 0.5},
        {"batch_size": 12},
        {"top_k": 6},
        {"normalize_gates": False},
        {"expert_kind": "mlp"},
        {"n_layers": 24},
        {"lr": 0.01, "beta1": 0.8, "beta2": 0.99},
    ):
        tried(lab, conclude, treatment, 0.1)

    found = ask_for(lab, 10)
    assert len(found) == 10
    assert "TPE over 7 verdicts" in found[0].hypothesis


def test_verdicts_on_another_baseline_do_not_count(
    lab: Lab, conclude: Callable[..., None], configured: Callable[[str], Lab]
) -> None:
    tried(lab, conclude, {"lr": 0.012}, -0.1)
    assert "TPE over 1 verdict by val_bpb on" in ask_for(lab, 1)[0].hypothesis
    assert "TPE over 0 verdicts" in ask_for(configured('preset = "nano"\n'), 1)[0].hypothesis


def test_it_asks_for_nothing_that_was_asked_before_or_is_about_to_be(lab: Lab) -> None:
    first = suggest(lab, count=5, proposer="optimizer").experiments
    again = propose(lab, base_of(lab), load_domains(lab), 5, taken=[item.treatment for item in first])
    assert not [item for item in again if item.treatment in [get_experiment(lab.store, 1).treatment]]


def test_a_domain_with_all_its_choices_tried_yields_nothing(lab: Lab) -> None:
    text = 'title = "Tiny"\ndescription = ""\nknobs = ["expert_kind"]\n'
    (lab.domains_folder / "tiny.toml").write_text(text)
    kinds = [item.treatment["expert_kind"] for item in suggest(lab, count=4, domain="tiny").experiments]
    assert sorted(map(str, kinds)) == ["geglu", "mlp", "relu2"]
    made = suggest(lab, count=1, domain="tiny")
    assert made.experiments == []
    assert "had no more that are new" in made.refused[0].reason
