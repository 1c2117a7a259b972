"""How fast a mixture layer is, as a fraction of a dense layer with the same active FLOPs, beside other implementations.

    .venv/bin/python -m benchmarks.moe_layer                  # the ratios
    .venv/bin/python -m benchmarks.moe_layer --device cuda    # on a card, with its peaks and the part of the floor
    .venv/bin/python -m benchmarks.moe_layer --table          # what moe/slots.py knows about padding

A layer is the router's product, the routing and the experts, forward and backward, d_model 384, 2,048 tokens, weights
in fp32 cast to the compute type. Variants take turns, every round has new tokens, and the ratio is of the minima (and
of the medians) over the rounds. On a machine that does other work as well, take --threads 1, which counts processor
time, and look at the minima.

"masks" is the loop that most code begins with. HF is MixtralExperts of transformers with our router and gates, its
weights held in the compute type, which spares it our casts. "cast" is its better backend with weights in fp32, as they
are trained, and "low" is ours with weights in the compute type: equal terms, either way. Gated experts only. Its third
backend, batched_mm, copies the weights for every token, which takes gigabytes here, and runs with --batched-mm only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from moe.activation import activate
from moe.allocator import keep_freed_memory
from moe.config import Config, apply
from moe.experts import Experts
from moe.presets import PRESETS
from moe.routing import TokenChoice, choose_experts
from moe.slots import Layout
from moe.space.experts import GATED

D_MODEL = 384
TOKENS = 2048
SHAPES = ((8, 2, 1536), (16, 2, 1536), (16, 4, 768), (64, 8, 384), (64, 2, 384))  # experts, of them chosen, width
HF_BACKENDS = ("eager", "grouped_mm")

Layer = Callable[[Tensor], Tensor]


class Shape(NamedTuple):
    """What is timed."""

    n_experts: int
    top_k: int
    d_expert: int
    kind: str
    dtype: torch.dtype
    device: str

    @property
    def products(self) -> float:
        """Multiplications and additions of the experts' products, forward and backward."""
        matrices = 3 if self.kind in GATED else 2
        return 6.0 * TOKENS * self.top_k * D_MODEL * self.d_expert * matrices

    @property
    def bytes_moved(self) -> float:
        """At the least: weights read twice and their gradients written, hidden layer and both ends written and read."""
        matrices = 3 if self.kind in GATED else 2
        weights = 3 * 4 * self.n_experts * matrices * D_MODEL * self.d_expert
        hidden = (matrices - 1) * self.d_expert + 2 * D_MODEL
        return weights + 4.0 * TOKENS * self.top_k * hidden * torch.finfo(self.dtype).bits / 8


def layers(shape: Shape, hf_backends: tuple[str, ...]) -> Iterator[tuple[str, Layer, list[nn.Parameter]]]:
    """Each variant's name, its forward pass and its parameters."""
    torch.manual_seed(0)
    config = apply(
        PRESETS["nano"],
        {
            "d_model": D_MODEL,
            "num_experts": shape.n_experts,
            "top_k": shape.top_k,
            "d_expert": shape.d_expert,
            "expert_kind": shape.kind,
        },
    )
    width = shape.top_k * shape.d_expert
    w_in = _weights(2 * width if shape.kind in GATED else width, D_MODEL, device=shape.device)
    w_out = _weights(D_MODEL, width, device=shape.device)

    def dense(x: Tensor) -> Tensor:
        return F.linear(activate(F.linear(x, w_in.to(x.dtype)), config.expert_kind), w_out.to(x.dtype))

    yield "dense", dense, [w_in, w_out]

    router = _weights(shape.n_experts, D_MODEL, device=shape.device)
    paths: tuple[Layout, ...] = ("auto", "loop", "padded")
    for path in paths:
        experts = _experts(config, shape.device)
        experts.path = path
        yield path, _ours(config, router, experts), [router, *experts.parameters()]

    if shape.dtype != torch.float32:
        experts = _experts(config, shape.device).to(shape.dtype)
        yield "low", _ours(config, router, experts), [router, *experts.parameters()]

    experts = _experts(config, shape.device)
    yield "masks", _masks(config, router, experts), [router, *experts.parameters()]

    if shape.kind == "swiglu":
        for backend in hf_backends:
            theirs = _hf_experts(shape, backend).to(shape.dtype)
            yield f"hf {backend}", _hf(config, router, theirs), [router, *theirs.parameters()]

        if hf_backends and shape.dtype != torch.float32:
            theirs = _hf_experts(shape, "grouped_mm")
            yield "hf grouped_mm, cast", _hf_cast(config, router, theirs), [router, *theirs.parameters()]


def _weights(*shape: int, device: str) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, device=device).mul_(0.02))


