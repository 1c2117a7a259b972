"""How fast a whole training step is, as a fraction of the same step of a dense model with the same active FLOPs.

    .venv/bin/python -m benchmarks.train_step                  # the ratios on this CPU, fp32 and bf16
    .venv/bin/python -m benchmarks.train_step --device cuda    # on a card, fp32 and fp16

A step is a forward and a backward pass over 2,048 tokens, clipping and AdamW, at the width and depth of preset t4. Only
the feed-forward layers differ: "dense" has one network as wide as the experts that a token meets, "ours" is the model
as it is trained, "masks" the loop over experts that most code begins with. Variants take turns, and every step has new
tokens.

Ratios are dense / variant, of the minima and, in brackets, of the medians over the rounds; "CPU" is that of the
processor time of all threads, which other work on the machine disturbs less. The floor is FLOPs and bytes, each at the
rate of a large product and a large copy in the same run. Its bytes are the least that a step moves: weights, gradients
and moments where they are needed, and what autograd keeps, written and read once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_layer import Shape, peaks
from moe.accounting import account, activation_bytes
from moe.activation import activate
from moe.allocator import keep_freed_memory
from moe.config import Config, apply
from moe.experts import Experts
from moe.layers import Dense, Mixture
from moe.loss import sum_nats
from moe.model import MoE
from moe.optim import build_optimizers
from moe.precision import Precision
from moe.presets import PRESETS
from moe.routing import Routing, TokenChoice
from moe.train import COMPUTE

BATCH = 4  # sequences of 512 tokens
SHAPES = ((8, 2, 1536, 256), (64, 8, 384, 256), (8, 2, 1536, 49_152))  # experts, of them chosen, width, vocabulary
WARM_UP = 2

STEP_BYTES = 40  # a parameter: read in both passes, its gradient written, and fused AdamW's 28


class MaskedExperts(Experts):
    """Experts computed one by one, each over the tokens that a mask finds."""

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if not isinstance(routing, TokenChoice):
            raise TypeError("only tokens that choose experts find them with masks")

        gates, chosen, *_ = routing
        y = torch.zeros_like(x)
        for number, (w_in, w_out) in enumerate(zip(self.w_in.unbind(), self.w_out.unbind(), strict=True)):
            rows, places = torch.where(chosen == number)
            if len(rows):
                hidden = activate(F.linear(x[rows], w_in.to(x.dtype)), self.kind)
                weighted = F.linear(hidden, w_out.to(x.dtype)) * gates[rows, places, None]
                y = y.index_add(0, rows, weighted.to(x.dtype))

        return y


class Seconds(NamedTuple):
    """Of one step: by the clock, and of the processor."""

    wall: float
    cpu: float


class Stepper:
    """One variant: its model, its optimizers, and the step that is timed."""

    def __init__(self, config: Config, variant: str, precision: Precision, device: str) -> None:
        self.config, self.device = config, device
        self.model = MoE(config, COMPUTE[precision])
        for block in self.model.blocks:
            if variant == "dense":
                block.feed_forward = Dense(config, config.dense_width)
            elif variant == "masks" and isinstance(block.feed_forward, Mixture):
                block.feed_forward.experts = MaskedExperts(config)

        self.model.init_weights(0)
        self.model.to(device)
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.GradScaler(device, enabled=precision == "fp16")

    def step(self, tokens: Tensor) -> Seconds:
        """Trains on them and says how long that took."""
        self._wait()
        wall, cpu = time.perf_counter(), time.process_time()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

        torch.autograd.backward(self.scaler.scale(self._loss(tokens[:, :-1], tokens[:, 1:])))
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)

        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)

        self.scaler.update()
        self._wait()
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if self.model.mixtures:
            loss: Tensor = self.model(tokens, targets).loss
            return loss

        x, _ = self.model.hidden(tokens)
        return sum_nats(x, self.model.head_weight, targets.flatten()) / targets.numel()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def compare(config: Config, precision: Precision, device: str, rounds: int) -> dict[str, list[Seconds]]:
    """The steps of each variant, which take turns."""
    steppers = {variant: Stepper(config, variant, precision, device) for variant in ("dense", "ours", "masks")}
    times: dict[str, list[Seconds]] = {variant: [] for variant in steppers}
    for number in range(WARM_UP + rounds):
        tokens = torch.randint(config.vocab_size, (BATCH, config.seq_len + 1), device=device)
        for variant, stepper in steppers.items():
            seconds = stepper.step(tokens)
            if number >= WARM_UP:
                times[variant].append(seconds)

    return times


def floor(config: Config, precision: Precision, flops: float, bandwidth: float) -> float:
    """Seconds that a step takes at these rates, with nothing lost."""
    cost = account(config)
    moved = STEP_BYTES * cost.parameters + 2 * activation_bytes(config, precision)
    return cost.flops_per_token * BATCH * config.seq_len / flops + moved / bandwidth


def rows(device: str, rounds: int, only: str) -> Iterator[list[str]]:
    """The cells of the table, a shape and precision after another, of those that have `only` in their name."""
    precisions: tuple[Precision, ...] = ("fp32", "fp16" if device == "cuda" else "bf16")
    for n_experts, top_k, d_expert, vocab_size in SHAPES:
        for precision in precisions:
            name = f"E{n_experts} k{top_k} f{d_expert} V{vocab_size} {precision}"
            if only not in name:
                continue

            config = apply(
                PRESETS["t4"],
                {
                    "tokenizer": "byte" if vocab_size == 256 else "bpe",
                    "vocab_size": vocab_size,
                    "num_experts": n_experts,
                    "top_k": top_k,
                    "d_expert": d_expert,
                    "batch_size": BATCH,
                    "micro_batch_size": BATCH,
                },
            )
            layer = Shape(n_experts, top_k, d_expert, config.expert_kind, COMPUTE[precision] or torch.float32, device)
            before, times, after = peaks(layer), compare(config, precision, device, rounds), peaks(layer)
            flops, bandwidth = (max(pair) for pair in zip(before, after, strict=True))
            wall = {variant: [seconds.wall for seconds in steps] for variant, steps in times.items()}
            cpu = {variant: [seconds.cpu for seconds in steps] for variant, steps in times.items()}
            yield [
                name,
                f"{min(wall['dense']) * 1e3:.0f} ({statistics.median(wall['dense']) * 1e3:.0f})",
                _ratio(wall, "ours"),
                _ratio(cpu, "ours"),
                _ratio(wall, "masks"),
                _ratio(cpu, "masks"),
                f"{flops / 1e9:.0f}",
                f"{bandwidth / 1e9:.0f}",
                f"{floor(config, precision, flops, bandwidth) / min(wall['ours']):.2f}",
            ]


def _ratio(times: dict[str, list[float]], variant: str) -> str:
    dense, ours = times["dense"], times[variant]
    return f"{min(dense) / min(ours):.2f} ({statistics.median(dense) / statistics.median(ours):.2f})"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows with this in their name, such as 'E64 k8 f384 V256 bf16'")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    print("| step | dense ms | ours | CPU | masks | CPU | GFLOP/s | GB/s | ours, of the floor |")
    print(f"|{'---|' * 9}")
    for cells in rows(arguments.device, arguments.rounds, arguments.only):
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
