"""Score a checkpoint: `python -m moe.evaluate DIR`, after moe.train; writes score.json, the only result that counts.

    val_bpb = total nats / ln 2 / total bytes of the text

over the first eval_tokens next tokens of the request's split, each predicted once, in windows of seq_len. A document's
end counts as one byte of text. Always fp32, whatever the training precision; nothing is dropped or noisy. val_bpb
keeps its name on every split; `split` says which. Raise moe.fingerprint.EVALUATOR_VERSION with any change that moves a
score.

What this does not do: trust the training process. Of train.json it takes only the cost, not the quality.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.accounting import account
from moe.config import ConfigError, scientific
from moe.data import Data, prepare, windows
from moe.fingerprint import CORPUS_SHA256, EVALUATOR_VERSION
from moe.health import NonFiniteError
from moe.model import MoE
from moe.rundir import Split, device_of, read_request, run_in, write_json

BATCH_TOKENS = 8192  # tokens a forward pass; large enough for a T4, small enough for any memory


class Score(NamedTuple):
    """Totals over the scored text."""

    nats: float
    tokens: int
    bytes: int
    load: LoadStatistics

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


class LoadStatistics(NamedTuple):
    """How evenly experts are used. imbalance: the largest load over the mean, 1 when even, averaged over layers."""

    imbalance: float
    dead_experts: int


def evaluate(directory: Path) -> None:
    """Score DIR/checkpoint.pt."""
    request = read_request(directory)
    config = request.config
    device = device_of(request)
    if not (directory / "checkpoint.pt").exists():
        raise FileNotFoundError(f"{directory / 'checkpoint.pt'} is missing; moe.train writes it when it completes")

    checkpoint = torch.load(directory / "checkpoint.pt", weights_only=True, map_location=device)
    if checkpoint["config"] != scientific(config) or checkpoint["seed"] != request.seed:
        raise ConfigError("checkpoint.pt was trained with another config or seed than config.json names")

    model = MoE(config)
    model.load_state_dict(checkpoint["model"])
    model.to(device)
    data = prepare(config, request.data_dir)
    score = score_tokens(model, data, request.split, config.eval_tokens, device)
    if not math.isfinite(score.nats):
        raise NonFiniteError("score is not finite", 0)

    trained = json.loads((directory / "train.json").read_text())
    costs = account(config)
    content: dict[str, Any] = {
        "val_bpb": score.bits_per_byte,
        "causal": config.causal,
        "val_loss": score.nats / score.tokens,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "split": request.split,
        "evaluator": EVALUATOR_VERSION,
        "corpus_sha256": CORPUS_SHA256[config.corpus],
        "train_overlap": data.train_overlap[request.split],
        "parameters": costs.parameters,
        "active_parameters": costs.active_parameters,
        "flops": trained["flops"],
        "steps": trained["steps"],
        "train_tokens": trained["tokens"],
        "train_seconds": trained["seconds"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "load_imbalance": score.load.imbalance,
        "dead_experts": score.load.dead_experts,
    }
    write_json(directory / "score.json", content)


@torch.no_grad()
def score_tokens(model: MoE, data: Data, split: Split, n_targets: int, device: torch.device) -> Score:
    """Cross entropy of the first `n_targets` next tokens of a split, in fp32."""
    model.eval()
    trained_in, model.compute = model.compute, None
    config = model.config
    rows = max(1, BATCH_TOKENS // config.seq_len)
    id_bytes = torch.from_numpy(data.id_bytes.astype("int64"))
    nats, n_tokens, n_bytes = 0.0, 0, 0
    load_LE = torch.zeros(sum(config.moe_layers), config.num_experts, dtype=torch.long, device=device)
    for tokens, targets in windows(data.tokens[split], n_targets, config.seq_len, rows):
        output = model(tokens.to(device), targets.to(device))
        nats += float(output.cross_entropy) * targets.numel()
        n_tokens += targets.numel()
        n_bytes += int(id_bytes[targets].sum())
        load_LE += output.load_LE

    model.compute = trained_in
    return Score(nats=nats, tokens=n_tokens, bytes=n_bytes, load=load_statistics(load_LE))


def load_statistics(load_LE: Tensor) -> LoadStatistics:
    """From counts of tokens by layer and expert; an expert is dead if it got none of them."""
    load = load_LE.double()
    return LoadStatistics(
        imbalance=float((load.max(dim=1).values / load.mean(dim=1)).mean()),
        dead_experts=int((load_LE == 0).sum()),
    )


if __name__ == "__main__":
    sys.exit(run_in(evaluate, sys.argv[1:]))
