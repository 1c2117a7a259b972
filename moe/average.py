"""An exponential moving average of a model's weights, in fp32 (Polyak and Juditsky 1992; arXiv:2411.18704)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from moe.model import MoE


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every step.

    The decay rises to `decay` as (1 + n) / (10 + n) with the number of updates n, as in TensorFlow's
    ExponentialMovingAverage: at `decay` from the start, the initial weights would dominate a short run.
    """

    def __init__(self, model: MoE, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: MoE) -> None:
        """Take in the weights after an optimizer step. Buffers are not learned by gradient, so they are copied."""
        decay = min(self.decay, (1.0 + self.updates) / (10.0 + self.updates))
        self.updates += 1
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        for average, weights in pairs:
            average.lerp_(weights, 1.0 - decay)

        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        updates, weights = state["updates"], state["model"]
        assert isinstance(updates, int)
        assert isinstance(weights, dict)
        self.updates = updates
        self.model.load_state_dict(weights)
