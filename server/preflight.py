"""`blueberry preflight`: what a config costs before any run, from the config alone: no torch, no card."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.table import Table

from agents.hands import target_runner
from agents.pairs import shortened
from agents.preflight import Preflight, base_of, preflight
from db.formats import cut, duration, part
from db.lab import Lab
from db.records import Runner
from moe.accounting import fit_micro_batch
from moe.config import Config, ConfigError, apply
from moe.precision import precision_on
from moe.presets import PRESETS
from moe.roofline import speed
from server.desk import FAILED, Desk

T4_GIB = 15
"""What a T4 of nominally 16 GB offers."""

knobs_option = click.option(
    "--set", "knobs", multiple=True, metavar="KNOB=VALUE", help="One config override; may be repeated."
)


def read_knob(text: str) -> tuple[str, Any]:
    """One KNOB=VALUE of the command line; a value that is no JSON is a string.

    Raises:
        click.UsageError: it has no name or no sign of equality.
    """
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise click.UsageError(f"--set {cut(text, 80)}: give it as KNOB=VALUE, such as --set top_k=1")

    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


@click.option("--preset", type=click.Choice(list(PRESETS)), help="Instead of the lab's baseline.")
@knobs_option
def preflight_command(desk: Desk, preset: str | None, knobs: tuple[str, ...]) -> None:
    """Say what a config costs, on a T4 and on this lab's runner: size, FLOPs, memory, speed.

    T4 figures are predictions: their errors are in benchmarks/README.md.
    """
    base = PRESETS[preset] if preset else base_of(desk.lab).config
    try:
        config = apply(base, dict(map(read_knob, knobs)))
    except ConfigError as error:
        raise desk.fail(str(error), FAILED) from None

    runner = target_runner(desk.lab)
    here = preflight(desk.lab, config, runner)
    desk.console.print(
        _table(
            config, here, desk.lab.settings.gpu_optimization.memory_safety_margin, _screening(desk.lab, config, runner)
        )
    )
    for problem in here.problems:
        desk.console.print(f"problem: {problem}", style="red", markup=False)

    desk.say({"config": config.model_dump(mode="json"), **here.model_dump(mode="json")})


def _table(config: Config, cost: Preflight, margin: float, screening: dict[str, str]) -> Table:
    rows = {
        "parameters": f"{cost.parameters:,}",
        "active parameters": f"{cost.active_parameters:,}",
        "training FLOPs a token": f"{cost.flops_per_token:,.0f}",
        "T4: peak memory": _t4_memory(config, cost, margin),
        "T4: tokens/s": "no bf16 on a T4" if cost.t4_tokens_per_second is None else f"{cost.t4_tokens_per_second:,.0f}",
        "T4: where the time goes": _shares(config) if cost.t4_tokens_per_second else "",
        "T4: a run": _t4_run(config, cost),
        "here: peak memory": f"{cost.memory_bytes / 2**30:.2f} GiB, micro-batches of {cost.micro_batch_size}"
        + (f", in each of {cost.processes} processes" if cost.processes > 1 else ""),
        "here: a run": _time(cost.seconds),
    } | screening
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        if value:
            table.add_row(name, value)

    return table


def _screening(lab: Lab, config: Config, runner: Runner | None) -> dict[str, str]:
    """What a run of a screening takes, where that has a part of the budget."""
    share = lab.settings.screen_share
    if share == 1.0:
        return {}

    name = f"here: a run that screens, at {part(share)} of the budget"
    try:
        return {name: _time(preflight(lab, shortened(config, share), runner).seconds)}
    except ConfigError:
        return {name: "that is less than one batch: screened at the whole budget"}


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)


def _t4_memory(config: Config, cost: Preflight, margin: float) -> str:
    said = f"{cost.t4_memory_bytes / 2**30:.2f} GiB of {T4_GIB}, micro-batches of {config.micro_batch_size}"
    if cost.t4_memory_bytes <= T4_GIB * 2**30:
        return said

    smaller = fit_micro_batch(config, int(margin * T4_GIB * 2**30), precision_on("cuda", config.precision))
    return f"{said}: too much; " + ("no smaller one fits" if smaller is None else f"{smaller} would fit")


def _t4_run(config: Config, cost: Preflight) -> str:
    if not cost.t4_tokens_per_second or config.budget_tokens is None:
        return ""

    return f"{duration(config.budget_tokens / cost.t4_tokens_per_second)} of training"


def _shares(config: Config) -> str:
    predicted = speed(config)
    parts = ("body", "head", "elementwise", "waiting", "optimizer", "fixed")
    return ", ".join(f"{name} {getattr(predicted, name) / predicted.step:.0%}" for name in parts)
