"""What one pass over held-out text tells of a model, against what can be counted by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.config import Config, apply
from moe.data import Data
from moe.evaluate import evaluate, quality, score_tokens
from moe.metrics import METRICS
from moe.model import MoE, looking_at
from moe.predictions import Predictions, PredictionTally, predict
from moe.presets import PRESETS
from moe.routing import TokenChoice
from moe.rundir import run_in
from moe.specialization import sum_margins, topic_information
from moe.stability import TOKENS, RouterStability
from moe.train import train
from tests.moe.conftest import MakeRun
from tests.moe.runs import read_json

SHORT = apply(PRESETS["nano"], {"budget_tokens": 512 * 4, "progress_evals": 3, "eval_tokens": 1000})
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
CPU = torch.device("cpu")


def test_score_holds_every_metric_and_each_is_explained(make_run: MakeRun) -> None:
    run = make_run(SHORT)
    assert run_in(train, [str(run)]) == 0
    assert run_in(evaluate, [str(run)]) == 0
    score = read_json(run / "score.json")
    of_evaluate = [name for name, metric in METRICS.items() if metric.by == "evaluate"]
    assert set(of_evaluate) <= set(score)
    assert "benchmarks" not in score
    assert all(score[name] is None or math.isfinite(score[name]) for name in of_evaluate)
    numbers, _ = DOCS.read_text().split("**Tables**")
    described = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (?:([↓↑]) )?\|", numbers, flags=re.MULTILINE)
    arrows = {"lower": "↓", "higher": "↑", None: ""}
    assert described == [(name, metric.unit, arrows[metric.better]) for name, metric in METRICS.items()]

    layers = score["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    for name in ("router_entropy", "load_entropy", "load_imbalance", "router_margin"):
        assert score[name] == pytest.approx(sum(layer[name] for layer in layers) / 2)

    points = [json.loads(line)["values"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = [point.get("router_stability") for point in points if "val_bpb" in point]
    assert seen[0] is None  # nothing to compare with
    assert [0.0 < stability <= 1.0 for stability in seen[1:]] == [True, True]


def test_a_score_is_never_of_another_text_nor_of_a_model_that_is_not_finite(make_run: MakeRun) -> None:
    run = make_run(SHORT)
    assert run_in(train, [str(run)]) == 0
    trained = read_json(run / "train.json")
    (run / "train.json").write_text(json.dumps(trained | {"tokens_sha256": "another"}))
    assert run_in(evaluate, [str(run)]) == 1
    error = read_json(run / "error.json")
    assert error["message"] == "wikipedia is no longer the text that checkpoint.pt was trained on; train anew"

    (run / "train.json").write_text(json.dumps(trained))
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    next(iter(checkpoint["model"].values())).fill_(math.nan)
    torch.save(checkpoint, run / "checkpoint.pt")
    assert run_in(evaluate, [str(run)]) == 1
    assert read_json(run / "error.json")["error"] == "non_finite"
    assert not (run / "score.json").exists()


def test_benchmark_sets_are_scored_beside_val(make_run: MakeRun, data_dir: Path, tmp_path: Path) -> None:
    own = tmp_path / "data"
    shutil.copytree(data_dir, own, ignore=shutil.ignore_patterns("*.lock"))
    (own / "benchmarks").mkdir()
    lines = [json.dumps({"text": f"The {animal} drinks.", "topic": animal}) for animal in ("cat", "cow")]
    (own / "benchmarks" / "animals.jsonl").write_text("\n".join(lines))
    run = make_run(SHORT, data_dir=str(own))
    assert run_in(train, [str(run)]) == 0
    assert run_in(evaluate, [str(run)]) == 0
    score = read_json(run / "score.json")
    row = score["benchmarks"]["animals"]
    assert score["benchmark_animals"] == row["bpb"] != score["val_bpb"]
    assert set(row["bpb_by_topic"]) == {"cat", "cow"}
    assert row["bytes"] == 2 * len("The cat drinks.\0") - 1  # all but the first token are predicted
    assert row["train_overlap"] == 0.0


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tokenizer": "bpe", "vocab_size": 300, "logit_softcap": 15.0},
        {"routing": "hash", "n_layers": 3, "first_k_dense": 1},
        {"routing": "expert_choice", "num_shared_experts": 1},
    ],
    ids=["plain", "bpe with soft-cap", "hash, partly dense", "expert choice"],
)
def test_parts_of_the_score_add_up_to_what_a_plain_loop_counts(overrides: dict[str, Any]) -> None:
    config = apply(SHORT, overrides)
    data = _text(config, documents=20, topics=3)
    model = _model(config)
    n_targets, window = 300, config.seq_len
    score = score_tokens(model, data, "val", n_targets, CPU)

    nats, tokens = np.zeros((3, window)), torch.from_numpy(data.tokens["val"].astype(np.int64))
    n_bytes, by_topic, right = 0, np.zeros((2, 3)), 0
    for first in range(0, n_targets, window):
        size = min(window, n_targets - first)
        logits = model.logits(tokens[None, first : first + size])[0]
        for place in range(size):
            target = int(tokens[first + place + 1])
            loss = float(F.cross_entropy(logits[place], tokens[first + place + 1]))
            document = max(n for n, start in enumerate(data.starts["val"]) if start <= first + place + 1)
            topic = data.topics["val"][document]
            nats[:, place] += loss, data.id_bytes[target], 1
            by_topic[:, topic] += loss, data.id_bytes[target]
            n_bytes += int(data.id_bytes[target])
            right += int(logits[place].argmax()) == target

    assert (score.tokens, score.bytes) == (n_targets, n_bytes)
    assert score.nats == pytest.approx(nats[0].sum(), rel=1e-5)
    found = quality(score)
    for number, name in enumerate(data.topic_names):
        assert found["bpb_by_topic"][name]["bpb"] == pytest.approx(
            by_topic[0, number] / by_topic[1, number] / math.log(2), rel=1e-5
        )
        assert found["bpb_by_topic"][name]["bytes"] == by_topic[1, number]

    bins = [(row["first"], row["last"]) for row in found["nats_by_position"]]
    assert bins == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64)]
    assert found["nats_by_position"][3]["nats"] == pytest.approx(nats[0, 4:8].sum() / nats[2, 4:8].sum(), rel=1e-5)
    late = nats[:, window // 2 :].sum(axis=1)
    assert found["bpb_late"] == pytest.approx(late[0] / late[1] / math.log(2), rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / n_targets)
    assert sum(row["tokens"] for row in found["reliability"]) == n_targets
    assert len(found["layers"]) == sum(config.moe_layers)
    assert (found["router_margin"] is None) == (config.routing != "token_choice")
    if config.routing != "expert_choice":
        documents = np.searchsorted(data.starts["val"], np.arange(n_targets), side="right") - 1
        chosen = torch.from_numpy(np.bincount(documents)) * config.top_k
        assert all(torch.equal(counts.sum(dim=1), chosen) for counts in score.routers.counts_L)

    active = sum(sum(layer["load"]) for layer in found["layers"]) / len(found["layers"])
    assert active == (config.top_k * n_targets)


def test_a_score_does_not_depend_on_how_the_model_trains() -> None:
    config = apply(SHORT, {"router_precision": "low"})
    data = _text(config, documents=20, topics=3)
    plain = score_tokens(_model(config), data, "val", 300, CPU)
    trained = {"capacity_factor": 0.5, "noisy_top_k": True, "routing_group": 2, "activation_checkpointing": True}
    model = MoE(apply(config, trained), torch.bfloat16)
    model.load_state_dict(_model(config).state_dict(), strict=False)  # that of the noise is not used
    assert score_tokens(model.train(), data, "val", 300, CPU).nats == plain.nats
    assert model.compute is torch.bfloat16


def test_score_is_the_sum_of_cross_entropies_to_the_bit() -> None:
    config = apply(SHORT, {"logit_softcap": 15.0})
    model = _model(config)
    tokens, targets = torch.randint(256, (2, 4, 64), generator=torch.Generator().manual_seed(0))
    x, _ = model.hidden(tokens)
    predictions = predict(x, model.head_weight, targets.flatten(), config.logit_softcap)
    logits = model.logits(tokens).flatten(0, 1)
    assert torch.equal(predictions.nats, F.cross_entropy(logits, targets.flatten(), reduction="sum"))
    torch.testing.assert_close(predictions.nats_N, F.cross_entropy(logits, targets.flatten(), reduction="none"))

    chunked = predict(x, model.head_weight, targets.flatten(), config.logit_softcap, logits=256 * 7)
    torch.testing.assert_close(chunked, predictions)


def test_calibration_error_is_the_distance_of_confidence_and_accuracy() -> None:
    # One bin at confidence .5 that is right every time, one at .9 that is right half the time.
    confidence = torch.tensor([0.5] * 10 + [0.9] * 30)
    correct = torch.tensor([True] * 10 + [True, False] * 15)
    tally = PredictionTally(40, ["text"])
    predictions = Predictions(torch.zeros(()), torch.ones(40), confidence, correct)
    tally.add(predictions, np.ones(40, dtype=np.int64), np.zeros(40, dtype=np.int32), 40)
    assert tally.calibration_error == pytest.approx((10 * 0.5 + 30 * 0.4) / 40)
    assert tally.confidence - tally.accuracy == pytest.approx((5 + 27 - 25) / 40)
    assert tally.reliability() == [
        {"confidence": pytest.approx(0.5), "accuracy": 1.0, "tokens": 10},
        {"confidence": pytest.approx(0.9), "accuracy": 0.5, "tokens": 30},
    ]


def test_information_is_all_of_the_topic_where_experts_are_topics_and_nothing_at_random() -> None:
    generator = np.random.default_rng(0)
    topics = np.arange(200, dtype=np.int32) % 4
    experts = np.zeros((200, 4), dtype=np.int64)
    experts[np.arange(200), topics] = 100
    known = topic_information(experts, topics, 4)
    assert known is not None
    assert known.share == pytest.approx(1.0, abs=0.05)
    assert known.bits + known.chance == pytest.approx(2.0)

    # Each document has experts of its own taste, whatever its topic: what is found is chance, and that is not small.
    tastes = [generator.multinomial(100, generator.dirichlet([0.3] * 4, size=200)) for _ in range(20)]
    blind = [found for taste in tastes if (found := topic_information(taste, topics, 4))]
    assert len(blind) == 20
    assert abs(np.mean([found.bits for found in blind])) < 0.3 * np.mean([found.chance for found in blind])
    assert all(found.chance > 0.01 for found in blind)
    assert topic_information(experts, np.zeros(200, dtype=np.int32), 4) is None


@pytest.mark.parametrize(
    ("overrides", "defined"),
    [
        ({}, True),
        ({"router_score": "sigmoid", "balance_bias_rate": 0.01}, True),
        ({"top_k": 4}, False),
        ({"routing": "hash"}, False),
    ],
    ids=["softmax", "sigmoid with bias", "all active", "hash"],
)
def test_margin_is_how_far_the_choice_is_from_another(overrides: dict[str, Any], defined: bool) -> None:
    config = apply(SHORT, overrides)
    model = _model(config)
    mixture = model.mixtures[1]
    x = torch.randn(2, 64, config.d_model, generator=torch.Generator().manual_seed(0))
    if config.balance_bias_rate:
        mixture.balance_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))

    with looking_at(model, sum_margins) as seen:
        _, routing = mixture(x, torch.zeros(2, 64, dtype=torch.long), torch.float32, None)

    (total,) = seen
    assert (total is not None) == defined
    if total is None:
        return

    assert isinstance(routing, TokenChoice)
    logits = x.flatten(0, 1) @ mixture.router.mT
    affinity = logits.softmax(dim=1) if config.router_score == "softmax" else logits.sigmoid()
    choice = affinity + (mixture.balance_bias if config.balance_bias_rate else 0.0)
    chosen = torch.zeros_like(choice, dtype=torch.bool).scatter(1, routing.experts_NK, True)
    expected = choice.masked_fill(~chosen, 9.0).min(dim=1).values - choice.masked_fill(chosen, -9.0).max(dim=1).values
    assert float(total) == pytest.approx(float(expected.sum()), rel=1e-4)
    assert float(total) > 0.0


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice", "hash"])
def test_stability_is_one_until_the_router_moves(routing: str) -> None:
    config = apply(SHORT, {"routing": routing})
    stability = RouterStability(config, _text(config, documents=60, topics=1).tokens["val"], CPU)
    assert stability.tokens_BT.numel() == TOKENS
    model = _model(config).train()
    assert [stability.look(model) for _ in range(2)] == [None, 1.0]
    assert model.training

    resumed = RouterStability(config, _text(config, documents=60, topics=1).tokens["val"], CPU)
    resumed.load_state_dict(stability.state_dict())
    if routing != "hash":
        for mixture in model.mixtures:
            mixture.router.neg_()

        like = stability.look(model)
        assert like is not None
        assert like < 0.5
        assert resumed.look(model) == like


def _model(config: Config) -> MoE:
    model = MoE(config)
    model.init_weights(0)
    return model.eval().requires_grad_(False)


def _text(config: Config, *, documents: int, topics: int) -> Data:
    """Random documents of 8 to 39 tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 40, documents)
    starts = np.cumsum(lengths) - lengths
    tokens = generator.integers(0, config.vocab_size, int(lengths.sum())).astype(np.uint16)
    return Data(
        tokens=dict.fromkeys(("train", "val", "test"), tokens),
        starts=dict.fromkeys(("train", "val", "test"), starts),
        topics=dict.fromkeys(("train", "val", "test"), (np.arange(documents) % topics).astype(np.int32)),
        topic_names=tuple(f"topic {number}" for number in range(topics)),
        id_bytes=generator.integers(1, 6, config.vocab_size).astype(np.uint16),
        train_overlap=dict.fromkeys(("train", "val", "test"), 0.0),
        corpus_sha256="",
        tokens_sha256="",
    )
