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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.accounting import account
from moe.average import WeightAverage
from moe.checkpoint import Checkpoints, end_by_sigterm, noting_sigterm
from moe.config import Config, scientific
from moe.data import Data, batch, prepare
from moe.evaluate import score_tokens
from moe.health import NonFiniteError, Watch
from moe.model import MoE, Output
from moe.noise import router_noise
from moe.optim import build_optimizers, set_learning_rate
from moe.rundir import (
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
from moe.schedule import Position, batch_at, learning_rate, pieces_at, progress_at
from moe.specialization import load_statistics
from moe.stability import RoutingProbe

PROGRESS_TOKENS = 8192  # of val, for the curve; the score uses eval_tokens
POINTS = 20  # metric lines a run at least, evenly spaced (fewer only if there are fewer steps)
POINT_SECONDS = 1.0  # and at least one a second

# What a Trainer resumes with: plain numbers, and its parts that have a state_dict().
COUNTERS = ("step", "sequences", "seconds", "evals_done", "points_done", "last_point")
PARTS = ("model", "average", "scaler", "watch", "routing_probe")

COMPUTE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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

    checkpoint = {
        "model": trainer.scored_model.state_dict(),
        "config": scientific(request.config),
        "seed": request.seed,
    }
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
    sequences: int = 0
    seconds: float = 0.0
    evals_done: int = 0
    points_done: int = 0
    last_point: float = -math.inf
    model: MoE = field(init=False)

    def __post_init__(self) -> None:
        self.config: Config = self.request.config
        precision = resolve_precision(self.config, self.device)
        self.model = MoE(self.config, COMPUTE[precision])
        self.model.init_weights(self.request.seed)
        self.model.to(self.device)
        self.average = WeightAverage(self.model, self.config.ema_decay) if self.config.ema_decay > 0.0 else None
        self.optimizers = build_optimizers(self.model, self.config)
        self.half = precision == "fp16"
        self.scaler = torch.GradScaler(self.device.type, enabled=self.half)
        self.watch = Watch(self.config)
        self.routing_probe = RoutingProbe(self.config, self.data.tokens["val"], self.device)

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.sequences * self.config.seq_len

    @property
    def scored_model(self) -> MoE:
        """What is evaluated and saved: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def position(self) -> Position:
        return Position(sequences=self.sequences, seconds=self.seconds)

    def state(self) -> dict[str, Any]:
        """All that decides how training goes on. The data's position is the number of sequences."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        parts = {name: part.state_dict() for name in PARTS if (part := getattr(self, name)) is not None}
        return counters | parts | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in COUNTERS:
            setattr(self, name, state[name])

        for name in PARTS:
            if (part := getattr(self, name)) is not None:
                part.load_state_dict(state[name])

        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def run(self, signals: Sequence[object] = ()) -> Iterator[dict[str, Any]]:
        """Train through the budget, yielding points of metrics.jsonl: first, last, and enough between.

        Between two steps of this iterator state() is whole. As soon as there is anything in `signals`, the next
        training step yields a point.

        Raises:
            NonFiniteError: the loss, a gradient or the final weights are not finite.
            ExplodingGradientError, DeadRouterError: moe/health.py.
        """
        while size := batch_at(self.config, self.position):
            started = time.perf_counter()
            values = self.optimizer_step(learning_rate(self.config, progress_at(self.config, self.position)))
            took = time.perf_counter() - started
            self.seconds += took
            self.step += 1
            self.sequences += size

            progress = 1.0
            if batch_at(self.config, self.position):
                progress = min(1.0, progress_at(self.config, self.position))

            evals_due = math.floor(progress * self.config.progress_evals)
            points_due = math.floor(progress * POINTS)
            due = evals_due > self.evals_done or points_due > self.points_done or bool(signals)
            if not due and self.seconds - self.last_point < POINT_SECONDS:
                continue

            values["tokens_per_second"] = size * self.config.seq_len / took
            if evals_due > self.evals_done:
                n_tokens = min(PROGRESS_TOKENS, self.config.eval_tokens)
                score = score_tokens(self.scored_model, self.data, "val", n_tokens, self.device)
                values["val_bpb"] = score.bits_per_byte
                if (stability := self.routing_probe.look(self.scored_model)) is not None:
                    values["router_stability"] = stability

            self.evals_done, self.points_done, self.last_point = evals_due, points_due, self.seconds
            yield {
                "step": self.step,
                "tokens": self.tokens,
                "seconds": round(self.seconds, 4),
                "values": {name: finite_or_none(value) for name, value in values.items()},
            }

        if not all(bool(parameter.isfinite().all()) for parameter in self.scored_model.parameters()):
            raise NonFiniteError("weights are not finite", self.step)

    def optimizer_step(self, lr: float) -> dict[str, float]:
        """One update from one batch, accumulated over its micro-batches."""
        self.model.train()
        set_learning_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

        size = batch_at(self.config, self.position)
        outputs = [self.backward(*part, share=len(part[0]) / size) for part in self.micro_batches(size)]
        losses = torch.stack(
            [torch.stack([o.cross_entropy, o.balance_loss, o.z_loss, o.router_entropy, o.dropped]) for o in outputs]
        ).mean(dim=0)
        train_loss, balance_loss, z_loss, entropy, dropped = losses.tolist()
        if not all(map(math.isfinite, (train_loss, balance_loss, z_loss))):
            raise NonFiniteError("training loss is not finite", self.step + 1)

        norm = self.update()
        load_LE = torch.stack([output.load_LE for output in outputs]).sum(dim=0)
        self.model.update_balance(load_LE)
        if self.average is not None:
            self.average.update(self.model)

        load = load_statistics(load_LE)
        self.watch.look(self.step + 1, norm, load_LE)
        return {
            "train_loss": train_loss,
            "lr": lr,
            "grad_norm": norm,
            "balance_loss": balance_loss,
            "z_loss": z_loss,
            "router_entropy": entropy,
            "load_imbalance": load.imbalance,
            "dead_experts": float(load.dead_experts),
            "dropped": dropped,
        }

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The batch of `size` sequences that comes next: tokens, targets and router noise of each micro-batch."""
        tokens_BT, targets_BT = batch(
            self.data.tokens["train"], self.config, seed=self.request.seed, first=self.sequences, size=size
        )
        rows = math.gcd(self.config.micro_batch_size, size)
        pieces = pieces_at(self.config, self.position)
        for start in range(0, size, rows):
            noise = router_noise(self.config, seed=self.request.seed, first=self.sequences + start, count=rows)
            yield (
                _cut(tokens_BT[start : start + rows], pieces).to(self.device),
                _cut(targets_BT[start : start + rows], pieces).to(self.device),
                None if noise is None else noise.to(self.device),
            )

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, noise: Tensor | None, *, share: float) -> Output:
        """Add the gradient of a micro-batch that is this share of the batch."""
        output: Output = self.model(tokens_BT, targets_BT, noise)
        torch.autograd.backward(self.scaler.scale(output.loss * share))
        return output._replace(loss=output.loss.detach())

    def update(self) -> float:
        """Clip and apply the gradient; returns its norm before clipping."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)

        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        elif not self.half or self.scaler.get_scale() < 1.0:
            raise NonFiniteError("gradient is not finite", self.step + 1)  # in fp16 the scaler first lowers its scale

        self.scaler.update()
        return norm


def _cut(tokens_BT: Tensor, pieces: int) -> Tensor:
    return tokens_BT.reshape(len(tokens_BT) * pieces, -1)


if __name__ == "__main__":
    sys.exit(run_in(train, sys.argv[1:]))
