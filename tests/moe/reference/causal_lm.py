"""Causal language models of `transformers`, built from one of our configs: which knob is which of their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.models.dots1 import Dots1Config, Dots1ForCausalLM
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe.config import Config
from moe.layers import NORM_EPS
from tests.moe.reference.agreement import SIGMOID, Names


def mixtral(config: Config) -> nn.Module:
    """Softmax over all experts, the chosen gates scaled to sum to 1."""
    model: nn.Module = MixtralForCausalLM(
        MixtralConfig(
            **backbone(config),
            intermediate_size=config.d_expert,
            num_local_experts=config.num_experts,
            router_aux_loss_coef=0.0,
        )
    )
    return model


def qwen3_moe(config: Config) -> nn.Module:
    """Gates scaled or raw, QK-norm, and dense layers: the first few, and all but every n-th."""
    model: nn.Module = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **backbone(config),
            moe_intermediate_size=config.d_expert,
            intermediate_size=config.dense_width,
            num_experts=config.num_experts,
            norm_topk_prob=config.normalize_gates,
            decoder_sparse_step=config.moe_every,
            mlp_only_layers=list(range(config.first_k_dense)),
            router_aux_loss_coef=0.0,
        )
    )
    return model


def dots1(config: Config) -> nn.Module:
    """DeepSeek-V3's layer (sigmoid scores, a bias that only selects, shared experts) under ordinary attention."""
    model: nn.Module = Dots1ForCausalLM(
        Dots1Config(
            **backbone(config),
            moe_intermediate_size=config.d_expert,
            intermediate_size=config.dense_width,
            n_routed_experts=config.num_experts,
            n_shared_experts=config.num_shared_experts,
            first_k_dense_replace=config.first_k_dense,
            norm_topk_prob=config.normalize_gates,
            sliding_window=None,
        )
    )
    return model


MODELS: dict[str, tuple[Callable[[Config], nn.Module], dict[str, Any]]] = {
    "mixtral": (mixtral, {}),
    "mixtral, GeGLU, top-3 of 8, tied, multi-query": (
        mixtral,
        {"expert_kind": "geglu", "num_experts": 8, "top_k": 3, "tie_embeddings": True, "gqa_group_size": 4},
    ),
    "mixtral, all experts, multi-head": (mixtral, {"top_k": 4, "gqa_group_size": 1, "rope_base": 500.0}),
    "qwen3-moe": (qwen3_moe, {"qk_norm": True}),
    "qwen3-moe, raw gates, layers 3 and 5 of 0 to 5 sparse": (
        qwen3_moe,
        {
            "qk_norm": True,
            "normalize_gates": False,
            "n_layers": 6,
            "first_k_dense": 2,
            "moe_every": 2,
            "dense_scale": 3.0,
            "num_experts": 8,
            "d_expert": 8,
        },
    ),
    "dots1": (dots1, SIGMOID | {"qk_norm": True, "n_layers": 3, "first_k_dense": 1, "num_experts": 8}),
    "dots1, raw gates": (dots1, SIGMOID | {"qk_norm": True, "normalize_gates": False, "top_k": 3}),
}
"""What is compared: their model, and in what our config differs from TINY."""

_MODEL_NAMES: Names = {
    "embedding": ("model.embed_tokens.weight",),
    "norm.scale": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}
_LAYER_NAMES: Names = {
    "attention_norm.scale": ("input_layernorm.weight",),
    "attention.w_qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.query_norm.scale": ("self_attn.q_norm.weight",),
    "attention.key_norm.scale": ("self_attn.k_norm.weight",),
    "attention.w_out": ("self_attn.o_proj.weight",),
    "feed_forward_norm.scale": ("post_attention_layernorm.weight",),
    "feed_forward.router": ("mlp.gate.weight",),
    "feed_forward.balance_bias": ("mlp.gate.e_score_correction_bias",),
    "feed_forward.experts.w_in": ("mlp.experts.gate_up_proj",),
    "feed_forward.experts.w_out": ("mlp.experts.down_proj",),
    "feed_forward.shared.w_in": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "feed_forward.shared.w_out": ("mlp.shared_experts.down_proj.weight",),
    "feed_forward.w_in": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.w_out": ("mlp.down_proj.weight",),
}


def names_in(config: Config) -> Names:
    """Our names and theirs, for every layer all that one may have."""
    layers = {
        f"blocks.{layer}.{name}": tuple(f"model.layers.{layer}.{part}" for part in parts)
        for layer in range(config.n_layers)
        for name, parts in _LAYER_NAMES.items()
    }
    return {**_MODEL_NAMES, **layers}


def backbone(config: Config) -> dict[str, Any]:
    """Settings that all their models share. Eager: plain products and masks, as far from our code as can be."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_model // config.n_heads,
        "num_experts_per_tok": config.top_k,
        "hidden_act": "gelu" if config.expert_kind == "geglu" else "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": False,
        "pad_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
