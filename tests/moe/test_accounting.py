"""Accounting is exact: held against the real model, and against torch's own counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import measure
from moe.accounting import CONTEXT_BYTES, account, activation_bytes, fit_micro_batch, peak_memory_bytes
from moe.config import Config, apply
from moe.model import MoE
from moe.noise import router_noise
from moe.presets import PRESETS

NANO = PRESETS["nano"]
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"expert_kind": "mlp"},
    "one expert": {"num_experts": 1, "top_k": 1},
    "many narrow experts": {"num_experts": 16, "top_k": 4, "d_expert": 8},
    "bpe": {"tokenizer": "bpe", "vocab_size": 1024},
    "deep": {"n_layers": 5, "d_model": 48},
    "shared": {"num_shared_experts": 2, "gqa_group_size": 2, "qk_norm": True},
    "partly dense": {"n_layers": 5, "first_k_dense": 1, "moe_every": 2, "dense_scale": 1.5, "tie_embeddings": False},
    "noisy": {"noisy_top_k": True, "router_score": "sigmoid"},
    "hash": {"routing": "hash", "expert_kind": "relu2"},
}
CONFIGS = dict(PRESETS) | {name: apply(NANO, changes) for name, changes in VARIANTS.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameters_are_those_of_the_model(config: Config) -> None:
    with torch.device("meta"):
        parameters = dict(MoE(config).named_parameters())

    experts = sum(p.numel() for name, p in parameters.items() if ".experts." in name)
    total = sum(p.numel() for p in parameters.values())
    costs = account(config)
    assert costs.parameters == total
    assert costs.active_parameters == total - experts + experts * config.top_k // config.num_experts


def test_t4_is_the_model_that_blueberry_describes() -> None:
    costs = account(PRESETS["t4"])
    assert round(costs.parameters / 1e6, 1) == 79.1
    assert round(costs.flops_per_token / 1e6) == 227


@pytest.mark.parametrize("name", ["nano", "mlp", "bpe", "shared", "partly dense", "noisy", "hash"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    config = CONFIGS[name]
    model = _model(config)
    for mixture in model.mixtures:
        mixture.experts.path = "loop"  # the other layout computes padding, which is no work of the model's

    tokens = torch.randint(config.vocab_size, (config.micro_batch_size, config.seq_len + 1))
    with MultiplicationCounter() as counter:
        noise = router_noise(config, seed=0, first=0, count=len(tokens))
        torch.autograd.backward(model(tokens[:, :-1], tokens[:, 1:], noise).loss)

    attention = 6 * config.n_layers * config.d_model * (config.seq_len + 1)
    n_tokens = config.micro_batch_size * config.seq_len
    assert counter.flops == (account(config).flops_per_token - attention) * n_tokens


def test_budget_flops_follow_whole_steps() -> None:
    costs = account(NANO)
    assert NANO.steps is not None
    assert costs.flops == costs.flops_per_token * NANO.steps * NANO.batch_size * NANO.seq_len
    assert account(apply(NANO, {"budget_tokens": None, "budget_seconds": 5.0})).flops is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert_kind": "mlp"},
        {"num_experts": 8, "top_k": 1, "d_expert": 128},
        {"num_shared_experts": 1, "first_k_dense": 1, "gqa_group_size": 2},
        {"activation_checkpointing": True, "n_layers": 4},
    ],
    ids=str,
)
def test_activation_bytes_are_those_that_autograd_keeps(
    changes: dict[str, Any], precision: Literal["fp32", "bf16"]
) -> None:
    config = apply(NANO, {"d_model": 64, "d_expert": 64} | changes)
    model = _model(config)
    model.compute = torch.bfloat16 if precision == "bf16" else None
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()

        return tensor

    tokens = torch.randint(config.vocab_size, (config.micro_batch_size, config.seq_len + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens[:, :-1], tokens[:, 1:])

    n_tokens = config.micro_batch_size * config.seq_len
    low = 4 if precision == "fp32" else 2
    # The input of the last norm, and the gradients that the loss has made already.
    head = ((4 + low) * n_tokens + 4 * config.vocab_size) * config.d_model
    copies = 0 if low == 4 or config.activation_checkpointing else low * account(config).parameters
    assert sum(kept.values()) - head - copies == pytest.approx(activation_bytes(config, precision), rel=0.15)
    assert output.loss.isfinite()


def test_peak_memory_of_t4_is_about_what_its_card_has_room_for() -> None:
    t4 = PRESETS["t4"]
    assert 2.5e9 < peak_memory_bytes(t4, "fp16") < 5.5e9
    assert peak_memory_bytes(t4, "fp32") > peak_memory_bytes(t4, "fp16")


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 2},
        {"micro_batch_size": 4, "batch_size": 4, "expert_kind": "mlp", "top_k": 1, "num_experts": 32, "ema_decay": 0.9},
        {"optimizer": "muon", "micro_batch_size": 2, "batch_size": 2, "num_experts": 16},
        {"optimizer": "muon", "micro_batch_size": 2, "routing": "hash", "precision": "bf16", "d_expert": 512},
        {"activation_checkpointing": True, "n_layers": 4, "seq_len": 128, "num_shared_experts": 2, "moe_every": 2},
        {
            "tokenizer": "bpe",
            "vocab_size": 512,
            "seq_len": 256,
            "batch_size": 4,
            "logit_softcap": 15.0,
            "first_k_dense": 1,
        },
    ],
    ids=["micro-batches", "many experts, averaged", "Muon", "Muon in bf16", "checkpointing", "much text"],
)
def test_peak_memory_is_within_a_tenth_of_what_is_allocated(changes: dict[str, Any], data_dir: Path) -> None:
    config = apply(NANO, {"d_model": 128, "n_layers": 3, "n_heads": 4, "d_expert": 256} | changes)
    predicted = peak_memory_bytes(config, "bf16" if config.precision == "bf16" else "fp32") - CONTEXT_BYTES["fp32"]
    assert predicted == pytest.approx(measure(config, data_dir).allocated, rel=0.1)


def test_micro_batch_is_refitted_to_the_memory() -> None:
    t4 = PRESETS["t4"]
    assert fit_micro_batch(t4, 15 * 2**30, "fp16") == 24
    peaks = {size: peak_memory_bytes(t4.model_copy(update={"micro_batch_size": size}), "fp16") for size in (2, 12, 16)}
    assert fit_micro_batch(t4, peaks[12], "fp16") == 12
    assert fit_micro_batch(t4, peaks[16] - 1, "fp16") == 12
    assert fit_micro_batch(apply(t4, {"routing_group": 8}), peaks[12], "fp16") == 8
    assert fit_micro_batch(apply(t4, {"routing_group": 8}), peaks[2], "fp16") is None
    assert fit_micro_batch(t4, CONTEXT_BYTES["fp16"], "fp16") is None


class MultiplicationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts two FLOPs for each multiply-add of matrix products, also of those that write into a given tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"):
            a, b = [argument for argument in args if isinstance(argument, Tensor)][-2:]
            self.flops += 2 * a.numel() * b.shape[-1]

        return func(*args, **(kwargs or {}))


def _model(config: Config) -> MoE:
    model = MoE(config)
    model.init_weights(0)
    return model
