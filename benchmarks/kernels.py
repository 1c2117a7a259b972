"""What our model asks of a card: kernels launched, and bytes moved by all that is not a matrix product.

    .venv/bin/python -m benchmarks.kernels

Counts the operations of a real forward and backward pass on the CPU, at the widths of preset t4 in small batches, and
prints them beside the constants of moe/roofline.py; a test holds the two together. bf16 stands for fp16, which moves
as many bytes. Each operation is taken for one kernel that reads its inputs and writes its outputs once, as eager
PyTorch does on a card. What our model does otherwise on a CPU is done as on a card: experts of that size one after
another, their rows not rounded up, norms in one kernel forward and two backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from moe import dispatch, layers, roofline, slots
from moe.accounting import account, activation_bytes
from moe.config import Config, apply
from moe.model import MoE
from moe.precision import Precision
from moe.presets import PRESETS

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "attention")
NO_KERNEL = ("empty", "new_empty", "local_scalar")
GATHERS = ("index_select", "index", "gather", "embedding")  # read as many numbers of their source as they write
NO_INPUT = ("zeros", "new_zeros", "ones", "full", "zero_", "fill_", "arange")  # write without reading


class Counts(NamedTuple):
    """Of one micro-batch, forward and backward."""

    launches: int
    bytes_moved: int


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = 0
        self.bytes_moved = 0
        self.pausing = False

    @contextmanager
    def one_step(self, launches: int, *read: Tensor) -> Iterator[list[Tensor]]:
        """What is computed within is so many kernels that read these tensors and write those in the list."""
        written: list[Tensor] = []
        self.pausing = True
        yield written
        self.pausing = False
        self.launches += launches
        self.bytes_moved += sum(tensor.nbytes for tensor in (*read, *written))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.pausing:
            return result

        name = func.__name__.split(".")[0].lstrip("_")
        written = [kwargs.get(argument.name) for argument in func._schema.arguments if argument.is_out]
        inputs, outputs = [*_tensors((args, kwargs))], [*_tensors(result)]
        stores = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        is_view = not func._schema.is_mutable and any(t.untyped_storage().data_ptr() in stores for t in outputs)
        if is_view or name.startswith(NO_KERNEL):
            return result

        self.launches += 1
        if not any(part in name for part in PRODUCTS):
            read = [tensor for tensor in inputs if not any(tensor is other for other in written)]
            if name.startswith(NO_INPUT):
                read = []
            elif name == "copy_":
                read = read[1:]
            elif name in GATHERS:
                read = [*outputs, *(tensor for tensor in read if tensor.dtype == torch.long)]

            self.bytes_moved += sum(tensor.nbytes for tensor in (*read, *outputs))

        return result


class _Norm(torch.autograd.Function):
    """A norm as a card computes it: one kernel forward; backward one for the input and one for the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, counter: _Counter) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.counter = counter
        with counter.one_step(1, x, scale) as written:
            y = F.rms_norm(x, scale.shape, scale, eps=eps)
            written.append(y)

        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        with ctx.counter.one_step(2, grad, x, scale, grad, x) as written:
            written += [torch.zeros_like(x), torch.zeros_like(scale)]  # nobody looks at the numbers

        return *written, None, None


def count(config: Config, compute: torch.dtype) -> Counts:
    """One micro-batch of the real model, with what is done otherwise on a card done so."""
    model = MoE(config, compute)
    model.init_weights(0)
    for mixture in model.mixtures:
        mixture.experts.path = "loop"

    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (config.micro_batch_size, config.seq_len + 1), generator=draws)
    with _as_on_a_card() as counter:
        torch.autograd.backward(model(tokens[:, :-1], tokens[:, 1:]).loss)

    return Counts(counter.launches, counter.bytes_moved)


@contextmanager
def _as_on_a_card() -> Iterator[_Counter]:
    counter = _Counter()

    def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
        y: Tensor = _Norm.apply(x, scale.to(x.dtype), eps, counter)  # type: ignore[no-untyped-call]
        return y

    with (
        mock.patch.object(dispatch, "PART_ELEMENTS", 1),  # one expert after another, as they have rows enough
        mock.patch.object(slots, "ROW_MULTIPLE", {}),
        mock.patch.object(layers, "rms_norm", norm),
        counter,
    ):
        yield counter


def constants(precision: Precision) -> dict[str, float]:
    """The constants of moe/roofline.py, solved from counts that differ in one size each."""
    compute = torch.float32 if precision == "fp32" else torch.bfloat16
    base = apply(
        PRESETS["t4"],
        {"n_layers": 1, "vocab_size": 512, "seq_len": 256, "batch_size": 2, "micro_batch_size": 1, "routing_group": 1},
    )

    def counted(**changes: int) -> Counts:
        return count(apply(base, {"micro_batch_size": 1, **changes}), compute)

    one, two = counted(), counted(n_layers=2)
    one_twice, two_twice = counted(micro_batch_size=2), counted(n_layers=2, micro_batch_size=2)
    more_experts = counted(n_layers=2, num_experts=16).launches - counted(num_experts=16).launches

    layer = two.bytes_moved - one.bytes_moved
    sequence = two_twice.bytes_moved - one_twice.bytes_moved - layer
    expert_launches = (more_experts - two.launches + one.launches) / (16 - base.num_experts)
    deeper = apply(base, {"n_layers": 2})
    return {
        "KEPT_PASSES": sequence / activation_bytes(base, precision),
        "WEIGHT_BYTES": (layer - sequence) / (account(deeper).parameters - account(base).parameters),
        "MODEL_LAUNCHES": 2 * one.launches - two.launches,
        "LAYER_LAUNCHES": two.launches - one.launches - base.num_experts * expert_launches,
        "EXPERT_LAUNCHES": expert_launches,
    }


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)  # what other threads do would not be counted
    print("constant         precision  counted  in moe/roofline.py")
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    for precision in precisions:
        for name, value in constants(precision).items():
            print(f"{name:16} {precision:9} {value:8.1f} {getattr(roofline, name)[precision]:19.1f}")


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


if __name__ == "__main__":
    main()
