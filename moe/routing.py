"""Token-choice top-k routing as a pure function: which experts a token goes to, with what gate, at what loss.

Load is balanced over *routing groups* of a fixed number of sequences, never over the micro-batch: the balance loss is
a product of two means, so over micro-batches its gradient would depend on how the batch was split. Nothing is dropped:
there is no capacity, so a token's route never depends on later tokens.

N tokens, E experts, K chosen experts a token, G routing groups, M = N / G tokens a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where tokens go. The losses are unweighted means over tokens; load counts tokens sent to each expert."""

    gates_NK: Tensor
    experts_NK: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    load_E: Tensor
    entropy: Tensor


def route(logits_NE: Tensor, *, top_k: int, normalize_gates: bool, tokens_per_group: int) -> Routing:
    """Choose each token's `top_k` experts by softmax over `logits_NE` (fp32 or wider)."""
    z_N = logits_NE.logsumexp(dim=-1)
    log_probs_NE = logits_NE - z_N[:, None]
    probs_NE = log_probs_NE.exp()
    gates_NK, experts_NK = probs_NE.topk(top_k, dim=-1)
    if normalize_gates:
        gates_NK = gates_NK / gates_NK.sum(dim=-1, keepdim=True)

    n_tokens, n_experts = logits_NE.shape
    load_GE = _count(experts_NK.reshape(n_tokens // tokens_per_group, -1), n_experts)
    return Routing(
        gates_NK=gates_NK,
        experts_NK=experts_NK,
        balance_loss=_balance_loss(probs_NE, load_GE, tokens_per_group * top_k),
        z_loss=z_N.square().mean(),
        load_E=load_GE.sum(dim=0),
        entropy=-(probs_NE * log_probs_NE).detach().sum(dim=-1).mean(),
    )


def _balance_loss(probs_NE: Tensor, load_GE: Tensor, assignments: int) -> Tensor:
    # Switch Transformer, arXiv:2101.03961, equation 4, with top_k choices: E * sum_e f_e P_e, which is 1 when balanced.
    n_groups, n_experts = load_GE.shape
    fraction_GE = load_GE.to(probs_NE.dtype) / assignments
    mean_probs_GE = probs_NE.reshape(n_groups, -1, n_experts).mean(dim=1)
    return n_experts * (fraction_GE * mean_probs_GE).sum(dim=-1).mean()


def _count(experts_GM: Tensor, n_experts: int) -> Tensor:
    zeros_GE = torch.zeros(experts_GM.shape[0], n_experts, dtype=torch.long, device=experts_GM.device)
    return zeros_GE.scatter_add_(1, experts_GM, torch.ones_like(experts_GM))
