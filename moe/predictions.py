"""How good predictions are, token by token: by topic of the text, by position in the window, and how well calibrated.

The score's arithmetic is here, apart from moe/loss.py, so that a faster training loss never moves a score.

N tokens, n tokens of one chunk, V vocabulary, D d_model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moe.loss import cap

LOGITS = 2**25
"""Logits held at once. Part of the evaluator: another number adds up in another order, in the last bits."""

BINS = 15
"""Of confidence, equally wide: as in Guo et al. 2017, arXiv:1706.04599."""


class Predictions(NamedTuple):
    """For each target: its cross entropy, the probability of the model's likeliest token, and whether that is it.

    `nats` is the sum of nats_N, added up in the order that defines a score.
    """

    nats: Tensor
    nats_N: Tensor
    confidence_N: Tensor
    correct_N: Tensor


@torch.no_grad()
def predict(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, softcap: float = 0.0, logits: int = LOGITS
) -> Predictions:
    """Predictions from what the head sees, computed in fp32 or wider, holding at most `logits` logits at once."""
    rows = max(1, logits // len(head_VD))
    chunks = zip(torch.split(x_ND, rows), torch.split(targets_N, rows), strict=True)
    parts = [_predict(x_nD, head_VD.to(x_ND.dtype), targets_n, softcap) for x_nD, targets_n in chunks]
    nats, *of_tokens = zip(*parts, strict=True)
    return Predictions(torch.stack(nats).sum(), *(torch.cat(chunks) for chunks in of_tokens))


def _predict(x_nD: Tensor, head_VD: Tensor, targets_n: Tensor, softcap: float) -> Predictions:
    logits_nV = F.linear(x_nD, head_VD)
    wide_nV = cap(logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)), softcap)
    log_probs_nV = wide_nV.log_softmax(dim=1)
    likeliest_n, guess_n = log_probs_nV.max(dim=1)
    return Predictions(
        nats=F.nll_loss(log_probs_nV, targets_n, reduction="sum"),
        nats_N=-log_probs_nV.gather(1, targets_n[:, None])[:, 0],
        confidence_N=likeliest_n.exp(),
        correct_N=guess_n == targets_n,
    )


class PredictionTally:
    """Sums over the scored text, in float64 on the host. Its tables leave out bins without a token."""

    def __init__(self, seq_len: int, topic_names: Sequence[str]) -> None:
        self.topic_names = topic_names
        # Rows: nats, bytes, tokens.
        self.by_position = np.zeros((3, seq_len))
        self.by_topic = np.zeros((3, len(topic_names)))
        # Rows: confidence, correct, tokens.
        self.by_confidence = np.zeros((3, BINS))

    def add(
        self, predictions: Predictions, bytes_N: NDArray[np.int64], topic_N: NDArray[np.int32], window: int
    ) -> None:
        """Take in a batch of windows of `window` tokens, with each target's bytes and the topic of its document."""
        nats_N = predictions.nats_N.double().cpu().numpy()
        confidence_N = predictions.confidence_N.double().nan_to_num().cpu().numpy()  # nats_N tells what is not finite
        correct_N = predictions.correct_N.cpu().numpy()
        _add(self.by_position, np.arange(len(nats_N)) % window, (nats_N, bytes_N))
        _add(self.by_topic, topic_N, (nats_N, bytes_N))
        # As in the paper, a bin is open below and closed above; no confidence is 0.
        bin_N = np.ceil(confidence_N * BINS).astype(np.int64).clip(1, BINS) - 1
        _add(self.by_confidence, bin_N, (confidence_N, correct_N))

    @property
    def accuracy(self) -> float:
        """How often the likeliest token is the next one."""
        return float(self.by_confidence[1].sum() / self.by_confidence[2].sum())

    @property
    def confidence(self) -> float:
        """Mean probability of the likeliest token; above the accuracy, the model is overconfident."""
        return float(self.by_confidence[0].sum() / self.by_confidence[2].sum())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the likeliest token: mean |accuracy - confidence| over bins, by tokens."""
        confidence, correct, tokens = self.by_confidence
        return float(np.abs(correct - confidence).sum() / tokens.sum())

    @property
    def bpb_late(self) -> float:
        """Bits a byte over the second half of the window: with at least seq_len / 2 tokens of context."""
        nats, n_bytes, _ = self.by_position[:, self.by_position.shape[1] // 2 :].sum(axis=1)
        return float(nats / math.log(2) / n_bytes) if n_bytes else self.bpb

    @property
    def bpb(self) -> float:
        """Of the whole text; val_bpb up to rounding, which is added up in another order."""
        nats, n_bytes, _ = self.by_position.sum(axis=1)
        return float(nats / math.log(2) / n_bytes)

    def reliability(self) -> list[dict[str, float]]:
        """The reliability diagram: mean confidence and accuracy of each bin."""
        return [
            {"confidence": confidence / tokens, "accuracy": correct / tokens, "tokens": int(tokens)}
            for confidence, correct, tokens in self.by_confidence.T.tolist()
            if tokens
        ]

    def topics(self) -> dict[str, dict[str, float]]:
        """Bits a byte by topic of the document."""
        return {
            name: {"bpb": nats / math.log(2) / n_bytes, "bytes": int(n_bytes), "tokens": int(tokens)}
            for name, (nats, n_bytes, tokens) in zip(self.topic_names, self.by_topic.T.tolist(), strict=True)
            if n_bytes
        }

    def positions(self) -> list[dict[str, float]]:
        """Nats a token by the tokens of context, `first` to `last`, in bins whose ends double: 1, 2, 3-4, 5-8, ..."""
        rows, first, longest = [], 1, self.by_position.shape[1]
        while first <= longest:
            last = min(longest, 1 << (first - 1).bit_length())
            nats, _, tokens = self.by_position[:, first - 1 : last].sum(axis=1).tolist()
            if tokens:
                rows.append({"first": first, "last": last, "nats": nats / tokens, "tokens": int(tokens)})

            first = last + 1

        return rows


def _add(sums: NDArray[np.float64], bin_N: NDArray[Any], values: tuple[NDArray[Any], NDArray[Any]]) -> None:
    for row, value_N in enumerate((*values, None)):
        sums[row] += np.bincount(bin_N, weights=value_N, minlength=sums.shape[1])
