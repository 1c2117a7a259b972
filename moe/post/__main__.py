"""Treat and measure a trained model: `python -m moe.post DIR`; writes score.json, as moe/evaluate.py does.

config.json names a `checkpoint`, the directory of a finished training run of the same scientific config and seed. Its
weights are pruned, merged and quantized as the config says, and what comes out is measured: bytes, speed of inference
at the config's precision, and val_bpb by the evaluator of moe/evaluate.py on the same text. The checkpoint is only
read.

What this does not do: measure on another device than this one, or save the model that it made.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from moe.accounting import account
from moe.config import ConfigError
from moe.data import prepare
from moe.evaluate import load_model, quality, result, score_benchmarks, score_tokens
from moe.post.inference import DECODE_BATCH, measure_speed
from moe.post.quantize import weight_bytes
from moe.post.serve import serve
from moe.post.stages import as_served
from moe.rundir import device_of, peak_memory, read_request, resolve_precision, run_in, write_json

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def post(directory: Path) -> None:
    """Do as config.json asks.

    Raises:
        ConfigError: it names no checkpoint, one of another run, or a model that cannot generate.
        FileNotFoundError: the checkpoint is gone.
    """
    request = read_request(directory)
    config = request.config
    if not config.causal:
        raise ConfigError(f"routing={config.routing} looks at later tokens; such a model cannot generate")

    device = device_of(request)
    precision = resolve_precision(config, device)
    data = prepare(config, request.data_dir)
    model = serve(load_model(request.checkpoint, request, device), config, data, STORED[precision])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    speeds = measure_speed(model, data.tokens[request.split])
    peak = peak_memory(device)
    score = score_tokens(model, data, request.split, config.eval_tokens, device)
    on_benchmarks = score_benchmarks(model, request, device)
    costs = account(as_served(config))
    write_json(
        directory / "score.json",
        {
            **result(score, data, request),
            "parameters": costs.parameters,
            "active_parameters": costs.active_parameters,
            "weight_bytes": weight_bytes(model),
            **speeds,
            "decode_batch": DECODE_BATCH,
            "peak_memory_bytes": peak,
            "precision": precision,
            **quality(score),
            **on_benchmarks,
        },
    )


def main(arguments: list[str]) -> int:
    """Returns the exit code of `python -m moe.post`."""
    return run_in(post, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
