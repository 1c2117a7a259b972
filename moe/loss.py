"""Cross entropy over a vocabulary of any size without ever holding all logits.

With 49,152 words the logits of the t4 preset's micro-batch, their softmax and their gradient take 7 GB at once.

N tokens, n tokens of one chunk, V vocabulary, D d_model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.accounting import LOGITS_CHUNK


def sum_nats(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, softcap: float = 0.0, chunk: int = LOGITS_CHUNK
) -> Tensor:
    """Total cross entropy in nats, holding at most `chunk` logits at once and recomputing them in the backward."""
    head_VD = head_VD.to(x_ND.dtype)
    rows = max(1, chunk // len(head_VD))
    if len(x_ND) <= rows:
        return _nats(x_ND, head_VD, targets_N, softcap)

    parts = [
        checkpoint(_nats, x_nD, head_VD, targets_n, softcap, use_reentrant=False, preserve_rng_state=False)
        for x_nD, targets_n in zip(torch.split(x_ND, rows), torch.split(targets_N, rows), strict=True)
    ]
    return torch.stack(parts).sum()


def cap(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits themselves for 0 (Gemma 2, arXiv:2408.00118)."""
    return logits if softcap == 0.0 else softcap * torch.tanh(logits / softcap)


def _nats(x_nD: Tensor, head_VD: Tensor, targets_n: Tensor, softcap: float) -> Tensor:
    logits_nV = F.linear(x_nD, head_VD)
    wide_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    return F.cross_entropy(cap(wide_nV, softcap), targets_n, reduction="sum")
