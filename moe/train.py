"""Train one model: `python -m moe.train DIR`, where DIR holds config.json (moe/README.md).

Appends to metrics.jsonl as it goes; leaves checkpoint.pt and train.json. The seed determines everything: on a CPU, with
a budget in tokens and a fixed number of threads, the same seed gives the same bits, also when the run was killed and
resumed (moe/checkpoint.py). On CUDA kernels may differ in the last bits.

What this does not do: grade itself (moe/evaluate.py does; val_bpb here is a curve over a small part of
val), or choose the micro-batch (pre-flight does, with moe/accounting.py).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.accounting import account
from moe.checkpoint import Checkpoints, end_by_sigterm, noting_sigterm
from moe.config import Config, scientific
from moe.data import Data, batch, prepare
from moe.evaluate import load_statistics, score_tokens
from moe.model import MoE, Output
from moe.optim import build_optimizer, learning_rate, progress_of, set_learning_rate
from moe.rundir import (
    NonFiniteError,
    Request,
    device_of,
    finite_or_none,
    peak_memory,
    read_request,
    resolve_precision,
    run_in,
    write_atomically,
    write_json,
)

PROGRESS_TOKENS = 8192  # of val, for the curve; the score uses eval_tokens
POINTS = 20  # metric lines a run at least, evenly spaced (fewer only if there are fewer steps)
POINT_SECONDS = 1.0  # and at least one a second

# What a Trainer resumes with: plain numbers, and its parts that have a state_dict().
COUNTERS = ("step", "tokens", "seconds", "evals_done", "points_done", "last_point")
PARTS = ("model", "optimizer", "scaler")


def train(directory: Path) -> None:
    """Train as config.json asks."""
    request = read_request(directory)
    if (directory / "checkpoint.pt").exists():
        raise FileExistsError(f"{directory / 'checkpoint.pt'} exists; a run directory serves one run")

    device = device_of(request)
    precision = resolve_precision(request.config, device)
    data = prepare(request.config, request.data_dir)
    trainer = Trainer(request, data, device)
    checkpoints = Checkpoints(directory, request)
    if request.resume is not None and (state := checkpoints.resume(request.resume)):
        trainer.restore(state)

    with (directory / "metrics.jsonl").open("a") as file, noting_sigterm() as signals:
        for point in trainer.run(signals):
            file.write(json.dumps(point, allow_nan=False) + "\n")
            file.flush()
            if checkpoints.fits(signals[0]) if signals else checkpoints.due(trainer.seconds):
                os.fsync(file.fileno())  # a checkpoint promises the points up to its step
                checkpoints.save(trainer.state())

            if signals:
                end_by_sigterm()

    checkpoint = {"model": trainer.model.state_dict(), "config": scientific(request.config), "seed": request.seed}
    write_atomically(directory / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    costs = account(request.config)
    write_json(
        directory / "train.json",
        {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "parameters": costs.parameters,
            "active_parameters": costs.active_parameters,
            "flops": trainer.tokens * costs.flops_per_token,
            "peak_memory_bytes": peak_memory(device),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "precision": precision,
            "torch": torch.__version__,
        },
    )


@dataclass
class Trainer:
    """One run's state. `seconds` counts optimizer steps only, so evaluating more does not train less."""

    request: Request
    data: Data
    device: torch.device
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evals_done: int = 0
    points_done: int = 0
    last_point: float = -math.inf
    model: MoE = field(init=False)

    def __post_init__(self) -> None:
        self.config: Config = self.request.config
        self.half = resolve_precision(self.config, self.device) == "fp16"
        self.model = MoE(self.config)
        self.model.init_weights(self.request.seed)
        self.model.to(self.device)
        self.optimizer = build_optimizer(self.model, self.config)
        self.scaler = torch.GradScaler(self.device.type, enabled=self.half)

    def state(self) -> dict[str, Any]:
        """All that decides how training goes on. The data's position is the step."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        return counters | parts

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in COUNTERS:
            setattr(self, name, state[name])

        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])

    def run(self, signals: Sequence[object] = ()) -> Iterator[dict[str, Any]]:
        """Train through the budget, yielding points of metrics.jsonl: first, last, and enough between.

        Between two steps of this iterator state() is whole. As soon as there is anything in `signals`, the next
        training step yields a point.

        Raises:
            NonFiniteError: the loss, a gradient or the final weights are not finite.
        """
        progress = progress_of(self.config, self.step, self.seconds)
        while progress < 1.0:
            started = time.perf_counter()
            values = self.optimizer_step(learning_rate(self.config, progress))
            took = time.perf_counter() - started
            self.seconds += took
            self.step += 1
            self.tokens += self.config.batch_size * self.config.seq_len

            progress = progress_of(self.config, self.step, self.seconds)
            evals_due = math.floor(min(1.0, progress) * self.config.progress_evals)
            points_due = math.floor(min(1.0, progress) * POINTS)
            due = evals_due > self.evals_done or points_due > self.points_done or bool(signals)
            if not due and self.seconds - self.last_point < POINT_SECONDS:
                continue

            values["tokens_per_second"] = self.config.batch_size * self.config.seq_len / took
            if evals_due > self.evals_done:
                n_tokens = min(PROGRESS_TOKENS, self.config.eval_tokens)
                values["val_bpb"] = score_tokens(self.model, self.data, "val", n_tokens, self.device).bits_per_byte

            self.evals_done, self.points_done, self.last_point = evals_due, points_due, self.seconds
            yield {
                "step": self.step,
                "tokens": self.tokens,
                "seconds": round(self.seconds, 4),
                "values": {name: finite_or_none(value) for name, value in values.items()},
            }

        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise NonFiniteError("weights are not finite", self.step)

    def optimizer_step(self, lr: float) -> dict[str, float]:
        """One update from one batch, accumulated over its micro-batches."""
        self.model.train()
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        tokens, targets = batch(self.data.tokens["train"], self.config, seed=self.request.seed, step=self.step)
        outputs = [self.backward(*pair) for pair in self.micro_batches(tokens, targets)]
        losses = torch.stack(
            [torch.stack([o.cross_entropy, o.balance_loss, o.z_loss, o.router_entropy]) for o in outputs]
        ).mean(dim=0)
        train_loss, balance_loss, z_loss, entropy = losses.tolist()
        if not all(map(math.isfinite, (train_loss, balance_loss, z_loss))):
            raise NonFiniteError("training loss is not finite", self.step + 1)

        norm = self.update()
        load = load_statistics(torch.stack([output.load_LE for output in outputs]).sum(dim=0))
        return {
            "train_loss": train_loss,
            "lr": lr,
            "grad_norm": norm,
            "balance_loss": balance_loss,
            "z_loss": z_loss,
            "router_entropy": entropy,
            "load_imbalance": load.imbalance,
            "dead_experts": float(load.dead_experts),
        }

    def micro_batches(self, tokens_BT: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.config.micro_batch_size
        for pair in zip(torch.split(tokens_BT, size), torch.split(targets_BT, size), strict=True):
            yield pair[0].to(self.device), pair[1].to(self.device)

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Output:
        """Add the micro-batch's share of the batch's gradient."""
        with torch.autocast(self.device.type, torch.float16) if self.half else nullcontext():
            output: Output = self.model(tokens_BT, targets_BT)

        share = self.config.micro_batch_size / self.config.batch_size
        torch.autograd.backward(self.scaler.scale(output.loss * share))
        return output._replace(loss=output.loss.detach())

    def update(self) -> float:
        """Clip and apply the gradient; returns its norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
        if not math.isfinite(norm) and (not self.half or self.scaler.get_scale() < 1.0):
            raise NonFiniteError("gradient is not finite", self.step + 1)  # in fp16 the scaler first lowers its scale

        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm


if __name__ == "__main__":
    sys.exit(run_in(train, sys.argv[1:]))
