"""Three whole configs to start from. Their sizes and learning rates were tuned by measurement."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moe.config import Config

_NANO = Config(
    d_model=32,
    n_layers=2,
    n_heads=2,
    seq_len=64,
    rope_base=10_000.0,
    init_std=0.1,
    num_experts=4,
    top_k=2,
    d_expert=32,
    expert_kind="swiglu",
    normalize_gates=True,
    load_balance_weight=0.01,
    router_z_weight=0.001,
    routing_group=1,
    corpus="wikipedia",
    tokenizer="byte",
    vocab_size=256,
    lr=1e-2,
    min_lr_ratio=0.1,
    warmup_fraction=0.1,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    grad_clip=1.0,
    batch_size=8,
    budget_tokens=64 * 8 * 40,
    eval_tokens=4096,
    progress_evals=2,
    micro_batch_size=8,
    precision="fp32",  # at this width bf16 on a CPU takes 1.1 to 1.6 times as long: converting costs more than it saves
)

PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        "nano": _NANO,
        # Narrow models want wider initial weights: GPT-2's 0.02 costs this one 0.07 to 0.20 bits per byte (3 seeds).
        "micro": _NANO.model_copy(
            update={
                "d_model": 64,
                "num_experts": 8,
                "d_expert": 128,
                "init_std": 0.06,
                "lr": 6e-3,
                "budget_tokens": 64 * 8 * 1000,
                "eval_tokens": 65_536,
                "progress_evals": 8,
            }
        ),
        # The Blueberry model: 79.1 M parameters, tied embeddings, two-matrix experts.
        "t4": _NANO.model_copy(
            update={
                "d_model": 384,
                "n_layers": 6,
                "n_heads": 8,
                "seq_len": 512,
                "num_experts": 8,
                "d_expert": 1536,
                "expert_kind": "mlp",
                "tokenizer": "bpe",
                "vocab_size": 49_152,
                "init_std": 0.02,
                "lr": 1e-3,
                "batch_size": 96,
                "micro_batch_size": 24,
                "budget_tokens": 512 * 96 * 400,
                "eval_tokens": 49_152,
                "progress_evals": 10,
                "precision": "auto",
            }
        ),
    }
)
"""nano: tests, under 2 s a run; micro: one CPU thread, about 20 s a run; t4: the Blueberry configuration."""

for _preset in PRESETS.values():  # model_copy does not validate
    Config.model_validate(_preset.model_dump())
