"""Seconds before hours: `python -m moe.probe DIR` asks of a config whether each changed knob acts, whether the model
peeks at future tokens, and whether it fits; writes score.json.

A knob acts if it is seen where moe.config.KNOBS declares it (moe/observe.py). Each is judged alone, by setting it back
to the baseline's value within the treatment: a balance weight with a single expert does nothing, whatever it does
elsewhere. Without a baseline only causality and memory are looked at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moe.accounting import account, peak_memory_bytes
from moe.causality import audit
from moe.config import KNOBS, Config, ConfigError, apply
from moe.observe import OBSERVE, Setting, build
from moe.rundir import available_memory, device_of, read_request, resolve_precision, run_in, write_json
from moe.standin import stand_in


def probe(directory: Path) -> None:
    """Probe DIR's config, against its baseline where it has one."""
    request = read_request(directory)
    config = request.config
    device = device_of(request)
    precision = resolve_precision(config, device)
    setting = Setting(request.data_dir, device, request.seed)
    acts = {} if request.baseline is None else judge_changes(config, request.baseline, setting)

    small, _ = stand_in(config, config)
    causality = audit(build(small, request.seed), small)
    costs, peak, memory = account(config), peak_memory_bytes(config, precision), available_memory(device)
    write_json(
        directory / "score.json",
        {
            "acts": acts,
            "causal": causality.causal,
            "declared_causal": config.causal,
            "causal_detail": causality.detail,
            "fits": memory is None or peak <= memory,
            "available_memory_bytes": memory,
            "peak_memory_bytes": peak,
            "parameters": costs.parameters,
            "active_parameters": costs.active_parameters,
            "flops_per_token": costs.flops_per_token,
        },
    )


def judge_changes(config: Config, baseline: Config, setting: Setting) -> dict[str, dict[str, Any]]:
    """For each field in which the two differ: whether it acts, on what, and what was seen."""
    judged = {}
    for name, knob in KNOBS.items():
        if getattr(config, name) != getattr(baseline, name):
            seen = OBSERVE[knob.acts_on](*isolate(name, config, baseline), setting)
            judged[name] = {"acts": seen.acts, "on": knob.acts_on, "detail": seen.detail}

    return judged


def isolate(name: str, config: Config, baseline: Config) -> tuple[Config, Config]:
    """Two configs, baseline's value first, that differ in `name` alone: within the treatment, or else the baseline.

    Where no such pair is valid (a budget in tokens for one in seconds) they are the two themselves.
    """
    try:
        return apply(config, {name: getattr(baseline, name)}), config
    except ConfigError:
        pass

    try:
        return baseline, apply(baseline, {name: getattr(config, name)})
    except ConfigError:
        return baseline, config


def main(arguments: list[str]) -> int:
    """Returns the exit code of `python -m moe.probe`."""
    return run_in(probe, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
