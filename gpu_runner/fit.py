"""Pre-flight at the claim, against the card that is there: fits, refitted to a smaller micro-batch, waits, or refused.

The micro-batch is not science: a smaller one with more accumulation computes the same gradients, because routing groups
stay whole. So it is changed in the request alone, never in the run's config. A run that runs out of memory nevertheless
steps down in the next attempt, and what was learnt about the card is kept (db/micro_batches.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from db.micro_batches import KnownFit, known_fit, note_fit, note_out_of_memory
from db.queue import Outcome, get_attempt, get_run
from db.records import Attempt, Run, Runner
from db.settings import GpuOptimization
from db.store import Store
from gpu_runner.outcome import OutOfMemory
from moe.accounting import fit_micro_batch, memory_class, peak_memory_bytes
from moe.config import Config
from moe.precision import Precision, precision_on


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What is to become of a claimed run.

    `micro_batch_size` is to be trained with, None where the run has none. Otherwise it is refused for a `problem`, or
    it waits: until no more than `in_use_bytes` of the memory are in use by others, for the reason given.
    """

    micro_batch_size: int | None = None
    problem: str | None = None
    waits: str | None = None
    in_use_bytes: int = 0


def fit_run(store: Store, runner: Runner, run: Run, limits: GpuOptimization, in_use_bytes: int) -> Fit:
    """Whether a run fits the card, of whose memory `in_use_bytes` are in use by others."""
    if run.kind != "train" or "micro_batch_size" not in run.config:
        return Fit()

    config, precision = _read(run, runner)
    known = known_fit(store, runner.hardware_class, memory_class(config, precision))
    share = limits.memory_safety_margin * runner.memory_share
    free = int(share * (runner.memory_bytes - in_use_bytes))
    size = fit_micro_batch(config, free, precision, most=known.most)
    if size is not None:
        return Fit(micro_batch_size=size)

    smallest = fit_micro_batch(config, None, precision, most=config.routing_group) or config.routing_group
    needed = peak_memory_bytes(config.model_copy(update={"micro_batch_size": smallest}), precision)
    whole = int(share * runner.memory_bytes)
    if fit_micro_batch(config, whole, precision, most=known.most) is None:
        return Fit(problem=_refusal(config, smallest, needed, whole, known))

    return Fit(
        waits=(
            f"run {run.id} needs {_gib(needed)} and waits, because others use {_gib(in_use_bytes)} of the "
            f"{_gib(runner.memory_bytes)} on {runner.device_name}"
        ),
        in_use_bytes=runner.memory_bytes - int(needed / share),
    )


def step_down(store: Store, runner: Runner, attempt: Attempt, ended: OutOfMemory) -> Outcome:
    """The outcome of an attempt that ran out of memory: tried again with less, or failed where there is no less."""
    run, size = get_run(store, attempt.run_id), get_attempt(store, attempt.id).micro_batch_size
    failed = Outcome(status="failed", error=ended.reason, log_tail=ended.log_tail, exit_code=ended.exit_code)
    if size is None:
        return failed

    config, precision = _read(run, runner)
    known = note_out_of_memory(store, runner.hardware_class, memory_class(config, precision), size)
    smaller = fit_micro_batch(config, None, precision, most=known.most)
    if smaller is None:
        return failed

    error = f"micro-batches of {size} sequences were too large, {smaller} are tried: {ended.reason}"
    return Outcome(status="refitted", error=error, log_tail=ended.log_tail, exit_code=ended.exit_code)


def note_completed(store: Store, runner: Runner, attempt: Attempt) -> None:
    """Remembers the micro-batch of an attempt that was completed as one that fits."""
    run, size = get_run(store, attempt.run_id), get_attempt(store, attempt.id).micro_batch_size
    if size is not None:
        config, precision = _read(run, runner)
        note_fit(store, runner.hardware_class, memory_class(config, precision), size)


def host_memory_in_use(memory_bytes: int) -> int:
    """How much of so many bytes the machine could not give to a new process; 0 where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0

    available = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), memory_bytes)
    return max(0, memory_bytes - available)


def _read(run: Run, runner: Runner) -> tuple[Config, Precision]:
    config = Config.model_validate(run.config)
    return config, precision_on(runner.device, config.precision)


def _refusal(config: Config, smallest: int, needed: int, allowed: int, known: KnownFit) -> str:
    return (
        f"no micro-batch of {config.seq_len}-token sequences fits: the smallest ({smallest}, one routing group) needs "
        f"{_gib(needed)} of {_gib(allowed)} allowed (memory_safety_margin){known.note}"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