def _experts(config: Config, device: str) -> Experts:
    experts = Experts(config).to(device)
    for weights in experts.parameters():
        nn.init.normal_(weights, std=0.02)

    return experts


def _route(config: Config, router: Tensor, x: Tensor) -> TokenChoice:
    return choose_experts(
        F.linear(x.float(), router), top_k=config.top_k, normalize_gates=True, tokens_per_group=TOKENS, seq_len=TOKENS
    )


def _ours(config: Config, router: Tensor, experts: Experts) -> Layer:
    def layer(x: Tensor) -> Tensor:
        y: Tensor = experts(x, _route(config, router, x))
        return y

    return layer


def _masks(config: Config, router: Tensor, experts: Experts) -> Layer:
    def layer(x: Tensor) -> Tensor:
        gates, chosen, *_ = _route(config, router, x)
        y = torch.zeros_like(x)
        for number, (w_in, w_out) in enumerate(zip(experts.w_in.unbind(), experts.w_out.unbind(), strict=True)):
            tokens, places = torch.where(chosen == number)
            if len(tokens):
                hidden = activate(F.linear(x[tokens], w_in.to(x.dtype)), experts.kind)
                rows = F.linear(hidden, w_out.to(x.dtype)) * gates[tokens, places, None]
                y = y.index_add(0, tokens, rows.to(x.dtype))

        return y

    return layer


def _hf_experts(shape: Shape, backend: str) -> nn.Module:
    from transformers import MixtralConfig  # takes seconds to import
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=D_MODEL,
        intermediate_size=shape.d_expert,
        num_local_experts=shape.n_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = backend
    experts: nn.Module = MixtralExperts(config).to(shape.device)
    for weights in experts.parameters():
        nn.init.normal_(weights, std=0.02)

    return experts


def _hf(config: Config, router: Tensor, experts: nn.Module) -> Layer:
    def layer(x: Tensor) -> Tensor:
        gates, chosen, *_ = _route(config, router, x)
        y: Tensor = experts(x, chosen, gates)
        return y

    return layer


def _hf_cast(config: Config, router: Tensor, experts: nn.Module) -> Layer:
    def layer(x: Tensor) -> Tensor:
        gates, chosen, *_ = _route(config, router, x)
        weights = {name: weight.to(x.dtype) for name, weight in experts.named_parameters()}
        y: Tensor = functional_call(experts, weights, (x, chosen, gates))
        return y

    return layer


def seconds(layer: Layer, parameters: list[nn.Parameter], x: Tensor, grad: Tensor) -> float:
    """One forward and backward pass."""
    x = x.clone().requires_grad_()
    _wait(x)
    start = _now(x)
    torch.autograd.backward(layer(x), grad)
    _wait(x)
    elapsed = _now(x) - start
    for parameter in parameters:
        parameter.grad = None

    return elapsed


def _now(x: Tensor) -> float:
    # One thread's own time does not count what others do on its core.
    return time.process_time() if torch.get_num_threads() == 1 and not x.is_cuda else time.perf_counter()


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def compare(shape: Shape, rounds: int, hf_backends: tuple[str, ...]) -> dict[str, list[float]]:
    """Seconds of each variant, which take turns. Two rounds more are run first and not counted."""
    variants = list(layers(shape, hf_backends))
    times: dict[str, list[float]] = {name: [] for name, _, _ in variants}
    for number in range(rounds + 2):
        x = torch.randn(TOKENS, D_MODEL, device=shape.device).to(shape.dtype)
        grad = torch.randn_like(x)
        for name, layer, parameters in variants:
            elapsed = seconds(layer, parameters, x, grad)
            if number >= 2:
                times[name].append(elapsed)

    return times


