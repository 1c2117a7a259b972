"""The parts of a block: normalization, attention with rotary positions, dense layers and mixtures of experts.

Weights are stored in fp32 and cast to the type of their input. A part computes in the compute type; the residual stream
that it adds to stays in fp32. A float64 model computes in float64 throughout.

B sequences, T positions, S positions so far (all in the KV cache), N = B * T tokens, D d_model, H heads, W head width
(w = W / 2), E experts, K experts a token, C tokens an expert takes, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.accounting import SHORT_SEQUENCE
from moe.activation import activate
from moe.config import Config
from moe.experts import Experts
from moe.fused import rms_norm, rotate
from moe.routing import Routing, choose_experts, choose_tokens, hash_experts
from moe.seeded import generator_of
from moe.space.experts import GATED

NORM_EPS = 1e-6  # as in the released checkpoints of Llama 1

Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a learned scale (arXiv:1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, NORM_EPS)


class KeyValues:
    """One layer's KV cache: keys and values of the positions so far, with room for `length` of them."""

    def __init__(self, config: Config, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, config.kv_heads, length, config.d_model // config.n_heads)
        self.keys_BHSW = torch.empty(shape, dtype=dtype, device=device)
        self.values_BHSW = torch.empty(shape, dtype=dtype, device=device)
        self.count = 0

    def extend(self, k_BHTW: Tensor, v_BHTW: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of the next positions; returns all so far."""
        start, self.count = self.count, self.count + k_BHTW.shape[2]
        self.keys_BHSW[:, :, start : self.count] = k_BHTW
        self.values_BHSW[:, :, start : self.count] = v_BHTW
        return self.keys_BHSW[:, :, : self.count], self.values_BHSW[:, :, : self.count]


class Attention(nn.Module):
    """Causal attention with rotary positions; groups of query heads may share keys and values (GQA)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_heads, self.kv_heads = config.n_heads, config.kv_heads
        self.width = config.d_model // config.n_heads
        self.w_qkv = nn.Parameter(torch.empty((self.n_heads + 2 * self.kv_heads) * self.width, config.d_model))
        self.w_out = nn.Parameter(torch.empty(config.d_model, config.d_model))
        self.query_norm = RMSNorm(self.width) if config.qk_norm else None
        self.key_norm = RMSNorm(self.width) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, rotation: Rotation, cache: KeyValues | None = None) -> Tensor:
        """With a `cache`, x_BTD are the positions after those in it, which they attend to as well."""
        heads_BTHW = F.linear(x_BTD, self.w_qkv.to(x_BTD.dtype)).view(*x_BTD.shape[:2], -1, self.width)
        qk_BTHW, v_BTHW = torch.split(heads_BTHW, [self.n_heads + self.kv_heads, self.kv_heads], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHW, k_BTHW = torch.split(qk_BTHW, [self.n_heads, self.kv_heads], dim=2)
            qk_BTHW = torch.cat((self.query_norm(q_BTHW), self.key_norm(k_BTHW)), dim=2)

        qk_BHTW = rotate(qk_BTHW, *rotation).transpose(1, 2)
        q_BHTW, k_BHSW = torch.split(qk_BHTW, [self.n_heads, self.kv_heads], dim=1)
        v_BHSW, mask_TS = v_BTHW.transpose(1, 2), None
        if cache is not None:
            k_BHSW, v_BHSW = cache.extend(k_BHSW, v_BHSW)
            mask_TS = _causal_mask(q_BHTW.shape[2], k_BHSW.shape[2], x_BTD.device)
        elif x_BTD.is_cpu and x_BTD.dtype == torch.bfloat16 and x_BTD.shape[1] < SHORT_SEQUENCE:
            q_BHTW, k_BHSW, v_BHSW = q_BHTW.float(), k_BHSW.float(), v_BHSW.float()

        y_BHTW = F.scaled_dot_product_attention(
            q_BHTW,
            k_BHSW,
            v_BHSW,
            attn_mask=mask_TS,
            is_causal=mask_TS is None and q_BHTW.shape[2] == k_BHSW.shape[2],
            enable_gqa=self.kv_heads < self.n_heads,
        )
        return F.linear(y_BHTW.transpose(1, 2).flatten(2).to(x_BTD.dtype), self.w_out.to(x_BTD.dtype))


class Dense(nn.Module):
    """One feed-forward network that every token goes through."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.kind = config.expert_kind
        self.w_in = nn.Parameter(torch.empty(2 * width if self.kind in GATED else width, config.d_model))
        self.w_out = nn.Parameter(torch.empty(config.d_model, width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = activate(F.linear(x, self.w_in.to(x.dtype)), self.kind)
        return F.linear(hidden, self.w_out.to(x.dtype))


class Mixture(nn.Module):
    """A router and its experts, with shared experts beside them (one dense network of their joint width)."""

    hash_VK: Tensor
    balance_bias: Tensor

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config = config
        self.experts = Experts(config)
        shared = config.num_shared_experts * config.d_expert
        self.shared = Dense(config, shared) if shared else None
        if config.routing == "hash":
            self.register_buffer("hash_VK", _hash_table(config, layer), persistent=False)
        else:
            self.router = nn.Parameter(torch.empty(config.num_experts, config.d_model))

        if config.noisy_top_k and config.routing == "token_choice":
            self.router_noise = nn.Parameter(torch.empty(config.num_experts, config.d_model))

        if config.balance_bias_rate > 0.0 and config.routing == "token_choice":
            self.register_buffer("balance_bias", torch.zeros(config.num_experts))

    def forward(
        self, x_BTD: Tensor, tokens_BT: Tensor, dtype: torch.dtype, noise_NE: Tensor | None
    ) -> tuple[Tensor, Routing]:
        """`x_BTD` is in fp32, for the router; the experts compute in `dtype`."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.route(x_ND, tokens_BT, dtype, noise_NE)
        low_ND = x_ND.to(dtype)
        y_ND = self.experts(low_ND, routing)
        if self.shared is not None:
            y_ND = y_ND + self.shared(low_ND)

        return y_ND.view_as(x_BTD), routing

    def route(self, x_ND: Tensor, tokens_BT: Tensor, dtype: torch.dtype, noise_NE: Tensor | None) -> Routing:
        """Where each token goes. In evaluation a group is one sequence, and nothing is dropped or noisy."""
        config = self.config
        if config.routing == "hash":
            return hash_experts(self.hash_VK[tokens_BT.flatten()], config.num_experts, x_ND.dtype)

        seq_len = tokens_BT.shape[1]
        group = config.routing_group * config.seq_len if self.training else seq_len
        logits_NE = self._project(x_ND, self.router, dtype)
        if config.routing == "expert_choice":
            return choose_tokens(logits_NE, top_k=config.top_k, score=config.router_score, tokens_per_group=group)

        if config.noisy_top_k and self.training:
            if noise_NE is None:
                raise ValueError("noisy_top_k needs the noise of moe.noise.router_noise() while training")

            spread_NE = F.softplus(self._project(x_ND, self.router_noise, dtype))
            logits_NE = logits_NE + noise_NE.to(spread_NE) * spread_NE

        return choose_experts(
            logits_NE,
            top_k=config.top_k,
            score=config.router_score,
            normalize_gates=config.normalize_gates,
            tokens_per_group=group,
            seq_len=seq_len,
            capacity_factor=config.capacity_factor if self.training else 0.0,
            bias_E=self.balance_bias if config.balance_bias_rate > 0.0 else None,
        )

    @torch.no_grad()
    def update_balance(self, load_E: Tensor) -> None:
        """Move the selection bias towards experts with less than the mean load (arXiv:2408.15664, algorithm 1)."""
        load = load_E.to(self.balance_bias.dtype)
        self.balance_bias += self.config.balance_bias_rate * torch.sign(load.mean() - load)

    def _project(self, x_ND: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
        if self.config.router_precision == "fp32":
            return F.linear(x_ND, weight_ED)

        return F.linear(x_ND.to(dtype), weight_ED.to(dtype)).to(x_ND.dtype)


def rotary(config: Config, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines of RoPE (arXiv:2104.09864) for rotate(), [T, H, W] in fp32 or wider.

    H counts the heads of queries and keys, which are rotated together. The sine of each pair's first half is negated.
    """
    width = config.d_model // config.n_heads
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, width, 2, device=positions_T.device, dtype=wide) / width
    angles_Tw = torch.outer(positions_T.to(wide), config.rope_base**-exponents)
    cos_Tw, sin_Tw = angles_Tw.cos(), angles_Tw.sin()
    heads = config.n_heads + config.kv_heads
    cos_TW, sin_TW = torch.cat((cos_Tw, cos_Tw), dim=-1), torch.cat((-sin_Tw, sin_Tw), dim=-1)
    return cos_TW[:, None].repeat(1, heads, 1), sin_TW[:, None].repeat(1, heads, 1)


def _causal_mask(n_new: int, n_all: int, device: torch.device) -> Tensor | None:
    """Which of `n_all` positions each of the last `n_new` may see; None for one or all of them: SDPA needs no mask."""
    if n_new in (1, n_all):
        return None

    return torch.ones(n_new, n_all, dtype=torch.bool, device=device).tril(n_all - n_new)


def _hash_table(config: Config, layer: int) -> Tensor:
    # A random, fixed, balanced-on-average choice of top_k distinct experts for each token id; another in every layer.
    order_VE = torch.rand(config.vocab_size, config.num_experts, generator=generator_of(f"hash/{layer}")).argsort(dim=1)
    return order_VE[:, : config.top_k]
