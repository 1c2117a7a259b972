"""Before any GPU time is spent: what a treatment would cost, whether it fits, and which limit it breaks. No torch.

A treatment over a limit of gpu_optimization is refused with the number, never clamped: clamping makes dead knobs.
"""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict

from agents.hands import target_runner
from agents.lineage import best_from
from db.champions import list_champions
from db.errors import RefusedError
from db.lab import Lab
from db.micro_batches import KnownFit, known_fit
from db.queries import flops_per_second, seconds_around_training
from db.records import Runner, Value
from db.runners import list_runners
from moe.accounting import account, fit_micro_batch, memory_class, peak_memory_bytes
from moe.config import Config, ConfigError, apply
from moe.fingerprint import pin
from moe.precision import Precision, precision_on
from moe.presets import PRESETS
from moe.roofline import T4, speed
from moe.schedule import micro_batch_rows
from moe.texts import CorpusError

CARD_FLOPS = 13e12
"""Training FLOP/s expected of a card other than a T4 before it has been measured: 20 % of a T4's nominal 65 TFLOP/s in
fp16, since nothing better is known. Of a T4 itself moe/roofline.py knows more."""

CPU_FLOPS_PER_CORE = 12e9
"""Training FLOP/s expected of one CPU core in fp32 before one has been measured."""


START_SECONDS = 8.0
"""What a training run is expected to take beside training (two starts of torch, the evaluation) before one was."""


class Base(BaseModel):
    """The baseline that new experiments of this lab are compared with."""

    model_config = ConfigDict(frozen=True)

    preset: str
    config: Config


class Preflight(BaseModel):
    """What one config costs on one runner: memory in bytes, seconds for a whole run. No `problems`: it may run.

    Memory is that of each of the `processes` that train together, and what each may have. `seconds` is None where
    nothing is known, as of several cards before the first run. The figures for a T4 are predictions for one card, of
    moe/accounting.py and moe/roofline.py, None where a T4 cannot compute it.
    """

    model_config = ConfigDict(frozen=True)

    parameters: int
    active_parameters: int
    flops: float | None
    flops_per_token: float
    memory_bytes: int
    memory_available_bytes: int | None
    micro_batch_size: int
    processes: int
    seconds: float | None
    t4_memory_bytes: int
    t4_tokens_per_second: float | None
    problems: list[str]


def base_of(lab: Lab) -> Base:
    """What new experiments are compared with: the lab's preset with the fields of `baseline` in its configuration, or
    the champion that confirmed gains have led to from there (baseline_from).

    Raises:
        RefusedError: those fields contradict the preset.
    """
    name = lab.settings.preset
    if name == "auto":
        name = "t4" if any(runner.device == "cuda" for runner in list_runners(lab.store)) else "micro"

    fields: dict[str, Value] = dict(lab.settings.baseline)
    if "budget_seconds" in fields:
        fields.setdefault("budget_tokens", None)  # one of the two, and TOML has no word for nothing

    try:
        config = pin(apply(PRESETS[name], fields), lab.data_folder)
        return Base(preset=name, config=_champion(lab, name, config) or config)
    except (ConfigError, CorpusError) as error:
        raise RefusedError(f"the baseline in blueberry.toml cannot be used with preset {name}: {error}") from None


def _champion(lab: Lab, preset: str, config: Config) -> Config | None:
    runner = target_runner(lab)
    if runner is None or lab.settings.baseline_from == "preset":
        return None

    best = best_from(list_champions(lab.store, preset, runner.hardware_class), config)
    return None if best is None else pin(Config.model_validate(best.config), lab.data_folder)


def preflight(lab: Lab, config: Config, runner: Runner | None) -> Preflight:
    """Accounts for `config` on `runner`; without one, for a CPU of this machine's size, without a memory limit."""
    limits = lab.settings.gpu_optimization
    precision = precision_for(config, runner)
    processes = runner.processes if runner else 1
    available = int(runner.memory_bytes * runner.memory_share * limits.memory_safety_margin) if runner else None
    problems = [
        f"{name}={value} is over the limit {limit} ({key} in gpu_optimization)"
        for name, value, limit, key in (
            ("num_experts", config.num_experts, limits.max_experts, "max_experts"),
            ("seq_len", config.seq_len, limits.max_sequence_length, "max_sequence_length"),
        )
        if value > limit
    ]
    known = known_fit(lab.store, runner.hardware_class, memory_class(config, precision)) if runner else KnownFit()
    most = limits.max_batch_size if known.most is None else min(known.most, limits.max_batch_size)
    micro = fit_micro_batch(config, available, precision, most=most)
    if micro is None:
        problems.append(
            f"no micro-batch of {config.seq_len}-token sequences fits: the smallest needs "
            f"{_smallest(config, precision) / 2**30:.1f} GiB of {(available or 0) / 2**30:.1f} GiB allowed, "
            f"with at most {limits.max_batch_size} sequences (max_batch_size){known.note}"
        )

    fitted = config if micro is None else apply(config, {"micro_batch_size": micro})
    rows = micro_batch_rows(fitted, config.batch_size, processes)
    fitted = fitted.model_copy(update={"micro_batch_size": rows})
    cost = account(config)
    rate = flops_per_second(lab.store, runner.hardware_class) if runner else None
    rate = rate or _expected_flops(fitted, runner, precision)
    around = seconds_around_training(lab.store, runner.hardware_class) if runner else None
    training = config.budget_seconds if cost.flops is None else rate and cost.flops / rate
    seconds = None if training is None else training + (START_SECONDS if around is None else around)
    return Preflight(
        parameters=cost.parameters,
        active_parameters=cost.active_parameters,
        flops=cost.flops,
        flops_per_token=cost.flops_per_token,
        memory_bytes=peak_memory_bytes(fitted, precision),
        memory_available_bytes=available,
        micro_batch_size=fitted.micro_batch_size,
        processes=processes,
        seconds=seconds,
        t4_memory_bytes=peak_memory_bytes(config, precision_on("cuda", config.precision)),
        t4_tokens_per_second=None if config.precision == "bf16" else speed(config).tokens_per_second,
        problems=problems,
    )


def precision_for(config: Config, runner: Runner | None) -> Precision:
    """What the config is computed in on a runner: its own precision, or for auto the runner's."""
    if config.precision != "auto":
        return config.precision

    return runner.precision if runner else "fp32"


def _smallest(config: Config, precision: Precision) -> int:
    return peak_memory_bytes(apply(config, {"micro_batch_size": config.routing_group}), precision)


def _expected_flops(config: Config, runner: Runner | None, precision: Precision) -> float | None:
    if runner is None or runner.device == "cpu":
        return CPU_FLOPS_PER_CORE * _cores(runner)

    if runner.cards > 1:  # what the sums of gradients between them cost has never been measured
        return None

    if "T4" in runner.device_name and precision in T4.matmul_flops:
        return speed(config).tokens_per_second * account(config).flops_per_token

    return CARD_FLOPS


def _cores(runner: Runner | None) -> int:
    return runner.threads * runner.processes if runner else os.cpu_count() or 1
