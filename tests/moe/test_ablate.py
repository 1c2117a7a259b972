"""Taking parts out of a trained model, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.ablate import Part, ablate, parts_of, removed
from moe.config import Config, apply
from moe.evaluate import evaluate
from moe.metrics import METRICS
from moe.model import MoE
from moe.presets import PRESETS
from moe.routing import TokenChoice
from moe.rundir import run_in
from moe.train import train
from tests.moe.conftest import MakeRun
from tests.moe.runs import read_json

SHORT = apply(PRESETS["nano"], {"budget_tokens": 512 * 8, "progress_evals": 0, "eval_tokens": 1024})
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "raw gates": {"normalize_gates": False},
    "sigmoid with bias": {"router_score": "sigmoid", "balance_bias_rate": 0.01},
    "shared": {"num_shared_experts": 1},
    "top-1": {"top_k": 1, "normalize_gates": False},
    "all active": {"top_k": 4},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A finished run of SHORT."""
    directory = tmp_path_factory.mktemp("trained")
    request = {"kind": "train", "config": SHORT.model_dump(), "seed": 0, "device": "cpu", "data_dir": str(data_dir)}
    (directory / "config.json").write_text(json.dumps(request))
    assert run_in(train, [str(directory)]) == 0
    return directory


def test_every_part_is_taken_out_of_a_checkpoint_that_is_only_read(make_run: MakeRun, trained: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    run = make_run(SHORT, kind="ablate", checkpoint=str(trained))
    assert run_in(ablate, [str(run)]) == 0
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before

    score = read_json(run / "score.json")
    rows = score["parts"]
    assert [(row["kind"], row["layer"], row["expert"]) for row in rows] == [tuple(part) for part in parts_of(SHORT)]
    assert len(rows) == SHORT.n_layers * (SHORT.num_experts + 3)
    assert all(row["delta_bpb"] == row["val_bpb"] - score["val_bpb"] for row in rows)
    assert all(row["topic_delta_bpb"] >= row["delta_bpb"] - 1e-6 for row in rows)
    experts = [row for row in rows if row["kind"] == "expert"]
    assert sum(row["load"] for row in experts) == pytest.approx(SHORT.n_layers)
    dearest = max(experts, key=lambda row: row["delta_bpb"])
    assert score["expert_delta_max"] == dearest["delta_bpb"] > score["expert_delta_median"]
    assert score["most_important_expert"] == {"layer": dearest["layer"], "expert": dearest["expert"]}
    assert score["layer_delta_max"] >= score["layer_delta_min"] > 0.0
    assert {name for name, metric in METRICS.items() if metric.by == "ablate"} < set(score)

    assert run_in(evaluate, [str(trained)]) == 0
    assert score["val_bpb"] == read_json(trained / "score.json")["val_bpb"]


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_removed_expert_is_one_with_a_logit_of_minus_infinity(overrides: dict[str, Any]) -> None:
    config = apply(SHORT, overrides)
    model, tokens = _random(config)
    mixture = model.mixtures[1]
    x = torch.randn(tokens.numel(), config.d_model, dtype=torch.float64)
    logits = x @ mixture.router.mT
    logits[:, 2] = -torch.inf
    affinity = logits.softmax(dim=1) if config.router_score == "softmax" else logits.sigmoid()
    choice = affinity + (mixture.balance_bias if config.balance_bias_rate else 0.0)
    choice[:, 2] = -torch.inf
    chosen = torch.zeros_like(choice).scatter(1, choice.topk(config.top_k).indices, 1.0)
    gates = affinity * chosen
    if config.normalize_gates:
        gates = gates / gates.sum(dim=1, keepdim=True)

    expected = torch.zeros_like(x) if mixture.shared is None else mixture.shared(x)
    for expert in range(config.num_experts):
        up = x @ mixture.experts.w_in[expert].mT
        gate, value = up.chunk(2, dim=1)
        hidden = torch.nn.functional.silu(gate) * value
        expected = expected + gates[:, expert, None] * (hidden @ mixture.experts.w_out[expert].mT)

    with removed(model, Part("expert", 1, 2)):
        y, _ = model.mixtures[1](x.view(*tokens.shape, -1), tokens, torch.float64, None)

    torch.testing.assert_close(y.flatten(0, 1), expected, rtol=1e-9, atol=1e-9)
    assert model.mixtures[1] is mixture


def test_hash_routing_sends_the_tokens_of_a_removed_expert_to_the_next_and_leaves_the_others() -> None:
    config = apply(SHORT, {"routing": "hash"})
    model, tokens = _random(config)
    before = _chosen(model, tokens)
    with removed(model, Part("expert", 1, 0)):
        after = _chosen(model, tokens) + 1

    untouched = (before != 0).all(dim=1)
    assert 0 < int(untouched.sum()) < len(before)
    assert torch.equal(after[untouched], before[untouched])
    moved, was = after[~untouched], before[~untouched]
    assert bool((moved != 0).all())
    kept = was[was != 0]  # top-2: the one that stays, now in front
    assert torch.equal(moved[:, 0], kept)
    assert bool((moved[:, 1] != kept).all())


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice", "hash"])
def test_each_part_changes_the_model_and_comes_back(routing: str) -> None:
    more = {"routing": routing, "n_layers": 3, "first_k_dense": 1, "num_shared_experts": 1}
    config = apply(SHORT, more)
    model, tokens = _random(config)
    whole = model.logits(tokens)
    found = list(parts_of(config))
    assert len(found) == 3 + 2 * (config.num_experts + 4)
    for part in found:
        with removed(model, part):
            assert not torch.allclose(model.logits(tokens), whole), part

        assert torch.equal(model.logits(tokens), whole), part


def test_a_layers_only_expert_is_its_feed_forward_network(make_run: MakeRun) -> None:
    config = apply(SHORT, {"num_experts": 1, "top_k": 1, "n_layers": 1, "budget_tokens": 512})
    source = make_run(config)
    assert run_in(train, [str(source)]) == 0
    run = make_run(config, name="ablate", kind="ablate", checkpoint=str(source))
    assert run_in(ablate, [str(run)]) == 0
    score = read_json(run / "score.json")
    assert [row["kind"] for row in score["parts"]] == ["attention", "feed_forward", "layer"]
    assert score["expert_delta_max"] is score["most_important_expert"] is None


def test_a_request_without_a_sound_checkpoint_is_refused(make_run: MakeRun, trained: Path, tmp_path: Path) -> None:
    for name, more, message in (
        ("none", {}, "needs `checkpoint`"),
        ("gone", {"checkpoint": str(tmp_path / "nowhere")}, "is missing"),
        ("other seed", {"checkpoint": str(trained), "seed": 1}, "another config or seed"),
    ):
        run = make_run(SHORT, name=name, kind="ablate", **more)
        assert run_in(ablate, [str(run)]) == 1
        assert message in read_json(run / "error.json")["message"]
        assert not (run / "score.json").exists()


def _random(config: Config) -> tuple[MoE, torch.Tensor]:
    torch.manual_seed(0)
    model = MoE(config)
    model.init_weights(0)
    model.double().eval().requires_grad_(False)
    for mixture in model.mixtures:
        if config.balance_bias_rate > 0.0:
            mixture.balance_bias.normal_(std=0.1)

    return model, torch.randint(config.vocab_size, (2, config.seq_len))


def _chosen(model: MoE, tokens: torch.Tensor) -> torch.Tensor:
    """The experts of the second layer."""
    routing = model.hidden(tokens)[1][1]
    assert isinstance(routing, TokenChoice)
    return routing.experts_NK
