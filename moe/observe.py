"""Where a knob can be seen to act: one observation for each thing that moe.config.Acts may name.

Two configs that differ in one knob go in; whether they differ there, and by how much, comes out. Loss and gradient are
observed on small stand-ins (moe/standin.py) in float64 on the CPU, on real text, so that equal means equal.

What this does not say: whether a knob helps, or that a clipping threshold met in the first updates still
matters in the thousandth.

B sequences, T positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe.accounting import peak_memory_bytes
from moe.average import WeightAverage
from moe.config import Config, after_training
from moe.data import batch, prepare
from moe.knobs import ActsOn
from moe.model import MoE
from moe.noise import router_noise
from moe.optim import build_optimizers, set_learning_rate
from moe.post.serve import served_loss
from moe.rundir import resolve_precision
from moe.schedule import Position, batch_at, learning_rate, pieces_at, progress_at
from moe.standin import stand_in

TOLERANCE = 1e-9  # relative; rounding in float64 stays below 1e-12 here
UPDATES = 4  # Adam's first update has nearly no scale: clipping and betas show from the second on
CLOCK_POINTS, MOST_STEPS = 1000, 100_000  # of a schedule that are looked at


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
    """The training loss of the first batch and, after an update, of the second, at equal seed.

    The second, since a network whose output projections start at zero hides what is before them. In float64, except for
    a knob about precision: that one is looked at in the precision of this device's runs.
    """
    low = a.router_precision != b.router_precision and resolve_precision(a, setting.device) != "fp32"
    seen_a, seen_b = (_trained(*sides, setting, 2, low=low) for sides in zip((a, b), stand_in(a, b), strict=True))
    pairs = list(zip(seen_a.losses, seen_b.losses, strict=True))
    shown = next((pair for pair in pairs if _differ(*pair)), pairs[0])
    return Observation(_differ(*shown), f"first losses {shown[0]:.6f} and {shown[1]:.6f} nats")


def observe_gradient(a: Config, b: Config, setting: Setting) -> Observation:
    """What would be scored after a few real updates, at equal seed: weights, or their average, and biases."""
    seen_a, seen_b = (_trained(*sides, setting, UPDATES) for sides in zip((a, b), stand_in(a, b), strict=True))
    nothing = torch.zeros(())
    apart = max(
        float((seen_a.scored.get(name, nothing) - seen_b.scored.get(name, nothing)).abs().max())
        for name in {*seen_a.scored, *seen_b.scored}
    )
    apart /= max(float(tensor.abs().max()) for tensor in seen_a.scored.values())
    norms = seen_a.norms + seen_b.norms
    return Observation(
        apart > TOLERANCE,
        f"after {UPDATES} updates weights differ by {apart:.1e} (gradient norms {min(norms):.2g} to {max(norms):.2g})",
    )


def observe_schedule(a: Config, b: Config, setting: Setting) -> Observation:
    """The whole run's learning rates, batch sizes and sequence lengths, and its length."""
    if (a.budget_tokens, a.budget_seconds) != (b.budget_tokens, b.budget_seconds):
        return Observation(True, f"budget of {_budget(a)} and {_budget(b)}")

    steps_a, steps_b = list(_steps(a)), list(_steps(b))
    shapes_a, shapes_b = ({(step[1], step[2]) for step in steps} for steps in (steps_a, steps_b))
    if shapes_a != shapes_b:
        text = " and ".join(_stages(steps) for steps in (steps_a, steps_b))
        return Observation(True, f"batches of (sequences, pieces) {text}")

    changed = [abs(x[0] - y[0]) for x, y in zip(steps_a, steps_b, strict=True) if _differ(x[0], y[0])]
    part = len(changed) / len(steps_a)
    return Observation(
        bool(changed),
        f"learning rate differs in {part:.0%} of the run, by up to {max(changed, default=0):.2g}",
    )


def observe_evaluation(a: Config, b: Config, setting: Setting) -> Observation:
    """How much text is scored, and how often; for what is done after training, what it does to a model's loss."""
    if after_training(a) != after_training(b):
        losses = [served_loss(c, setting.data_dir, setting.seed) for c in (a, b)]
        return Observation(_differ(*losses), f"loss of the served model {losses[0]:.6f} and {losses[1]:.6f} nats")

    scored = [min(c.eval_tokens, len(prepare(c, setting.data_dir).tokens["val"]) - 1) for c in (a, b)]
    plans = [f"{n} tokens, {c.progress_evals} evaluations" for n, c in zip(scored, (a, b), strict=True)]
    return Observation(plans[0] != plans[1], f"{plans[0]} and {plans[1]}")


