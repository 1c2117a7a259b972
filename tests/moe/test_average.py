"""The average of the weights, against its definition."""

from __future__ import annotations

import torch

from moe.average import WeightAverage
from moe.config import apply
from moe.model import MoE
from moe.presets import PRESETS


def test_weights_are_averaged_as_defined_and_counts_are_copied() -> None:
    model = MoE(apply(PRESETS["nano"], {"balance_bias_rate": 0.25}))
    model.init_weights(seed=0)
    average = WeightAverage(model, decay=0.5)
    expected = [weights.detach().double() for weights in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    for update in range(12):  # the decay is 1/10, 2/11, ... and 0.5 from the ninth on
        for weights in model.parameters():
            weights.detach().add_(torch.randn(weights.shape, generator=generator))

        model.update_balance(torch.tensor([[5, 3, 0, 4], [1, 1, 1, 1]]))
        average.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = [
            decay * before + (1 - decay) * weights.detach().double()
            for before, weights in zip(expected, model.parameters(), strict=True)
        ]

    for mine, theirs in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)

    assert average.model.mixtures[0].balance_bias.tolist() == [-3.0, 0.0, 3.0, -3.0]
    assert not any(weights.requires_grad for weights in average.model.parameters())
