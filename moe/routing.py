"""Routing as pure functions: which experts a token goes to, with what gate, at what loss.

Load is balanced, and capacity given, over *routing groups* of a fixed number of tokens, never over the micro-batch: the
balance loss is a product of two means, so over micro-batches its gradient would depend on how the batch was
split. Where a capacity is configured, tokens are served in the order of their positions, so that a token can lose its
place to earlier positions only. Expert choice is not causal: which tokens an expert takes depends on later ones.

N tokens, E experts, K chosen experts a token, G routing groups, M = N / G tokens a group, T tokens a sequence,
C tokens that an expert takes.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]


class Losses(NamedTuple):
    """What a router is judged by. Unweighted means over tokens; entropy in nats, of the normalized affinities."""

    balance: Tensor
    z: Tensor
    entropy: Tensor


class TokenChoice(NamedTuple):
    """Tokens chose experts. A dropped assignment has expert E and gate 0.

    `load_E` counts what was asked for, `kept_E` what was given; `slots` is a bound on kept_E that is known without
    looking at it, None where nothing is dropped.
    """

    gates_NK: Tensor
    experts_NK: Tensor
    load_E: Tensor
    kept_E: Tensor
    slots: int | None
    losses: Losses


class ExpertChoice(NamedTuple):
    """Experts chose tokens: each took C of every group, G * C in all. `load_E` counts them."""

    gates_EC: Tensor
    tokens_EC: Tensor
    load_E: Tensor
    losses: Losses


Routing = TokenChoice | ExpertChoice


def choose_experts(
    logits_NE: Tensor,
    *,
    top_k: int,
    score: Score = "softmax",
    normalize_gates: bool,
    tokens_per_group: int,
    seq_len: int,
    capacity_factor: float = 0.0,
    bias_E: Tensor | None = None,
) -> TokenChoice:
    """Each token's `top_k` experts by affinity, in fp32 or wider.

    Args:
        bias_E: added to the affinities for the choice only (Wang et al. 2024, arXiv:2408.15664).
        capacity_factor: an expert keeps at most this times the mean load of a group; 0 drops nothing.
        seq_len: divides tokens_per_group; tells the positions of tokens.
    """
    n_tokens, n_experts = logits_NE.shape
    affinity_NE, losses = _affinity(logits_NE, score)
    choice_NE = affinity_NE if bias_E is None else affinity_NE.detach() + bias_E
    experts_NK = choice_NE.topk(top_k, dim=-1).indices
    gates_NK = affinity_NE.gather(1, experts_NK)
    if normalize_gates:
        gates_NK = gates_NK / gates_NK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(gates_NK.dtype).tiny)

    load_GE = _count(experts_NK.reshape(n_tokens // tokens_per_group, -1), n_experts)
    losses = losses._replace(balance=_balance_loss(affinity_NE, score, load_GE, tokens_per_group * top_k))
    load_E = kept_E = load_GE.sum(dim=0)
    slots = None
    if capacity_factor > 0.0:
        capacity = min(tokens_per_group, math.ceil(capacity_factor * tokens_per_group * top_k / n_experts))
        slots = capacity * len(load_GE)
        late_NK = _rank(experts_NK, load_GE, tokens_per_group, seq_len) >= capacity
        gates_NK = gates_NK.masked_fill(late_NK, 0.0)
        experts_NK = experts_NK.masked_fill(late_NK, n_experts)
        kept_E = load_GE.clamp_max(capacity).sum(dim=0)

    return TokenChoice(gates_NK, experts_NK, load_E, kept_E, slots, losses)


def choose_tokens(logits_NE: Tensor, *, top_k: int, score: Score = "softmax", tokens_per_group: int) -> ExpertChoice:
    """Each expert's best tokens of every group, so many that a token gets `top_k` experts on average.

    Expert choice, arXiv:2202.09368: gates are the affinities themselves; the load is even by construction, so there is
    no balance loss.
    """
    n_tokens, n_experts = logits_NE.shape
    affinity_NE, losses = _affinity(logits_NE, score)
    n_groups = n_tokens // tokens_per_group
    taken = min(tokens_per_group, max(1, tokens_per_group * top_k // n_experts))
    gates_GEC, tokens_GEC = affinity_NE.view(n_groups, tokens_per_group, n_experts).transpose(1, 2).topk(taken, dim=-1)
    offsets_G = torch.arange(n_groups, device=logits_NE.device) * tokens_per_group
    return ExpertChoice(
        gates_EC=gates_GEC.transpose(0, 1).flatten(1),
        tokens_EC=(tokens_GEC + offsets_G[:, None, None]).transpose(0, 1).flatten(1),
        load_E=torch.full((n_experts,), n_groups * taken, device=logits_NE.device),
        losses=losses,
    )


def hash_experts(experts_NK: Tensor, n_experts: int, dtype: torch.dtype) -> TokenChoice:
    """Experts fixed by the token id, with equal gates: hash layers, arXiv:2106.04426, a control without a router."""
    top_k = experts_NK.shape[1]
    zero = torch.zeros((), dtype=dtype, device=experts_NK.device)
    load_E = _count(experts_NK.reshape(1, -1), n_experts)[0]
    return TokenChoice(
        gates_NK=torch.full_like(experts_NK, 1.0 / top_k, dtype=dtype),
        experts_NK=experts_NK,
        load_E=load_E,
        kept_E=load_E,
        slots=None,
        losses=Losses(zero, zero, zero + math.log(top_k)),
    )


def _affinity(logits_NE: Tensor, score: Score) -> tuple[Tensor, Losses]:
    z_N = logits_NE.logsumexp(dim=-1)
    if score == "softmax":
        log_probs_NE = logits_NE - z_N[:, None]
        affinity_NE = log_probs_NE.exp()
    else:
        affinity_NE = logits_NE.sigmoid()
        log_probs_NE = _normalized(affinity_NE.detach()).log()

    entropy = torch.special.entr(log_probs_NE.detach().exp()).sum(dim=-1).mean()
    return affinity_NE, Losses(balance=torch.zeros_like(entropy), z=z_N.square().mean(), entropy=entropy)


def _normalized(affinity_NE: Tensor) -> Tensor:
    return affinity_NE / affinity_NE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(affinity_NE.dtype).tiny)


def _balance_loss(affinity_NE: Tensor, score: Score, load_GE: Tensor, assignments: int) -> Tensor:
    # Switch Transformer, arXiv:2101.03961, equation 4, with top_k choices: E * sum_e f_e P_e, which is 1 when balanced.
    # Sigmoid affinities are normalized for it, as in DeepSeek-V3, arXiv:2412.19437, equation 18.
    probs_NE = affinity_NE if score == "softmax" else _normalized(affinity_NE)
    n_groups, n_experts = load_GE.shape
    fraction_GE = load_GE.to(probs_NE.dtype) / assignments
    mean_probs_GE = probs_NE.reshape(n_groups, -1, n_experts).mean(dim=1)
    return n_experts * (fraction_GE * mean_probs_GE).sum(dim=-1).mean()


def _rank(experts_NK: Tensor, load_GE: Tensor, tokens_per_group: int, seq_len: int) -> Tensor:
    """How many assignments of its group come before each one at its expert: earlier positions first."""
    n_tokens, top_k = experts_NK.shape
    # [groups, sequences, positions, K], positions first: then a later one is never served before an earlier.
    shape = (n_tokens // tokens_per_group, tokens_per_group // seq_len, seq_len, top_k)
    experts_GA = experts_NK.view(shape).transpose(1, 2).reshape(shape[0], -1)
    order_GA = experts_GA.argsort(dim=1, stable=True)
    before_GE = load_GE.cumsum(dim=1) - load_GE
    places_GA = torch.arange(experts_GA.shape[1], device=experts_GA.device).expand_as(experts_GA)
    rank_GA = torch.empty_like(experts_GA).scatter_(1, order_GA, places_GA) - before_GE.gather(1, experts_GA)
    return rank_GA.view(shape[0], seq_len, shape[1], top_k).transpose(1, 2).reshape(n_tokens, top_k)


def _count(experts_GM: Tensor, n_experts: int) -> Tensor:
    zeros_GE = torch.zeros(experts_GM.shape[0], n_experts, dtype=torch.long, device=experts_GM.device)
    return zeros_GE.scatter_add_(1, experts_GM, torch.ones_like(experts_GM))
