"""Score a checkpoint: `python -m moe.evaluate DIR`, after moe.train; writes score.json, the only result that counts.

    val_bpb = total nats / ln 2 / total bytes of the text

over the first eval_tokens next tokens of the request's split, each predicted once, in windows of seq_len. A document's
end counts as one byte of text. Always fp32, whatever the training precision; nothing is dropped or noisy. val_bpb
keeps its name on every split; `split` says which. Raise moe.fingerprint.EVALUATOR_VERSION with any change that moves a
score.

The same pass tells what else is known of the model: moe/metrics.py lists it, docs/metrics.md explains it.

What this does not do: trust the training process. Of train.json it takes only the cost, not the quality.

B sequences, T positions, N tokens, D d_model, W documents.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moe.accounting import account
from moe.config import ConfigError, scientific
from moe.data import Data, benchmarks, prepare, windows
from moe.fingerprint import EVALUATOR_VERSION, code_hash
from moe.health import NonFiniteError
from moe.metrics import on_text_set
from moe.model import MoE, looking_at
from moe.predictions import PredictionTally, predict
from moe.rundir import Request, Split, device_of, read_request, run_in, write_json
from moe.specialization import LayerReport, RouterTally, load_statistics, sum_margins

BATCH_TOKENS = 8192  # tokens a forward pass; large enough for a T4, small enough for any memory

ROUTER_METRICS = ("router_entropy", "load_entropy", "router_margin", "expert_topic_mi", "expert_topic_mi_share")
"""Means over the layers with experts."""


class Score(NamedTuple):
    """Totals over the scored text."""

    nats: float
    tokens: int
    bytes: int
    predictions: PredictionTally
    routers: RouterTally

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def require_finite(self) -> None:
        """Raises NonFiniteError if the model's predictions are not numbers."""
        if not math.isfinite(self.nats):
            raise NonFiniteError("score is not finite", 0)


