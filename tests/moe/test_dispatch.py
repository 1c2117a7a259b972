"""What the dispatch costs and promises beside its numbers: kernels, host syncs, memory, the choice of a layout."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from threading import Barrier, get_ident
from time import monotonic
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe import dispatch, threads
from moe.config import apply
from moe.experts import Experts
from moe.presets import PRESETS
from moe.routing import TokenChoice, choose_experts, losses_of
from moe.slots import arrange, choose
from moe.threads import for_each

SYNCS = (
    "tolist",
    "item",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__index__",
    "__float__",
    "unique",
    "bincount",
)
FREE = ("empty", "new_empty", "empty_like", "_unsafe_view")  # no kernel


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name.removeprefix("aten::") not in FREE:
            self.count += 1

        return func(*args, **(kwargs or {}))


class _Syncs(TorchFunctionMode):
    """Counts calls that would make the host wait for a card."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in SYNCS:
            self.count += 1

        return func(*args, **(kwargs or {}))


def make_experts(**changes: Any) -> Experts:
    torch.manual_seed(0)
    experts = Experts(apply(PRESETS["nano"], {"d_model": 16, "d_expert": 12, "num_experts": 8} | changes))
    for weights in experts.parameters():
        torch.nn.init.normal_(weights, std=0.5)

    return experts


