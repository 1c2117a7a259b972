"""Routing as pure functions: which experts a token goes to, with what gate, at what loss.

Load is balanced, and capacity given, over *routing groups* of a fixed number of tokens, never over the micro-batch: the
balance loss is a product of two means, so over micro-batches its gradient would depend on how the batch was
split. Where a capacity is configured, tokens are served in the order of their positions, so that a token can lose its
place to earlier positions only. Expert choice is not causal: which tokens an expert takes depends on later ones.

N tokens, E experts, K chosen experts a token, G routing groups, M = N / G tokens a group of S sequences, T tokens a
sequence, C tokens that an expert takes, L layers with experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]


class Losses(NamedTuple):
    """What routers are judged by, one number a layer: unweighted means over tokens.

    The entropy is that of the normalized affinities, in nats, and has no gradient.
    """

    balance_L: Tensor
    z_L: Tensor
    entropy_L: Tensor


class TokenChoice(NamedTuple):
    """Tokens chose experts. An expert serves at most `capacity` tokens of each group and drops the others; None: all.

    `load_GE` counts the assignments asked for. `row_NK`, where there is a capacity: each assignment's row when every
    expert has G * capacity rows, expert after expert; for a dropped one, the row behind the last. `logits_NE` is None
    where a hash chose.
    """

    gates_NK: Tensor
    experts_NK: Tensor
    load_GE: Tensor
    logits_NE: Tensor | None = None
    capacity: int | None = None
    row_NK: Tensor | None = None

    @property
    def load_E(self) -> Tensor:
        """How many tokens asked for each expert."""
        return self.load_GE.sum(dim=0) if len(self.load_GE) > 1 else self.load_GE[0]

    @property
    def kept_E(self) -> Tensor:
        """How many it was given."""
        return self.load_E if self.capacity is None else self.load_GE.clamp_max(self.capacity).sum(dim=0)


class ExpertChoice(NamedTuple):
    """Experts chose tokens: each took C of every group, G * C in all. `load_E` counts them."""

    gates_EC: Tensor
    tokens_EC: Tensor
    load_E: Tensor
    logits_NE: Tensor


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
        capacity_factor: an expert keeps at most this times the mean load of a group, rounded up; 0 drops nothing.
        seq_len: divides tokens_per_group; tells the positions of tokens.
    """
    n_tokens, n_experts = logits_NE.shape
    if bias_E is None:  # affinities are in the order of their logits
        chosen_NK, experts_NK = logits_NE.topk(top_k, dim=-1)
    else:
        experts_NK = (_affinity(logits_NE.detach(), score) + bias_E).topk(top_k, dim=-1).indices
        chosen_NK = logits_NE.gather(1, experts_NK)

    if score == "sigmoid":
        gates_NK = _normalized(chosen_NK.sigmoid()) if normalize_gates else chosen_NK.sigmoid()
    elif normalize_gates:
        gates_NK = chosen_NK.softmax(dim=-1)  # the others cancel
    else:
        gates_NK = (chosen_NK - logits_NE.logsumexp(dim=-1, keepdim=True)).exp()

    n_groups = n_tokens // tokens_per_group
    if capacity_factor == 0.0:
        return TokenChoice(gates_NK, experts_NK, _count(experts_NK.reshape(n_groups, -1), n_experts), logits_NE)

    capacity = min(tokens_per_group, math.ceil(capacity_factor * tokens_per_group * top_k / n_experts))
    experts_GSTK = experts_NK.view(n_groups, tokens_per_group // seq_len, seq_len, top_k)
    load_GE, row_GSTK = _serve(experts_GSTK, n_experts, capacity)
    return TokenChoice(gates_NK, experts_NK, load_GE, logits_NE, capacity, row_GSTK.view(n_tokens, top_k))


def choose_tokens(logits_NE: Tensor, *, top_k: int, score: Score = "softmax", tokens_per_group: int) -> ExpertChoice:
    """Each expert's best tokens of every group, so many that a token gets `top_k` experts on average.

    Expert choice, arXiv:2202.09368: gates are the affinities themselves; the load is even by construction, so there is
    no balance loss.
    """
    n_tokens, n_experts = logits_NE.shape
    n_groups = n_tokens // tokens_per_group
    taken = min(tokens_per_group, max(1, tokens_per_group * top_k // n_experts))
    affinity_GME = _affinity(logits_NE, score).view(n_groups, tokens_per_group, n_experts)
    gates_GEC, tokens_GEC = affinity_GME.transpose(1, 2).topk(taken, dim=-1)
    offsets_G = torch.arange(n_groups, device=logits_NE.device) * tokens_per_group
    return ExpertChoice(
        gates_EC=gates_GEC.transpose(0, 1).flatten(1),
        tokens_EC=(tokens_GEC + offsets_G[:, None, None]).transpose(0, 1).flatten(1),
        load_E=torch.full((n_experts,), n_groups * taken, device=logits_NE.device),
        logits_NE=logits_NE,
    )


def hash_experts(experts_NK: Tensor, n_experts: int, dtype: torch.dtype) -> TokenChoice:
    """Experts fixed by the token id, with equal gates: hash layers, arXiv:2106.04426, a control without a router."""
    gates_NK = torch.full_like(experts_NK, 1.0 / experts_NK.shape[1], dtype=dtype)
    return TokenChoice(gates_NK, experts_NK, _count(experts_NK.reshape(1, -1), n_experts))


def losses_of(routings: Sequence[Routing], score: Score = "softmax") -> Losses:
    """The losses of all layers of one model, together: a few kernels for all, instead of a few for each.

    Balance is that of Switch Transformer, arXiv:2101.03961, equation 4, with top_k choices: E * sum_e f_e P_e, which is
    1 when balanced; sigmoid affinities are normalized for it, as in DeepSeek-V3, arXiv:2412.19437, equation 18. z is
    that of ST-MoE, arXiv:2202.08906. Both are 0 where there is no router, balance also where experts choose.
    """
    first = routings[0]
    if first.logits_NE is None:
        nothing_L = first.gates_NK.new_zeros(len(routings))
        return Losses(nothing_L, nothing_L, nothing_L + math.log(first.gates_NK.shape[1]))

    logits_LNE = torch.stack([routing.logits_NE for routing in routings if routing.logits_NE is not None])
    z_LN = logits_LNE.logsumexp(dim=-1)
    probs_LNE = logits_LNE.softmax(dim=-1) if score == "softmax" else _normalized(logits_LNE.sigmoid())
    entropy_L = torch.special.entr(probs_LNE.detach()).sum(dim=-1).mean(dim=-1)
    z_L = z_LN.square().mean(dim=-1)
    if isinstance(first, ExpertChoice):
        return Losses(torch.zeros_like(z_L), z_L, entropy_L)

    load_LGE = torch.stack([routing.load_GE for routing in routings if isinstance(routing, TokenChoice)])
    n_layers, n_groups, n_experts = load_LGE.shape
    mean_probs_LGE = probs_LNE.view(n_layers, n_groups, -1, n_experts).mean(dim=2)
    balance_LE = (load_LGE * mean_probs_LGE).sum(dim=1)
    scale = n_experts / first.experts_NK.numel()  # fractions of a group's assignments, the mean over groups
    return Losses(balance_LE.sum(dim=-1) * scale, z_L, entropy_L)


def _affinity(logits_NE: Tensor, score: Score) -> Tensor:
    return logits_NE.softmax(dim=-1) if score == "softmax" else logits_NE.sigmoid()


def _normalized(affinity: Tensor) -> Tensor:
    return affinity / affinity.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(affinity.dtype).tiny)


def _serve(experts_GSTK: Tensor, n_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Each group's load of each expert, and each assignment's row (TokenChoice.row_NK): earlier positions first."""
    n_groups, n_sequences, n_positions, _ = experts_GSTK.shape
    # Counted along positions, then sequences: a later position is never served before an earlier. No sort and no copy;
    # load_GE keeps a number for each logit alive, until the losses have been computed.
    asked_GETS = torch.zeros(
        (n_groups, n_experts, n_positions, n_sequences), dtype=torch.int32, device=experts_GSTK.device
    )
    asked_GETS.permute(0, 3, 2, 1).scatter_(3, experts_GSTK, 1)
    place_GEM = asked_GETS.flatten(2).cumsum(dim=2, dtype=torch.int32)  # the first is 1
    place_GSTK = place_GEM.view_as(asked_GETS).permute(0, 3, 2, 1).gather(3, experts_GSTK)
    rows = n_groups * capacity  # of an expert
    before_G = torch.arange(-1, rows - 1, capacity, device=experts_GSTK.device)
    row_GSTK = (before_G.view(-1, 1, 1, 1) + place_GSTK).add_(experts_GSTK, alpha=rows)
    return place_GEM[:, :, -1], row_GSTK.masked_fill_(place_GSTK > capacity, n_experts * rows)


def _count(experts_GM: Tensor, n_experts: int) -> Tensor:
    zeros_GE = torch.zeros(experts_GM.shape[0], n_experts, dtype=torch.long, device=experts_GM.device)
    ones_GM = experts_GM.new_ones(()).expand_as(experts_GM)  # a plain 1 is more than torch.compile can take
    return zeros_GE.scatter_add_(1, experts_GM, ones_GM)