def observe_memory(a: Config, b: Config, setting: Setting) -> Observation:
    """The estimate of peak memory."""
    peaks = [peak_memory_bytes(c, resolve_precision(c, setting.device)) for c in (a, b)]
    return Observation(peaks[0] != peaks[1], f"peak of {peaks[0] / 2**20:.0f} and {peaks[1] / 2**20:.0f} MiB")


def observe_speed(a: Config, b: Config, setting: Setting) -> Observation:
    """The precision that this device computes in, and whether it may choose among kernels."""
    kinds = [_kernels(c, setting.device) for c in (a, b)]
    return Observation(kinds[0] != kinds[1], f"{kinds[0]} and {kinds[1]} on {setting.device.type}")


OBSERVE: Mapping[ActsOn, Callable[[Config, Config, Setting], Observation]] = {
    "loss": observe_loss,
    "gradient": observe_gradient,
    "schedule": observe_schedule,
    "evaluation": observe_evaluation,
    "memory": observe_memory,
    "speed": observe_speed,
}


class _Training(NamedTuple):
    """Of a stand-in's first updates: the loss and the gradient's norm at each, and what would be scored after them."""

    losses: list[float]
    norms: list[float]
    scored: dict[str, Tensor]


def _trained(config: Config, small: Config, setting: Setting, updates: int, *, low: bool = False) -> _Training:
    # At the peak learning rate: the schedule is observed elsewhere.
    model = build(small, setting.seed)
    if low:
        model = model.float()
        model.compute = torch.bfloat16  # on the CPU, also for fp16: the same question at a similar precision

    optimizers = build_optimizers(model, small)
    average = WeightAverage(model, small.ema_decay) if small.ema_decay > 0.0 else None
    set_learning_rate(optimizers, config.lr)
    losses, norms = [], []
    for arguments in itertools.islice(_batches(config, small, setting), updates):
        model.zero_grad()
        output = model(*arguments)
        output.loss.backward()
        losses.append(float(output.loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), small.grad_clip)))
        for optimizer in optimizers:
            optimizer.step()

        model.update_balance(output.load_LE)
        if average is not None:
            average.update(model)

    scored = model if average is None else average.model
    return _Training(losses, norms, scored.state_dict())


def _batches(config: Config, small: Config, setting: Setting) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    # Real text in the config's own tokenizer, its ids folded into the stand-in's vocabulary.
    tokens = prepare(config, setting.data_dir).tokens["train"]
    for step in range(UPDATES):
        first, size = step * small.batch_size, small.batch_size
        tokens_BT, targets_BT = batch(tokens, small, seed=setting.seed, first=first, size=size)
        noise = router_noise(small, seed=setting.seed, first=first, count=size)
        yield tokens_BT % small.vocab_size, targets_BT % small.vocab_size, noise


def _steps(config: Config) -> Iterator[tuple[float, int, int]]:
    """Learning rate, batch size and pieces of every step, or of every so many: CLOCK_POINTS of a budget in seconds."""
    position, stride = Position(), 1 if config.steps is None else -(-config.steps // MOST_STEPS)
    while size := batch_at(config, position):
        yield learning_rate(config, progress_at(config, position)), size, pieces_at(config, position)
        if config.budget_seconds is None:
            position = Position(sequences=position.sequences + size * stride)
        else:
            position = Position(seconds=position.seconds + config.budget_seconds / CLOCK_POINTS)


def _stages(steps: Iterable[tuple[float, int, int]]) -> str:
    return ", ".join(str(shape) for shape in dict.fromkeys((size, pieces) for _, size, pieces in steps))


def _kernels(config: Config, device: torch.device) -> str:
    deterministic = config.deterministic and device.type == "cuda"
    return resolve_precision(config, device) + (" in deterministic kernels" if deterministic else "")


def _budget(config: Config) -> str:
    return f"{config.budget_seconds} seconds" if config.steps is None else f"{config.steps} steps"


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > TOLERANCE * max(abs(a), abs(b))
