"""What routers have learned: how sure they are, how evenly they spread tokens, and whether experts know a subject.

The information that an expert's choice carries of the topic is read against chance, as in the adjusted mutual
information of Vinh, Epps and Bailey (JMLR 11, 2010): less its mean after the topics were shuffled among the documents.
Whole documents are shuffled, since the tokens of one resemble each other whatever its topic; so a router that knows
words or documents, but no topics, reads about 0.

N tokens, A assignments, E experts, K experts a token, C tokens an expert takes, L layers with experts, W documents,
S topics, D d_model.
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

from moe.layers import Mixture
from moe.routing import ExpertChoice, Routing, Score, losses_of

SHUFFLES = 64  # the mean over them is known to an eighth of their deviation


class Assignments(NamedTuple):
    """Pairs of a token and an expert, whoever chose whom."""

    token_A: Tensor
    expert_A: Tensor


class Information(NamedTuple):
    """What an assignment's expert tells of its topic.

    `bits` is adjusted for chance: it may be a little below 0, and `chance` is what was subtracted. `share` is bits over
    the entropy of the topics.
    """

    bits: float
    share: float
    chance: float


class LoadStatistics(NamedTuple):
    """How evenly experts are used. imbalance: the largest load over the mean, 1 when even, averaged over layers."""

    imbalance: float
    dead_experts: int


class LayerReport(NamedTuple):
    """One layer's router. Entropies in nats.

    `router_margin` is how much more affinity the last chosen expert has than the first one that was not; None where
    tokens choose nothing (hash routing, expert choice, all experts active). The information is None in a text of one
    topic.
    """

    layer: int
    router_entropy: float
    load_entropy: float
    load_imbalance: float
    dead_experts: int
    router_margin: float | None
    expert_topic_mi: float | None
    expert_topic_mi_share: float | None
    expert_topic_mi_chance: float | None
    load: list[int]


class RouterTally:
    """Counts over the scored text, for each layer with experts."""

    def __init__(self, layers: Sequence[int], topic_W: NDArray[np.int32], n_topics: int, score: Score) -> None:
        """`layers` are numbers, from the bottom; `topic_W` the topic of each document that may come."""
        self.layers = layers
        self.score = score
        self.topic_W = topic_W
        self.n_topics = n_topics
        self.tokens = 0
        self.entropy_L = [0.0] * len(layers)
        self.margin_L: list[float | None] = [0.0] * len(layers)
        self.counts_L: list[Tensor] = []

    def add(self, routings: Sequence[Routing], margins: Sequence[Tensor | None], document_N: Tensor) -> None:
        """Take in a pass over tokens of these documents: its routings, and sum_margins() of each layer."""
        if not self.counts_L:
            self.counts_L = [routing.load_E.new_zeros(len(self.topic_W), len(routing.load_E)) for routing in routings]

        n_tokens = len(document_N)
        self.tokens += n_tokens
        for index, (routing, margin) in enumerate(zip(routings, margins, strict=True)):
            pairs = assignments(routing)
            counts_WE = self.counts_L[index]
            place_A = document_N[pairs.token_A] * counts_WE.shape[1] + pairs.expert_A
            counts_WE += torch.bincount(place_A, minlength=counts_WE.numel()).view_as(counts_WE)
            self.entropy_L[index] += float(losses_of([routing], self.score).entropy_L) * n_tokens
            before = self.margin_L[index]
            self.margin_L[index] = None if margin is None or before is None else before + float(margin)

    @property
    def loads(self) -> Tensor:
        """Assignments [L, E]."""
        return torch.stack([counts_WE.sum(dim=0) for counts_WE in self.counts_L])

    def report(self) -> list[LayerReport]:
        """What was seen, layer by layer."""
        return [self._report(index) for index in range(len(self.counts_L))]

    def _report(self, index: int) -> LayerReport:
        counts_WE = self.counts_L[index].cpu().numpy()
        load_E, margin = counts_WE.sum(axis=0), self.margin_L[index]
        topics = topic_information(counts_WE, self.topic_W, self.n_topics)
        return LayerReport(
            layer=self.layers[index],
            router_entropy=self.entropy_L[index] / self.tokens,
            load_entropy=_entropy(load_E),
            load_imbalance=float(load_E.max() / load_E.mean()),
            dead_experts=int((load_E == 0).sum()),
            router_margin=None if margin is None else margin / self.tokens,
            expert_topic_mi=topics and topics.bits,
            expert_topic_mi_share=topics and topics.share,
            expert_topic_mi_chance=topics and topics.chance,
            load=load_E.tolist(),
        )


def load_statistics(load_LE: Tensor) -> LoadStatistics:
    """From counts of tokens by layer and expert; an expert is dead if it got none of them."""
    load = load_LE.double()
    return LoadStatistics(
        imbalance=float((load.max(dim=1).values / load.mean(dim=1)).mean()),
        dead_experts=int((load_LE == 0).sum()),
    )


def assignments(routing: Routing) -> Assignments:
    """Who goes where. In evaluation nothing is dropped."""
    if isinstance(routing, ExpertChoice):
        n_experts, taken = routing.tokens_EC.shape
        experts_E = torch.arange(n_experts, device=routing.tokens_EC.device)
        return Assignments(routing.tokens_EC.flatten(), experts_E.repeat_interleave(taken))

    n_tokens, top_k = routing.experts_NK.shape
    tokens_N = torch.arange(n_tokens, device=routing.experts_NK.device)
    return Assignments(tokens_N.repeat_interleave(top_k), routing.experts_NK.flatten())


def topic_information(counts_WE: NDArray[np.int64], topic_W: NDArray[np.int32], n_topics: int) -> Information | None:
    """Mutual information of expert and topic, from how often each document went to each expert.

    None if there is one topic only.
    """
    one_hot_SW = (np.arange(n_topics)[:, None] == topic_W).astype(np.float64)
    counts = counts_WE.astype(np.float64)
    joint_SE = one_hot_SW @ counts
    entropy = _entropy(joint_SE.sum(axis=1)) / math.log(2)
    if entropy == 0.0:
        return None

    generator = np.random.Generator(np.random.Philox(key=0))
    shuffled = [
        _mutual_information(one_hot_SW[:, generator.permutation(len(topic_W))] @ counts) for _ in range(SHUFFLES)
    ]
    chance = float(np.mean(shuffled))
    bits = _mutual_information(joint_SE) - chance
    return Information(bits=bits, share=bits / entropy, chance=chance)


def sum_margins(mixture: Mixture, x_ND: Tensor) -> Tensor | None:
    """By how much affinity the last chosen expert beats the first one not chosen, summed over tokens.

    With the bias that balances loads, where there is one. None where tokens choose nothing.
    """
    config = mixture.config
    if config.routing != "token_choice" or config.top_k == config.num_experts:
        return None

    logits_NE = F.linear(x_ND, mixture.router)
    choice_NE = logits_NE.softmax(dim=-1) if config.router_score == "softmax" else logits_NE.sigmoid()
    if config.balance_bias_rate > 0.0:
        choice_NE = choice_NE + mixture.balance_bias

    best_NK = choice_NE.topk(config.top_k + 1, dim=-1).values
    return (best_NK[:, -2] - best_NK[:, -1]).double().sum()


def _mutual_information(joint: NDArray[np.float64]) -> float:
    # In bits: H(topic) + H(expert) - H(both).
    return (_entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1)) - _entropy(joint)) / math.log(2)


def _entropy(counts: NDArray[Any]) -> float:
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
