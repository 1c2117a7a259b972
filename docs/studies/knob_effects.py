"""What every knob does to val_bpb at the micro preset: a study in a lab, from proposals to verdicts.

    .venv/bin/python docs/studies/knob_effects.py LAB [SEEDS]

Makes a lab in the folder LAB, proposes one experiment or more for every knob that a treatment may change, queues them
with SEEDS paired seeds (3), trains, and writes docs/studies/knob_effects.md from the verdicts. Started again on the
same folder it goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from study import ask, experiments, open_lab, work_off

from agents.preflight import base_of
from agents.proposals import Proposal
from db.experiments import latest_verdict
from db.lab import Lab
from db.records import Experiment, Verdict
from db.runners import list_runners
from moe.config import KNOBS

BUDGET_TOKENS = 204_800
SETTINGS = """\
preset = "micro"
min_seeds = {seeds}
max_seeds = {seeds}
baseline_from = "preset"

[baseline]
budget_tokens = {tokens}

[gpu_optimization]
max_experts = 64
"""

TREATMENTS: dict[str, list[dict[str, Any]]] = {
    "d_model": [{"d_model": 96}],
    "n_layers": [{"n_layers": 3}],
    "n_heads": [{"n_heads": 4}],
    "gqa_group_size": [{"gqa_group_size": 2}],
    "seq_len": [{"seq_len": 128, "batch_size": 4}],
    "rope_base": [{"rope_base": 100.0}],
    "qk_norm": [{"qk_norm": True}],
    "tie_embeddings": [{"tie_embeddings": False}],
    "logit_softcap": [{"logit_softcap": 15.0}],
    "init_std": [{"init_std": 0.02}],
    "zero_init_out": [{"zero_init_out": True}],
    "num_experts": [{"num_experts": 16}, {"num_experts": 2}],
    "top_k": [{"top_k": 1}],
    "d_expert": [{"d_expert": 64, "num_experts": 16, "top_k": 4}],
    "expert_kind": [{"expert_kind": "geglu"}, {"expert_kind": "relu2"}, {"expert_kind": "mlp"}],
    "num_shared_experts": [{"num_shared_experts": 1, "top_k": 1}],
    "first_k_dense": [{"first_k_dense": 1}],
    "moe_every": [{"moe_every": 2}],
    "dense_scale": [{"first_k_dense": 1, "dense_scale": 2.0}],
    "routing": [{"routing": "hash"}],
    "router_score": [{"router_score": "sigmoid"}],
    "normalize_gates": [{"normalize_gates": False}],
    "noisy_top_k": [{"noisy_top_k": True}],
    "load_balance_weight": [{"load_balance_weight": 0.0}, {"load_balance_weight": 0.1}],
    "router_z_weight": [{"router_z_weight": 0.0}],
    "balance_bias_rate": [{"balance_bias_rate": 0.003, "load_balance_weight": 0.0}],
    "capacity_factor": [{"capacity_factor": 1.0}],
    "routing_group": [{"routing_group": 8}],
    "router_init_scale": [{"router_init_scale": 0.1}],
    "router_lr_scale": [{"router_lr_scale": 0.1}],
    "optimizer": [{"optimizer": "muon"}],
    "lr": [{"lr": 6e-4}, {"lr": 1.2e-2}],
    "schedule": [{"schedule": "linear"}, {"schedule": "wsd"}],
    "decay_fraction": [{"schedule": "wsd", "decay_fraction": 0.5}],
    "min_lr_ratio": [{"min_lr_ratio": 0.0}],
    "warmup_fraction": [{"warmup_fraction": 0.0}],
    "weight_decay": [{"weight_decay": 0.0}],
    "beta1": [{"beta1": 0.8}],
    "beta2": [{"beta2": 0.99}],
    "muon_momentum": [{"optimizer": "muon", "muon_momentum": 0.9}],
    "muon_steps": [{"optimizer": "muon", "muon_steps": 3}],
    "grad_clip": [{"grad_clip": 0.1}],
    "batch_size": [{"batch_size": 16}, {"batch_size": 4}],
    "batch_doublings": [{"batch_doublings": 1}],
    "length_doublings": [{"length_doublings": 2}],
    "ema_decay": [{"ema_decay": 0.98}],
}
NOT_HERE = {
    "router_precision": "acts only where matrices are not in fp32, and this preset is fp32 throughout",
    "replicate": "changes nothing but the draw of the initial weights",
}


def main(folder: Path, seeds: int) -> None:
    lab = open_lab(folder, SETTINGS.format(seeds=seeds, tokens=BUDGET_TOKENS))
    ask(lab, _proposals(), "One cell of the table of all knobs.")
    work_off(lab)
    Path(__file__).with_suffix(".md").write_text("\n".join(_report(lab, seeds)) + "\n", encoding="utf-8")


def _proposals() -> Iterator[Proposal]:
    missing = {name for name, knob in KNOBS.items() if knob.role == "science"} - {*TREATMENTS, *NOT_HERE}
    assert not missing, f"no treatment for {missing}"
    for name, treatments in TREATMENTS.items():
        for treatment in treatments:
            yield Proposal(
                title=f"{name}: {_text(treatment)}",
                hypothesis=f"{_text(treatment)} changes val_bpb at this budget.",
                domain="evaluation",
                treatment=treatment,
            )


def _text(treatment: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in treatment.items())


def _report(lab: Lab, seeds: int) -> Iterator[str]:
    runner = list_runners(lab.store)[0]
    base = base_of(lab).config
    verdicts = [(experiment, latest_verdict(lab.store, experiment.id)) for experiment in experiments(lab)]
    decided = [(e, v) for e, v in verdicts if v is not None and v.effect is not None]
    baseline = next((v.baseline_mean for _, v in decided), None)
    yield f"""# What every knob does at the micro preset

Written by `docs/studies/knob_effects.py` on {date.today()} from the verdicts of a lab: {len(decided)} treatments
against one baseline, each over {seeds} paired seeds of {base.budget_tokens:,} tokens, on {runner.hardware_class}.
val_bpb is lower-is-better; the baseline's is {baseline:.4f}. The interval is the judge's: it holds at 95 % for one
experiment, and nothing corrects for asking {len(decided)} questions: about one in twenty of those that do nothing
may be called something. FLOPs and parameters are the treatment's as a multiple of the baseline's: a gain that was
bought with more compute is not the knob's alone.

| treatment | val_bpb | interval | verdict | FLOPs | parameters |
|---|---|---|---|---|---|"""
    yield from (_row(*item) for item in sorted(decided, key=lambda item: item[1].effect or 0.0))

    yield ""
    for experiment, verdict in verdicts:
        if verdict is None or verdict.effect is None:
            why = experiment.status if verdict is None else f"{verdict.verdict}: {verdict.reason or verdict.sentence}"
            yield f"Without a number: {_text(experiment.treatment)} ({why})."

    for name, why in NOT_HERE.items():
        yield f"Not here: `{name}` {why}."


def _row(experiment: Experiment, verdict: Verdict) -> str:
    flops = (verdict.treatment_flops or 0.0) / (verdict.baseline_flops or 1.0)
    parameters = (verdict.treatment_parameters or 0) / (verdict.baseline_parameters or 1)
    return (
        f"| {_text(experiment.treatment)} | {verdict.effect:+.4f} | [{verdict.low:+.4f}, {verdict.high:+.4f}] | "
        f"{verdict.said} | {flops:.2f} | {parameters:.2f} |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
