"""Where a knob can be seen to act: one observation for each thing that moe.config.Acts may name.

Two configs that differ in one knob go in; whether they differ there, and by how much, comes out. Loss and gradient are
observed on small stand-ins (moe/standin.py) in float64 on the CPU, on real text, so that equal means equal.

What this does not say: whether a knob helps, or that a clipping threshold met in the first updates still
matters in the thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.accounting import peak_memory_bytes
from moe.config import Config
from moe.data import batch, prepare
from moe.knobs import ActsOn
from moe.model import MoE
from moe.optim import build_optimizer, learning_rate, progress_of, set_learning_rate
from moe.rundir import resolve_precision
from moe.standin import stand_in

TOLERANCE = 1e-9  # relative; rounding in float64 stays below 1e-12 here
UPDATES = 4  # Adam's first update has nearly no scale: clipping and betas show from the second on
CLOCK_POINTS = 1000


@dataclass(frozen=True)
class Observation:
    """Whether a knob acts on what it is declared to act on, and what was seen."""

    acts: bool
    detail: str


@dataclass(frozen=True)
class Setting:
    """What an observation needs besides the two configs."""

    data_dir: Path
    device: torch.device
    seed: int


def build(config: Config, seed: int) -> MoE:
    """A model in float64."""
    model = MoE(config)
    model.init_weights(seed)
    return model.double()


def observe_loss(a: Config, b: Config, setting: Setting) -> Observation:
    """The training loss of the first batch, at equal seed."""
    losses = [_first_loss(*sides, setting) for sides in zip((a, b), stand_in(a, b), strict=True)]
    return Observation(_differ(*losses), f"first loss {losses[0]:.6f} and {losses[1]:.6f} nats")


def observe_gradient(a: Config, b: Config, setting: Setting) -> Observation:
    """The weights after a few real updates, at equal seed."""
    weights_a, norms_a = _updated(a, stand_in(a, b)[0], setting)
    weights_b, norms_b = _updated(b, stand_in(a, b)[1], setting)
    apart = float((weights_a - weights_b).abs().max() / weights_a.abs().max())
    norms = f"{min(norms_a + norms_b):.2g} to {max(norms_a + norms_b):.2g}"
    return Observation(
        apart > TOLERANCE, f"after {UPDATES} updates weights differ by {apart:.1e} (gradient norms {norms})"
    )


def observe_schedule(a: Config, b: Config, setting: Setting) -> Observation:
    """The learning rates of the whole run, and its length."""
    if (a.steps, a.budget_seconds) != (b.steps, b.budget_seconds):
        return Observation(True, f"budget of {_budget(a)} and {_budget(b)}")

    rates_a, rates_b = _learning_rates(a), _learning_rates(b)
    changed = sum(_differ(x, y) for x, y in zip(rates_a, rates_b, strict=True))
    most = max(abs(x - y) for x, y in zip(rates_a, rates_b, strict=True))
    return Observation(
        changed > 0, f"learning rate differs in {changed / len(rates_a):.0%} of the run, by up to {most:.2g}"
    )


def observe_evaluation(a: Config, b: Config, setting: Setting) -> Observation:
    """How much text is scored, and how often."""
    scored = [min(c.eval_tokens, len(prepare(c, setting.data_dir).tokens["val"]) - 1) for c in (a, b)]
    plans = [f"{n} tokens, {c.progress_evals} evaluations" for n, c in zip(scored, (a, b), strict=True)]
    return Observation(plans[0] != plans[1], f"{plans[0]} and {plans[1]}")


def observe_memory(a: Config, b: Config, setting: Setting) -> Observation:
    """The estimate of peak memory."""
    peaks = [peak_memory_bytes(c, resolve_precision(c, setting.device)) for c in (a, b)]
    return Observation(peaks[0] != peaks[1], f"peak of {peaks[0] / 2**20:.0f} and {peaks[1] / 2**20:.0f} MiB")


def observe_speed(a: Config, b: Config, setting: Setting) -> Observation:
    """The precision that this device computes in."""
    precisions = [resolve_precision(c, setting.device) for c in (a, b)]
    return Observation(precisions[0] != precisions[1], f"{precisions[0]} and {precisions[1]} on {setting.device.type}")


OBSERVE: Mapping[ActsOn, Callable[[Config, Config, Setting], Observation]] = {
    "loss": observe_loss,
    "gradient": observe_gradient,
    "schedule": observe_schedule,
    "evaluation": observe_evaluation,
    "memory": observe_memory,
    "speed": observe_speed,
}


def _first_loss(config: Config, small: Config, setting: Setting) -> float:
    model = build(small, setting.seed)
    with torch.no_grad():
        return float(model(*next(_batches(config, small, setting))).loss)


def _updated(config: Config, small: Config, setting: Setting) -> tuple[Tensor, list[float]]:
    # At the peak learning rate: the schedule is observed elsewhere.
    model = build(small, setting.seed)
    optimizer = build_optimizer(model, small)
    set_learning_rate(optimizer, config.lr)
    norms = []
    for tokens_BT, targets_BT in _batches(config, small, setting):
        optimizer.zero_grad()
        model(tokens_BT, targets_BT).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), small.grad_clip)))
        optimizer.step()

    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), norms


def _batches(config: Config, small: Config, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    # Real text in the config's own tokenizer, its ids folded into the stand-in's vocabulary.
    tokens = prepare(config, setting.data_dir).tokens["train"]
    for step in range(UPDATES):
        tokens_BT, targets_BT = batch(tokens, small, seed=setting.seed, step=step)
        yield tokens_BT % small.vocab_size, targets_BT % small.vocab_size


def _learning_rates(config: Config) -> list[float]:
    if config.steps is None:
        return [learning_rate(config, point / CLOCK_POINTS) for point in range(CLOCK_POINTS)]

    return [learning_rate(config, progress_of(config, step, 0.0)) for step in range(config.steps)]


def _budget(config: Config) -> str:
    return f"{config.budget_seconds} seconds" if config.steps is None else f"{config.steps} steps"


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > TOLERANCE * max(abs(a), abs(b))
