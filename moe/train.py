"""Train one model: `python -m moe.train DIR`, where DIR holds config.json (docs/run-directory.md).

Appends to metrics.jsonl as it goes; leaves checkpoint.pt and train.json. The seed determines everything: on a CPU, with
a budget in tokens and a fixed number of threads, the same seed gives the same bits, also when the run was killed and
resumed (moe/checkpoint.py). On CUDA kernels may differ in the last bits. Several processes may share the work
(moe/parallel.py); this one is then the first of them.

What this does not do: grade itself (moe/evaluate.py does; val_bpb here is a curve over a small part of
val), or choose the micro-batch (pre-flight does, with moe/accounting.py).

B sequences, T positions, L layers with experts, E experts.
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
from moe.allocator import keep_freed_memory
from moe.average import WeightAverage
from moe.checkpoint import Checkpoints, end_by_sigterm, noting_sigterm
from moe.config import Config, scientific
from moe.data import Data, batch, prepare
from moe.evaluate import score_tokens
from moe.health import NonFiniteError, Watch
from moe.model import MoE, Output
from moe.noise import router_noise
from moe.optim import build_optimizers, set_learning_rate
from moe.parallel import Team, lead
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
from moe.schedule import Position, batch_at, learning_rate, micro_batch_rows, pieces_at, progress_at
from moe.specialization import load_statistics
from moe.stability import RouterStability

PROGRESS_TOKENS = 8192  # of val, for the curve; the score uses eval_tokens
POINTS = 20  # metric lines a run at least, evenly spaced (fewer only if there are fewer steps)
POINT_SECONDS = 1.0  # and at least one a second

# What a Trainer resumes with: plain numbers, and its parts that have a state_dict().
COUNTERS = ("step", "sequences", "seconds", "evals_done", "points_done", "last_point")
PARTS = ("model", "average", "scaler", "watch", "stability")

# Of an Output, what a step reports as means over its batch.
MEANS = ("cross_entropy", "balance_loss", "z_loss", "router_entropy", "dropped")

COMPUTE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(directory: Path) -> None:
    """Train as config.json asks, in as many processes."""
    request = read_request(directory)
    if (directory / "checkpoint.pt").exists():
        raise FileExistsError(f"{directory / 'checkpoint.pt'} exists; a run directory serves one run")

    device = device_of(request)
    precision = resolve_precision(request.config, device)
    data = prepare(request.config, request.data_dir)
    with lead(directory, request) as team:
        trainer = Trainer(request, data, device, team)
        checkpoints = Checkpoints(directory, request)
        state = None if request.resume is None else checkpoints.resume(request.resume)
        if state := team.from_first(state):
            trainer.restore(state)

        _write_points(trainer, checkpoints, directory / "metrics.jsonl")

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
            "processes": request.processes,
            "tokens_sha256": data.tokens_sha256,
            "torch": torch.__version__,
        },
    )


@dataclass
class Trainer:
    """One run's state. `seconds` counts optimizer steps only, so evaluating more does not train less."""

    request: Request
    data: Data
    device: torch.device
    team: Team = field(default_factory=Team)
    step: int = 0
    sequences: int = 0
    seconds: float = 0.0
    evals_done: int = 0
    points_done: int = 0
    last_point: float = -math.inf
    model: MoE = field(init=False)
    load_LE: Tensor = field(init=False)  # of the last step

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
        self.stability = RouterStability(self.config, self.data.tokens["val"], self.device)

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
            took = self.team.from_first(time.perf_counter() - started)
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

            load = load_statistics(self.load_LE)
            values["load_imbalance"] = load.imbalance
            values["dead_experts"] = float(load.dead_experts)
            values["tokens_per_second"] = size * self.config.seq_len / took
            if evals_due > self.evals_done and self.team.leads:
                n_tokens = min(PROGRESS_TOKENS, self.config.eval_tokens)
                score = score_tokens(self.scored_model, self.data, "val", n_tokens, self.device)
                values["val_bpb"], values["val_tokens"] = score.bits_per_byte, float(score.tokens)
                if (stability := self.stability.look(self.scored_model)) is not None:
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
        means = torch.zeros(len(MEANS), dtype=torch.float64, device=self.device)
        load_LE = torch.zeros(
            sum(self.config.moe_layers), self.config.num_experts, dtype=torch.long, device=self.device
        )
        for tokens, targets, noise in self.micro_batches(size):
            share = tokens.numel() / (size * self.config.seq_len)
            output = self.backward(tokens, targets, noise, share=share)
            means += share * torch.stack([getattr(output, name).double() for name in MEANS])
            load_LE += output.load_LE

        self.team.add(means, load_LE)
        train_loss, balance_loss, z_loss, entropy, dropped = means.tolist()
        if not all(map(math.isfinite, (train_loss, balance_loss, z_loss))):
            raise NonFiniteError("training loss is not finite", self.step + 1)

        norm = self.update()
        self.model.update_balance(load_LE)
        if self.average is not None:
            self.average.update(self.model)

        self.load_LE = load_LE
        self.watch.look(self.step + 1, norm, load_LE)
        return {
            "train_loss": train_loss,
            "lr": lr,
            "grad_norm": norm,
            "balance_loss": balance_loss,
            "z_loss": z_loss,
            "router_entropy": entropy,
            "dropped": dropped,
        }

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """This process's part of the next `size` sequences: tokens, targets and router noise of each micro-batch."""
        tokens_BT, targets_BT = batch(
            self.data.tokens["train"], self.config, seed=self.request.seed, first=self.sequences, size=size
        )
        rows = micro_batch_rows(self.config, size, self.team.size)
        pieces = pieces_at(self.config, self.position)
        for start in range(self.team.rank * rows, size, self.team.size * rows):
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
        """Sum the gradient over all processes, clip and apply it; returns its norm before clipping."""
        self.team.add_gradients(self.model.parameters())
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)

        total = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = float(total)
        if norm > self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip, total)

        if math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        elif not self.half or self.scaler.get_scale() < 1.0:
            raise NonFiniteError("gradient is not finite", self.step + 1)  # in fp16 the scaler first lowers its scale

        self.scaler.update()
        return norm


def _write_points(trainer: Trainer, checkpoints: Checkpoints, path: Path) -> None:
    with path.open("a") as file, noting_sigterm() as signals:
        for point in trainer.run(signals):
            file.write(json.dumps(point, allow_nan=False) + "\n")
            file.flush()
            if checkpoints.fits(signals[0]) if signals else checkpoints.due(trainer.seconds):
                os.fsync(file.fileno())  # a checkpoint promises the points up to its step
                checkpoints.save(trainer.state())

            if signals:
                end_by_sigterm()


def _cut(tokens_BT: Tensor, pieces: int) -> Tensor:
    return tokens_BT.reshape(len(tokens_BT) * pieces, -1)


def main(arguments: list[str]) -> int:
    """Returns the exit code of `python -m moe.train`."""
    keep_freed_memory()
    return run_in(train, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