def make_layer(experts: Experts, top_k: int = 2, capacity: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Router, routing and experts."""
    router = torch.randn(8, 16, device=experts.w_in.device, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        routing = choose_experts(
            F.linear(x.float(), router),
            top_k=top_k,
            normalize_gates=True,
            tokens_per_group=16,
            seq_len=16,
            capacity_factor=capacity,
        )
        y: Tensor = experts(x, routing)
        return y

    return layer


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 38), (torch.bfloat16, 44)], ids=str)
def test_padded_experts_take_few_kernels_and_one_sync(dtype: torch.dtype, most: int) -> None:
    experts = make_experts(expert_kind="mlp")
    experts.path = "padded"
    x = torch.randn(32, 16, dtype=dtype, requires_grad=True)
    gates = torch.rand(32, 2, requires_grad=True)
    chosen = torch.rand(32, 8).topk(2).indices
    load = torch.bincount(chosen.flatten(), minlength=8)[None]
    grad = torch.ones_like(x)
    with _Syncs() as syncs, _Launches() as launches:  # type: ignore[no-untyped-call]
        torch.autograd.backward(experts(x, TokenChoice(gates, chosen, load)), grad)

    assert launches.count <= most
    assert syncs.count == 1


@pytest.mark.parametrize(
    ("dtype", "capacity", "most"),
    [(torch.float32, 0.0, 52), (torch.bfloat16, 0.0, 58), (torch.float32, 1.25, 53), (torch.bfloat16, 1.25, 59)],
    ids=str,
)
def test_a_whole_layer_takes_few_kernels_and_one_sync_or_none(dtype: torch.dtype, capacity: float, most: int) -> None:
    # Router, routing, experts and, shared by all layers, the routers' losses. Low precision casts weights and back.
    n_layers = 6
    experts = [make_experts(expert_kind="mlp") for _ in range(n_layers)]
    routers = [torch.randn(8, 16, requires_grad=True) for _ in range(n_layers)]
    y = torch.randn(32, 16, dtype=dtype, requires_grad=True)
    with _Syncs() as syncs, _Launches() as launches:  # type: ignore[no-untyped-call]
        routings = []
        for layer, router in zip(experts, routers, strict=True):
            layer.path = "padded"
            routing = choose_experts(
                F.linear(y.float(), router),
                top_k=2,
                normalize_gates=True,
                tokens_per_group=16,
                seq_len=8,
                capacity_factor=capacity,
            )
            y = layer(y, routing)
            routings.append(routing)

        losses = losses_of(routings)
        torch.autograd.backward(y.sum() + losses.balance_L.sum() + losses.z_L.sum())

    assert launches.count / n_layers <= most
    assert syncs.count == (0 if capacity else n_layers)


def test_with_a_capacity_no_value_is_read_off_the_cpu() -> None:
    experts = make_experts().to("meta")  # has no values: reading one is an error
    x = torch.empty(32, 16, device="meta", requires_grad=True)
    y = make_layer(experts, capacity=1.25)(x)
    torch.autograd.backward(y, torch.ones_like(x))
    assert x.grad is not None
    assert x.grad.shape == x.shape
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        make_layer(experts)(x)


def test_without_a_gradient_to_compute_nothing_is_kept() -> None:
    experts = make_experts()
    layer = make_layer(experts)
    x = torch.randn(32, 16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.no_grad():
        y = layer(x)

    assert not kept
    assert y.grad_fn is None
    with hooks:
        torch.testing.assert_close(layer(x), y, rtol=0, atol=0)

    assert kept


@pytest.mark.parametrize(("capacity", "path"), [(0.0, "auto"), (0.75, "loop"), (0.75, "padded")])
def test_compiled_whole_the_layer_gives_the_same_bits(capacity: float, path: Any) -> None:
    experts = make_experts()
    experts.path = path
    layer = make_layer(experts, capacity=capacity)
    x = torch.randn(32, 16, requires_grad=True)
    plain, traced = (
        [y, *torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])]
        for y in (run(x) for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)))
    )
    for a, b in zip(plain, traced, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_routing_and_experts_compile_to_machine_code() -> None:
    experts = make_experts()
    layer = make_layer(experts, capacity=1.25)
    x = torch.randn(32, 16, requires_grad=True)
    plain, compiled = (
        [y, *torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])]
        for y in (run(x) for run in (layer, torch.compile(layer, fullgraph=True)))
    )
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_two_threads")
def test_threads_that_share_the_experts_compute_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PART_ELEMENTS", 1)  # each expert is a part
    experts = make_experts()
    experts.path = "loop"
    x = torch.randn(64, 16, requires_grad=True)
    gates = torch.rand(64, 2, requires_grad=True)
    chosen = torch.rand(64, 8).topk(2).indices
    load = torch.bincount(chosen.flatten(), minlength=8)[None]
    used: set[int] = set()
    both = Barrier(2)

    def noting(work: Callable[[Any], None], parts: Iterable[Any]) -> None:
        waited: set[int] = set()

        def work_and_note(part: Any) -> None:
            if get_ident() not in waited:  # for the other thread, which might find nothing left to do
                waited.add(get_ident())
                both.wait(timeout=60)

            assert not torch.is_grad_enabled()
            work(part)

        for_each(work_and_note, parts)
        used.update(waited)

    def outcome() -> list[Tensor]:
        y = experts(x, TokenChoice(gates, chosen, load))
        return [y, *torch.autograd.grad(y.square().sum(), [x, gates, *experts.parameters()])]

    monkeypatch.setattr(dispatch, "for_each", noting)
    shared = outcome()
    assert len(used) == 2
    monkeypatch.setattr(dispatch, "for_each", for_each)
    monkeypatch.setattr(threads, "_parallel", lambda: None)  # torch without GNU OpenMP
    assert all(torch.equal(a, b) for a, b in zip(shared, outcome(), strict=True))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(shared, outcome(), strict=True))


@pytest.mark.usefixtures("_two_threads")
def test_what_goes_wrong_in_a_thread_is_raised() -> None:
    def work(piece: int) -> None:
        if piece == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        for_each(work, range(6))

    for_each(work, range(3))


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_is_never_lost_between_the_threads() -> None:
    matrix = torch.randn(100, 100)

    def work(_: int) -> None:
        matrix @ matrix

    def work_until_interrupted(seconds: float) -> None:
        deadline = monotonic() + 60.0
        signal.setitimer(signal.ITIMER_REAL, seconds)
        while monotonic() < deadline:
            for_each(work, range(8))

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(50):
            with pytest.raises(KeyboardInterrupt):
                work_until_interrupted(0.01 + number / 10_000)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_padding_is_chosen_for_little_work_and_even_loads_only() -> None:
    def path(loads: list[int], d_expert: int) -> str:
        sizes = {"n_experts": len(loads), "assignments": sum(loads), "d_model": 64, "d_expert": d_expert}
        return choose(max(loads), **sizes, dtype=torch.float32, device="cpu")

    assert path([64] * 8, 64) == "padded"
    assert path([64] * 8, 64_000) == "loop"
    assert path([505, *[1] * 7], 64) == "loop"
    # Several threads are faster at padding little work, and share out the loop from less work on.
    some: dict[str, Any] = {"n_experts": 16, "d_model": 384, "d_expert": 384, "dtype": torch.float32, "device": "cpu"}
    assert choose(69, assignments=1024, threads=1, **some) == "loop"
    assert choose(69, assignments=1024, threads=2, **some) == "padded"
    assert choose(256, assignments=4096, threads=2, **some) == "loop"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["loop", "padded"])
@pytest.mark.parametrize("capacity", [0.0, 0.75])
def test_each_kept_assignment_has_a_row_of_its_own(capacity: float, path: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    groups: dict[str, Any] = {"tokens_per_group": 20, "seq_len": 10, "capacity_factor": capacity}
    _, chosen, load, _, most, row = choose_experts(torch.randn(40, 6), top_k=3, normalize_gates=True, **groups)
    slots = arrange(chosen, load, most, row, path=path, d_model=8, d_expert=8, dtype=dtype)
    kept = slots.slot_A < len(slots.token_R)
    assert kept.sum() == load.clamp_max(most).sum() if most else kept.all()
    rows = slots.slot_A[kept]
    assert len(set(rows.tolist())) == len(rows)
    assert torch.equal(slots.token_R[rows], torch.arange(40).repeat_interleave(3)[kept])
    sizes = slots.rows_E if path == "loop" else torch.full((6,), len(slots.token_R) // 6)
    assert torch.equal(torch.arange(6).repeat_interleave(sizes)[rows], chosen.flatten()[kept])
    assert set(slots.token_R.tolist()) == set(slots.token_R[rows].tolist())  # in no row a token that was dropped
