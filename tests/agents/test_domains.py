"""Domains and the catalog of known interventions."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from agents.domains import Relative, get_domain, in_order, load_domains
from agents.preflight import preflight
from db.errors import RefusedError, SettingsError
from db.lab import Lab
from moe.config import apply_treatment
from moe.presets import PRESETS

MINIMAL = """
title = "Mine"
description = "My own."
knobs = ["lr"]

[[interventions]]
title = "Three times the learning rate"
hypothesis = "Tripling lr lowers val_bpb, because I say so."
treatment = { lr = { scale = 3.0 } }
expect = "improved"
size = "small"
prior = 0.3
source = "my notes"
"""


def write(lab: Lab, name: str, text: str) -> None:
    (lab.domains_folder / f"{name}.toml").write_text(text)


def test_the_four_domains_come_with_blueberry(lab: Lab) -> None:
    domains = load_domains(lab)
    assert list(domains) == ["efficiency", "evaluation", "moe_architecture", "optimization"]
    assert 45 <= sum(len(domain.interventions) for domain in domains.values()) <= 60


def test_every_intervention_keeps_to_its_domains_knobs_and_names_a_source_and_a_refutation(lab: Lab) -> None:
    for domain in load_domains(lab).values():
        for item in domain.interventions:
            assert item.treatment.keys() <= set(domain.knobs), item.title
            assert re.search(r"arXiv:\d{4}\.\d{4,5}", item.source), item.title
            assert "count" in item.method, item.title
            assert item.focus_area in domain.focus_areas, item.title


@pytest.mark.parametrize("preset", PRESETS)
def test_nearly_the_whole_catalog_applies_to_each_preset_within_the_limits(lab: Lab, preset: str) -> None:
    base = PRESETS[preset]
    items = [item for _, item in in_order(load_domains(lab))]
    resolved = [treatment for item in items if (treatment := item.resolve(base)) is not None]
    assert len(resolved) >= len(items) - 2
    assert len({str(treatment) for treatment in resolved}) == len(resolved)
    for treatment in resolved:
        assert preflight(lab, apply_treatment(base, treatment), None).problems == []


def test_the_default_order_begins_with_a_gain_a_harm_and_a_null_then_alternates_domains(lab: Lab) -> None:
    first = list(islice(in_order(load_domains(lab)), 7))
    assert [dict(item.treatment) for _, item in first[:3]] == [
        {"optimizer": "muon"},
        {"lr": Relative(scale=0.1)},
        {"router_z_weight": 0.0},
    ]
    assert [item.expect for _, item in first[:3]] == ["improved", "worse", "equivalent"]
    assert {domain.name for domain, _ in first[3:]} == set(load_domains(lab))


def test_what_the_baseline_already_has_does_not_apply(lab: Lab) -> None:
    item = next(item for _, item in in_order(load_domains(lab)) if item.title == "SwiGLU experts at equal parameters")
    assert item.resolve(PRESETS["micro"]) is None
    assert item.resolve(PRESETS["t4"]) == {"expert_kind": "swiglu", "d_expert": 1024}


def test_a_proposal_says_what_it_changes(lab: Lab) -> None:
    domain, item = next(in_order(load_domains(lab)))
    proposal = item.propose(domain.name, PRESETS["t4"])
    assert proposal is not None
    assert proposal.treatment == {"optimizer": "muon"}
    assert proposal.method.endswith("Changed: optimizer adamw → muon; everything else as in the baseline.")


def test_a_labs_own_domain_stands_beside_the_others_and_replaces_one_of_its_name(lab: Lab) -> None:
    write(lab, "mine", MINIMAL)
    assert get_domain(lab, "mine").title == "Mine"
    assert len(load_domains(lab)) == 5
    write(lab, "optimization", MINIMAL)
    assert get_domain(lab, "optimization").title == "Mine"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("title =", "title"), r"bad\.toml is not valid TOML"),
        (("title =", "wieght = 1\ntitle ="), r"bad\.toml: wieght: Extra inputs are not permitted"),
        (("description", "descripton"), r"bad\.toml: description: Field required; descripton: Extra inputs"),
        (('knobs = ["lr"]', 'knobs = ["learning"]'), r"bad\.toml: domain: unknown knob 'learning'"),
        (('knobs = ["lr"]', "knobs = []"), r"bad\.toml: knobs: "),
        (("{ lr = {", "{ lrr = {"), r"interventions\.0: unknown knob 'lrr'"),
        (("{ lr = {", "{ budget_tokens = {"), r"interventions\.0: budget_tokens is budget; a treatment cannot"),
        (("prior = 0.3", "prior = 3"), r"interventions\.0\.prior: Input should be less than or equal to 1"),
        (("scale = 3.0", "scale = -3.0"), r"interventions\.0\.treatment\.lr"),
        (('size = "small"', ""), r"interventions\.0: size is given exactly when"),
    ],
)
def test_a_malformed_domain_is_an_error_that_names_file_and_key(lab: Lab, change: tuple[str, str], said: str) -> None:
    write(lab, "bad", MINIMAL.replace(*change, 1))
    with pytest.raises(SettingsError, match=said):
        load_domains(lab)


def test_an_unknown_domain_is_refused_with_the_known_ones(lab: Lab) -> None:
    with pytest.raises(RefusedError, match="no domain 'alchemy'; known: efficiency, evaluation, moe_architecture, opt"):
        get_domain(lab, "alchemy")
