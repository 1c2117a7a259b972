"""Training that has gone wrong for good is stopped, with the step and the reason; a spike is survived."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from moe.config import Config, apply
from moe.health import EXPLODED, PATIENCE, DeadRouterError, ExplodingGradientError, NonFiniteError, Watch
from moe.presets import PRESETS
from moe.rundir import run_in
from moe.train import train
from tests.moe.runs import make_trainer, read_json

NANO = apply(PRESETS["nano"], {"budget_tokens": 512 * 60, "progress_evals": 0})
EVEN = torch.ones(2, 4, dtype=torch.long)


def look(watch: Watch, norms: Iterable[float], loads: torch.Tensor = EVEN, *, first: int = 1) -> int:
    """Shows it these steps, numbered from `first`; returns the number of the next one."""
    step = first
    for norm in norms:
        watch.look(step, norm, loads)
        step += 1

    return step


def test_a_gradient_that_stays_far_above_what_it_was_ends_the_run_and_a_spike_does_not() -> None:
    watch = Watch(NANO)
    high = 2.0 * EXPLODED
    next_step = look(watch, [1.0] * PATIENCE)
    next_step = look(watch, [high] * (PATIENCE - 1) + [1.0], first=next_step)  # it came back in time
    next_step = look(watch, [high] * (PATIENCE - 1), first=next_step)
    said = r"gradient norm 2e\+03, over 1000 times the usual 1 for 50 steps, at step 150"
    with pytest.raises(ExplodingGradientError, match=said) as found:
        watch.look(next_step, high, EVEN)

    assert (found.value.code, found.value.step) == ("exploding_gradient", 150)


def test_growth_that_is_slow_or_early_is_none() -> None:
    look(Watch(NANO), [1.1**step for step in range(300)])
    look(Watch(NANO), [1.0, *[5.0 * EXPLODED] * (PATIENCE - 1)])  # nothing is usual yet


@pytest.mark.parametrize(
    ("changes", "stops"),
    [({}, True), ({"top_k": 1}, False), ({"routing": "hash"}, False), ({"num_experts": 2}, False)],
    ids=str,
)
def test_a_layer_that_uses_no_more_experts_than_one_token_needs_is_dead(changes: dict[str, int], stops: bool) -> None:
    config: Config = apply(NANO, changes)
    loads = torch.tensor([[9, 9, 9, 9], [18, 18, 0, 0]])[:, : config.num_experts]
    watch = Watch(config)
    look(watch, [1.0] * (PATIENCE - 1), loads)
    said = "layer 1 of those with experts sent all tokens to 2 experts for 50 steps"
    with pytest.raises(DeadRouterError, match=said) if stops else nullcontext():
        watch.look(PATIENCE, 1.0, loads)


def test_a_resumed_run_is_as_far_from_its_end_as_before() -> None:
    before, after = Watch(NANO), Watch(NANO)
    dead = torch.tensor([[4, 4, 0, 0]])
    look(before, [1.0] * (PATIENCE - 1), dead)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    with pytest.raises(DeadRouterError):
        after.look(PATIENCE, 1.0, dead)


def test_a_router_that_cannot_choose_ends_its_training(make_run: Callable[..., Path]) -> None:
    run = make_run(apply(NANO, {"router_init_scale": 0.0, "router_lr_scale": 0.0}))  # all experts alike, for ever
    assert run_in(train, [str(run)]) == 1
    error = read_json(run / "error.json")
    assert (error["error"], error["step"]) == ("dead_router", PATIENCE)
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 10
    assert not (run / "checkpoint.pt").exists()


def test_numbers_that_are_none_end_the_run_where_they_come_up(data_dir: Path) -> None:
    config = apply(NANO, {"budget_tokens": 512 * 2})
    trainer = make_trainer(config, data_dir)
    points = trainer.run(["every step"])
    next(points)
    trainer.model.embedding.detach()[0] = torch.nan  # of the byte that ends documents
    with pytest.raises(NonFiniteError, match="training loss is not finite at step 2"):
        next(points)

    trainer = make_trainer(config, data_dir)
    trainer.model.embedding.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]
    with pytest.raises(NonFiniteError, match="gradient is not finite at step 1"):
        next(trainer.run())

    trainer = make_trainer(config, data_dir)
    points = trainer.run(["every step"])
    assert [point["step"] for point in (next(points), next(points))] == [1, 2]
    trainer.model.embedding.detach()[0] = torch.nan  # as the last update could have made it
    with pytest.raises(NonFiniteError, match="weights are not finite at step 2"):
        next(points)
