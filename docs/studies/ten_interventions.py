"""Ten known interventions, put to the test: a study in a lab, from proposals to confirmed verdicts.

    .venv/bin/python docs/studies/ten_interventions.py LAB

Makes a lab in the folder LAB, proposes ten interventions of which the literature says something (some good, some
harmful, some without effect), has each screened and then confirmed on new pairs whatever the screening says, and writes
docs/studies/ten_interventions.md: what the literature expects beside what the lab found. Started again on the same
folder it goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from study import ask, experiments, open_lab, work_off

from agents.confirmation import CLAIMS
from agents.preflight import base_of
from agents.proposals import Proposal
from db.experiments import latest_verdict
from db.hypotheses import get_hypothesis, list_hypotheses
from db.lab import Lab
from db.records import Claim, Hypothesis, Verdict
from db.runners import list_runners

SETTINGS = """\
preset = "micro"
min_seeds = 2
max_pairs = 32
campaign = "ten interventions"
baseline_from = "preset"

[baseline]
budget_tokens = 204800

[gpu_optimization]
max_experts = 64
"""


@dataclass(frozen=True, kw_only=True)
class Known:
    """An intervention, what its source leads one to expect of it here, and why it may be otherwise."""

    title: str
    treatment: dict[str, Any]
    expected: str
    source: str
    remark: str = ""


KNOWN = (
    Known(
        title="Muon for the matrices",
        treatment={"optimizer": "muon"},
        expected="improved",
        source="Moonlight, arXiv:2502.16982: about twice AdamW's efficiency, in far larger runs",
    ),
    Known(
        title="A shorter memory of the first moment",
        treatment={"beta1": 0.8},
        expected="improved",
        source="with 400 steps a mean over ten is long; nothing is published for runs this short",
    ),
    Known(
        title="Twice as many experts at the same active size",
        treatment={"num_experts": 16},
        expected="improved",
        source="Clark et al. 2022, arXiv:2202.01169: more experts lower the loss",
        remark="their gains come over billions of tokens",
    ),
    Known(
        title="A tenth of the learning rate",
        treatment={"lr": 6e-4},
        expected="worse",
        source="Bjorck et al. 2024, arXiv:2409.19913: the best rate rises as runs get shorter",
    ),
    Known(
        title="One active expert a token",
        treatment={"top_k": 1},
        expected="worse",
        source="with normalized gates the only gate is 1, so the loss teaches the router nothing (DeepSeekMoE, "
        "arXiv:2401.06066, has more than one)",
    ),
    Known(
        title="GPT-2's initial weights in a narrow model",
        treatment={"init_std": 0.02},
        expected="worse",
        source="Nguyen and Salazar 2019, arXiv:1910.05895: the spread should follow the width",
    ),
    Known(
        title="Separate input and output embeddings",
        treatment={"tie_embeddings": False},
        expected="worse",
        source="Press and Wolf 2017, arXiv:1608.05859: tying helps small models",
    ),
    Known(
        title="Router z-loss switched off",
        treatment={"router_z_weight": 0.0},
        expected="equivalent",
        source="ST-MoE, arXiv:2202.08906: it is for stability, quality hardly changes",
    ),
    Known(
        title="Logits capped at 15",
        treatment={"logit_softcap": 15.0},
        expected="equivalent",
        source="Gemma 2, arXiv:2408.00118: bounds logits; they are far below 15 in 400 steps",
    ),
    Known(
        title="The same again, from other initial weights",
        treatment={"replicate": 1},
        expected="equivalent",
        source="nothing is different: an A/A comparison",
    ),
)


def main(folder: Path) -> None:
    lab = open_lab(folder, SETTINGS)
    ask(lab, map(_proposal, KNOWN), "One of ten known interventions.", confirm=True)
    work_off(lab)
    Path(__file__).with_suffix(".md").write_text("\n".join(_report(lab)) + "\n", encoding="utf-8")


def _proposal(known: Known) -> Proposal:
    return Proposal(
        title=known.title,
        hypothesis=f"val_bpb: {known.expected} is what the literature leads one to expect.",
        domain="evaluation",
        treatment=known.treatment,
        source=known.source,
    )


def _report(lab: Lab) -> Iterator[str]:
    by_title = {experiment.title: experiment for experiment in experiments(lab)}
    found = [(known, latest_verdict(lab.store, by_title[known.title].id)) for known in KNOWN]
    tokens = base_of(lab).config.budget_tokens
    claims = [item.claim for item in list_hypotheses(lab.store) if item.claim]
    runs = lab.store.value("SELECT count(*) FROM runs WHERE status = 'completed'")
    yield f"""# Ten known interventions

Written by `docs/studies/ten_interventions.py` on {date.today()} from the verdicts of a lab: ten treatments against the
micro preset at {tokens:,} tokens on {list_runners(lab.store)[0].hardware_class}, {runs} runs. Each was screened on two
pairs and then confirmed on up to 32 new ones, seeds drawn by the lab, scored on the sealed test split. {len(claims)} of
{len(found)} are claimed; of everything that such a campaign claims, at most 5 % is false on average. val_bpb, lower is
better; the interval holds at 95 % over all looks at one experiment; "expected" is the effect to expect in fact. The
noise floor, within which effects are equivalent, is the deviation of a single run.

| intervention | literature | here | effect | interval | expected | noise floor | pairs | e-value |
|---|---|---|---|---|---|---|---|---|"""
    for known, verdict in found:
        yield _row(known, verdict, get_hypothesis(lab.store, by_title[known.title].id))

    yield ""
    for known, _ in found:
        yield f"- **{known.title}**: {known.source}." + (f" {known.remark.capitalize()}." if known.remark else "")


def _row(known: Known, verdict: Verdict | None, hypothesis: Hypothesis | None) -> str:
    if verdict is None or verdict.effect is None or hypothesis is None:
        return f"| {known.title} | {known.expected} | {verdict.said if verdict else 'not judged'} | | | | | | |"

    low, high = ("–" if end is None else f"{end:+.3f}" for end in (verdict.low, verdict.high))
    expected = "–" if verdict.expected is None else f"{verdict.expected:+.3f}"
    floor = "–" if verdict.margin is None else f"{verdict.margin:.3f}"
    values = {word: float(getattr(hypothesis, word)) for word in CLAIMS}
    strongest: Claim = max(values, key=values.__getitem__)
    word = hypothesis.claim or strongest
    return (
        f"| {known.title} | {known.expected} | **{verdict.said}** | {verdict.effect:+.3f} | [{low}, {high}] | "
        f"{expected} | {floor} | {verdict.pairs} | {values[word]:,.0f} for {word} |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
