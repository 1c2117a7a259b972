"""Do routers still change their minds? The routing of a fixed text, compared between evaluations during training.

B sequences, T positions, N = B * T tokens, A assignments, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.config import Config
from moe.data import windows
from moe.model import MoE
from moe.routing import Routing
from moe.specialization import assignments
from moe.tokenizer import Tokens

TOKENS = 1024  # an eighth of what a progress evaluation reads


class RouterStability:
    """Remembers where the first tokens of a text went at the last look, also from one checkpoint to a resumed run."""

    def __init__(self, config: Config, tokens: Tokens, device: torch.device) -> None:
        rows = max(1, TOKENS // config.seq_len)
        batches = windows(tokens, rows * config.seq_len, config.seq_len, rows)
        self.tokens_BT = next(batches)[0].to(device)
        self.chosen: list[Tensor] = []

    @torch.no_grad()
    def look(self, model: MoE) -> float | None:
        """The Jaccard index of each token's set of experts now and at the last look, averaged over tokens and layers.

        1 where all stayed, 0 where all moved; None at the first look.
        """
        training, compute = model.training, model.compute
        model.eval()
        model.compute = None
        routings = model.hidden(self.tokens_BT)[1]
        model.train(training)
        model.compute = compute

        before, self.chosen = self.chosen, [_membership(routing, self.tokens_BT.numel()) for routing in routings]
        if not before:
            return None

        return sum(map(_jaccard, before, self.chosen)) / len(before)

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": self.chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.chosen = [member_NE.to(self.tokens_BT.device) for member_NE in state["chosen"]]


def _membership(routing: Routing, n_tokens: int) -> Tensor:
    token_A, expert_A = assignments(routing)
    member_NE = torch.zeros(n_tokens, len(routing.load_E), dtype=torch.bool, device=token_A.device)
    member_NE[token_A, expert_A] = True
    return member_NE


def _jaccard(before_NE: Tensor, after_NE: Tensor) -> float:
    shared_N = (before_NE & after_NE).sum(dim=1)
    either_N = (before_NE | after_NE).sum(dim=1)
    # Under expert choice a token may have no expert at all, before and after: that is no change.
    return float(torch.where(either_N > 0, shared_N / either_N.clamp_min(1), 1.0).double().mean())
