"""The average of the weights, against its definition, and where it stands for the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe.average import WeightAverage
from moe.config import apply
from moe.evaluate import evaluate
from moe.model import MoE
from moe.presets import PRESETS
from moe.rundir import run_in
from moe.train import train
from tests.moe.conftest import MakeRun
from tests.moe.runs import make_trainer, read_json, read_points


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


def test_the_average_is_what_is_saved_and_scored(make_run: MakeRun, data_dir: Path) -> None:
    config = apply(PRESETS["nano"], {"budget_tokens": 512 * 6, "progress_evals": 1, "ema_decay": 0.9})
    run = make_run(config)
    assert [run_in(step, [str(run)]) for step in (train, evaluate)] == [0, 0]
    trainer = make_trainer(config, data_dir)
    points = list(trainer.run())
    assert trainer.average is not None
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    for name, weights in trainer.average.model.state_dict().items():
        assert torch.equal(saved[name], weights)
        assert not torch.equal(saved[name], trainer.model.state_dict()[name])

    written = read_points(run)[-1]["values"]["val_bpb"]
    assert written == points[-1]["values"]["val_bpb"]
    assert written == pytest.approx(read_json(run / "score.json")["val_bpb"], rel=1e-6)