def evaluate(directory: Path) -> None:
    """Score DIR/checkpoint.pt."""
    request = read_request(directory)
    config = request.config
    device = device_of(request)
    model = load_model(directory, request, device)
    data = prepare(config, request.data_dir)
    trained = json.loads((directory / "train.json").read_text())
    if trained["tokens_sha256"] != data.tokens_sha256:
        raise ConfigError(f"{config.corpus} is no longer the text that checkpoint.pt was trained on; train anew")

    score = score_tokens(model, data, request.split, config.eval_tokens, device)
    on_benchmarks = score_benchmarks(model, request, device)
    content: dict[str, Any] = {
        **result(score, data, request),
        "flops": trained["flops"],
        "steps": trained["steps"],
        "train_tokens": trained["tokens"],
        "train_seconds": trained["seconds"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        **quality(score),
        **on_benchmarks,
    }
    write_json(directory / "score.json", content)


def load_model(directory: Path | None, request: Request, device: torch.device) -> MoE:
    """The trained model of DIR/checkpoint.pt.

    Raises:
        ConfigError: `directory` is None, or its checkpoint is of another config or seed than `request`.
        FileNotFoundError: it has no checkpoint.
    """
    if directory is None:
        raise ConfigError(f"kind={request.kind} needs `checkpoint`, the directory of a finished training run")

    path = directory / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; moe.train writes it when it completes")

    checkpoint = torch.load(path, weights_only=True, map_location=device)
    if checkpoint["config"] != scientific(request.config) or checkpoint["seed"] != request.seed:
        raise ConfigError("checkpoint.pt was trained with another config or seed than config.json names")

    model = MoE(request.config)
    model.load_state_dict(checkpoint["model"])
    return model.to(device)


@torch.no_grad()
def score_tokens(model: MoE, data: Data, split: Split, n_targets: int, device: torch.device) -> Score:
    """Cross entropy of the first `n_targets` next tokens of a split, in fp32."""
    model.eval()
    trained_in, model.compute = model.compute, None
    config = model.config
    starts, tokens_N = data.starts[split], data.tokens[split]
    topic_W = data.topics[split][: np.searchsorted(starts, n_targets, side="right")]
    id_bytes = data.id_bytes.astype("int64")
    mixed = [layer for layer, has_experts in enumerate(config.moe_layers) if has_experts]
    predictions = PredictionTally(config.seq_len, data.topic_names)
    routers = RouterTally(mixed, topic_W, len(data.topic_names), config.router_score)
    nats, n_tokens, n_bytes = 0.0, 0, 0
    rows = max(1, BATCH_TOKENS // config.seq_len)
    with looking_at(model, sum_margins) as margins:
        for tokens_BT, targets_BT in windows(tokens_N, n_targets, config.seq_len, rows):
            count = targets_BT.numel()
            x_ND, routings = model.hidden(tokens_BT.to(device))
            predicted = predict(x_ND, model.head_weight, targets_BT.flatten().to(device), config.logit_softcap)
            # The mean in fp32 times the number of tokens, since version 1 of the evaluator.
            nats += float(predicted.nats / count) * count

            bytes_N = id_bytes[targets_BT.flatten().numpy()]
            # The documents of the tokens and, one further, of their targets.
            places = np.arange(n_tokens, n_tokens + count + 1)
            document_N = np.searchsorted(starts, places, side="right") - 1
            predictions.add(predicted, bytes_N, topic_W[document_N[1:]], targets_BT.shape[1])
            routers.add(routings, margins, torch.from_numpy(document_N[:-1]).to(device))
            margins.clear()
            n_tokens += count
            n_bytes += int(bytes_N.sum())

    model.compute = trained_in
    return Score(nats=nats, tokens=n_tokens, bytes=n_bytes, predictions=predictions, routers=routers)


def result(score: Score, data: Data, request: Request) -> dict[str, Any]:
    """What every score.json about a model says first.

    Raises:
        NonFiniteError: the model's predictions are not numbers.
    """
    score.require_finite()
    config = request.config
    costs = account(config)
    return {
        "val_bpb": score.bits_per_byte,
        "causal": config.causal,
        "val_loss": score.nats / score.tokens,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "split": request.split,
        "evaluator": EVALUATOR_VERSION,
        "code": code_hash(),
        "corpus_sha256": data.corpus_sha256,
        "train_overlap": data.train_overlap[request.split],
        "parameters": costs.parameters,
        "active_parameters": costs.active_parameters,
    }


def quality(score: Score) -> dict[str, Any]:
    """Numbers that may be an experiment's metric, then tables."""
    load = load_statistics(score.routers.loads)
    layers = score.routers.report()
    predictions = score.predictions
    return {
        "load_imbalance": load.imbalance,
        "dead_experts": load.dead_experts,
        "bpb_late": predictions.bpb_late,
        "accuracy": predictions.accuracy,
        "confidence": predictions.confidence,
        "calibration_error": predictions.calibration_error,
        **{name: _over_layers(name, layers) for name in ROUTER_METRICS},
        "bpb_by_topic": predictions.topics(),
        "nats_by_position": predictions.positions(),
        "reliability": predictions.reliability(),
        "layers": [layer._asdict() for layer in layers],
    }


def score_benchmarks(model: MoE, request: Request, device: torch.device) -> dict[str, Any]:
    """The user's own text sets (docs/corpora.md): `benchmark_NAME` in bits a byte, as val_bpb, and a table."""
    table = {}
    for name, data in benchmarks(request.config, request.data_dir).items():
        score = score_tokens(model, data, "test", request.config.eval_tokens, device)
        score.require_finite()
        table[name] = {
            "bpb": score.bits_per_byte,
            "bytes": score.bytes,
            "tokens": score.tokens,
            "accuracy": score.predictions.accuracy,
            "calibration_error": score.predictions.calibration_error,
            "bpb_by_topic": score.predictions.topics(),
            "train_overlap": data.train_overlap["test"],
            "sha256": data.corpus_sha256,
        }

    if not table:
        return {}

    return {**{on_text_set(name).name: row["bpb"] for name, row in table.items()}, "benchmarks": table}


def _over_layers(name: str, layers: list[LayerReport]) -> float | None:
    values = [getattr(layer, name) for layer in layers]
    return None if None in values else sum(values) / len(values)


def main(arguments: list[str]) -> int:
    """Returns the exit code of `python -m moe.evaluate`."""
    return run_in(evaluate, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