def peaks(shape: Shape) -> tuple[float, float]:
    """FLOP/s of a large product and bytes/s, read and written, of a large copy."""
    size = 4096 if shape.device == "cuda" else 1536
    a, b = torch.randn(2, size, size, device=shape.device).to(shape.dtype)
    big = torch.empty(64 * 2**20, device=shape.device)
    product = min(_timed(lambda: a @ b, a) for _ in range(8))
    copy = min(_timed(lambda: big[: len(big) // 2].copy_(big[len(big) // 2 :]), a) for _ in range(8))
    return 2.0 * size**3 / product, big.nbytes / copy


def _timed(run: Callable[[], Any], x: Tensor) -> float:
    _wait(x)
    start = _now(x)
    run()
    _wait(x)
    return _now(x) - start


def print_ratios(device: str, kind: str, rounds: int, hf_backends: tuple[str, ...], only: str) -> None:
    """One row a shape and type whose name has `only` in it: minimum (median) as a fraction of the dense layer's."""
    for dtype in (torch.float32, torch.float16 if device == "cuda" else torch.bfloat16):
        chosen = [sizes for sizes in SHAPES if only in _name(*sizes, dtype)]
        for number, (n_experts, top_k, d_expert) in enumerate(chosen):
            shape = Shape(n_experts, top_k, d_expert, kind, dtype, device)
            before, times, after = peaks(shape), compare(shape, rounds, hf_backends), peaks(shape)
            flops, bandwidth = (max(pair) for pair in zip(before, after, strict=True))
            if number == 0:
                print(f"\n{kind}\n")
                print(f"| shape | dense ms | {' | '.join(list(times)[1:])} | GFLOP/s | GB/s | auto, of the floor |")
                print(f"|{'---|' * (len(times) + 4)}")

            dense = times.pop("dense")
            cells = [f"{min(dense) / min(t):.2f} ({_middle(dense) / _middle(t):.2f})" for t in times.values()]
            floor = shape.products / flops + shape.bytes_moved / bandwidth
            row = [_name(n_experts, top_k, d_expert, dtype), f"{min(dense) * 1e3:.1f}", *cells]
            row += [f"{flops / 1e9:.0f}", f"{bandwidth / 1e9:.0f}", f"{floor / min(times['auto']):.2f}"]
            print(f"| {' | '.join(row)} |", flush=True)


def _name(n_experts: int, top_k: int, d_expert: int, dtype: torch.dtype) -> str:
    return f"E{n_experts} k{top_k} f{d_expert} {str(dtype).removeprefix('torch.')}"


def _middle(values: list[float]) -> float:
    return statistics.median(values)


def print_table(device: str, rounds: int) -> None:
    """How much longer the loop takes where padding adds no rows: so many rows an assignment does padding pay."""
    n_experts = 16
    for dtype in (torch.float32, torch.float16 if device == "cuda" else torch.bfloat16):
        print(f"\n{dtype}\n\n| rows x d_model x d_expert | work | loop / padded: minima (medians) |\n|---|---|---|")
        for rows, d_model, d_expert in (
            (32, 32, 32),
            (64, 64, 64),
            (128, 64, 128),
            (32, 384, 384),
            (64, 384, 384),
            (256, 384, 384),
            (256, 384, 768),
            (512, 384, 768),
            (512, 384, 1536),
        ):
            changes = {"d_model": d_model, "num_experts": n_experts, "top_k": 1, "d_expert": d_expert}
            experts = _experts(apply(PRESETS["nano"], changes | {"expert_kind": "mlp"}), device)
            loop, padded = _loop_and_padded(experts, rows, dtype, rounds)
            work = rows * d_model * d_expert
            ratios = f"{min(loop) / min(padded):.2f} ({_middle(loop) / _middle(padded):.2f})"
            print(f"| {rows} x {d_model} x {d_expert} | {work:.1e} | {ratios} |", flush=True)


def _loop_and_padded(experts: Experts, rows: int, dtype: torch.dtype, rounds: int) -> tuple[list[float], list[float]]:
    n_experts, d_model, device = len(experts.w_in), experts.w_in.shape[2], experts.w_in.device
    n_tokens = n_experts * rows
    gates = torch.ones(n_tokens, 1, device=device)
    load = torch.full((1, n_experts), rows, device=device)
    times: dict[Layout, list[float]] = {"loop": [], "padded": []}
    for _ in range(rounds):
        x = torch.randn(n_tokens, d_model, device=device).to(dtype)
        chosen = torch.randperm(n_tokens, device=device).remainder(n_experts)[:, None]
        for path, taken in times.items():
            experts.path = path
            layer = partial(_apply, experts, TokenChoice(gates, chosen, load))
            taken.append(seconds(layer, list(experts.parameters()), x, x))

    return times["loop"][2:], times["padded"][2:]


def _apply(experts: Experts, routing: TokenChoice, x: Tensor) -> Tensor:
    y: Tensor = experts(x, routing)
    return y


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kind", choices=("swiglu", "geglu", "relu2", "mlp"), default="swiglu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows with this in their name, such as 'E64 k8 f384 bfloat16'")
    parser.add_argument("--table", action="store_true", help="measure where padding pays instead")
    parser.add_argument("--batched-mm", action="store_true", help="HF's batched_mm as well; needs about 30 GB")
    parser.add_argument("--malloc", choices=("kept", "default"), default="kept", help="kept: as moe.train allocates")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.malloc == "kept":
        keep_freed_memory()

    if arguments.table:
        print_table(arguments.device, arguments.rounds)
        return

    hf_backends: tuple[str, ...] = (*HF_BACKENDS, "batched_mm") if arguments.batched_mm else HF_BACKENDS
    if find_spec("transformers") is None:
        print("transformers is not installed; its variants are left out")
        hf_backends = ()

    print_ratios(arguments.device, arguments.kind, arguments.rounds, hf_backends, arguments.only)


if __name__ == "__main__":
    main()
