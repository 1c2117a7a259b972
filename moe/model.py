"""The model: a decoder-only Transformer whose feed-forward layers are mixtures of experts.

RMSNorm before each layer, rotary positions, causal attention through SDPA, token-choice routing, no biases, no dropout,
input and output embeddings tied. Under fp16 autocast the residual stream, the norms, the router and the loss stay
in fp32. Weights are drawn per parameter from the seed and the parameter's name, so two configs that differ in one
place share all other initial weights.

    model = MoE(config)
    model.init_weights(seed=0)
    model(tokens_BT, targets_BT).loss.backward()

B sequences, T positions, N = B * T tokens, D d_model, H heads, W head width, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.accounting import LOGITS_CHUNK
from moe.config import Config
from moe.experts import Experts
from moe.routing import Routing, route

NORM_EPS = 1e-6  # as in the released checkpoints of Llama 1


class Output(NamedTuple):
    """`loss` is what training descends: cross entropy in nats a token plus the weighted router losses."""

    loss: Tensor
    cross_entropy: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    load_LE: Tensor
    router_entropy: Tensor


class MoE(nn.Module):
    """The whole network. Its parameters are uninitialized until init_weights()."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights from `seed`; equal seeds give equal bits."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue

            generator = torch.Generator().manual_seed(_seed_of(seed, name))
            std = self.config.init_std
            if name.endswith("w_out"):  # GPT-2: layers that write to the residual stream start smaller
                std /= (2 * self.config.n_layers) ** 0.5

            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(std))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Output:
        """The training loss of a micro-batch and what its routers did."""
        x_ND, routings = self._hidden(tokens_BT)
        cross_entropy = sum_nats(x_ND, self.embedding, targets_BT.flatten()) / targets_BT.numel()
        balance_loss = torch.stack([routing.balance_loss for routing in routings]).mean()
        z_loss = torch.stack([routing.z_loss for routing in routings]).mean()
        return Output(
            loss=cross_entropy + self.config.load_balance_weight * balance_loss + self.config.router_z_weight * z_loss,
            cross_entropy=cross_entropy.detach(),
            balance_loss=balance_loss.detach(),
            z_loss=z_loss.detach(),
            load_LE=torch.stack([routing.load_E for routing in routings]),
            router_entropy=torch.stack([routing.entropy for routing in routings]).mean(),
        )

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] for the token after each position."""
        x_ND, _ = self._hidden(tokens_BT)
        return F.linear(x_ND, self.embedding).view(*tokens_BT.shape, -1)

    def _hidden(self, tokens_BT: Tensor) -> tuple[Tensor, list[Routing]]:
        x_BTD = F.embedding(tokens_BT, self.embedding)
        rotation = rotary(self.config, tokens_BT.shape[1], x_BTD)
        routings = []
        for block in self.blocks:
            x_BTD, routing = block(x_BTD, rotation)
            routings.append(routing)

        return self.norm(x_BTD).flatten(0, 1), routings


class Block(nn.Module):
    """Attention, then a mixture of experts, each added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.experts_norm = RMSNorm(config.d_model)
        self.router = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        self.experts = Experts(config)
        self.config = config

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Routing]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation)
        x_ND = self.experts_norm(x_BTD).flatten(0, 1)
        with torch.autocast(x_ND.device.type, enabled=False):  # router logits in fp32 (Switch, section 2.4)
            logits_NE = F.linear(x_ND, self.router)
            routing = route(
                logits_NE,
                top_k=self.config.top_k,
                normalize_gates=self.config.normalize_gates,
                tokens_per_group=self.config.routing_group * x_BTD.shape[1] if self.training else len(x_ND),
            )

        y_ND = self.experts(x_ND, routing.gates_NK, routing.experts_NK, routing.load_E)
        return x_BTD + y_ND.view_as(x_BTD), routing


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.w_qkv = nn.Parameter(torch.empty(3 * config.d_model, config.d_model))
        self.w_out = nn.Parameter(torch.empty(config.d_model, config.d_model))

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        qkv = F.linear(x_BTD, self.w_qkv).view(*x_BTD.shape[:2], 3, self.n_heads, -1)
        q_BHTW, k_BHTW, v_BHTW = qkv.permute(2, 0, 3, 1, 4)
        y_BHTW = F.scaled_dot_product_attention(
            rotate(q_BHTW, rotation), rotate(k_BHTW, rotation), v_BHTW, is_causal=True
        )
        return F.linear(y_BHTW.transpose(1, 2).flatten(2), self.w_out)


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a learned scale (arXiv:1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, eps=NORM_EPS)


def rotary(config: Config, seq_len: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, W / 2] of RoPE (arXiv:2104.09864) in the type of `like`."""
    width = config.d_model // config.n_heads
    exponents = torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width
    positions = torch.arange(seq_len, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, config.rope_base**-exponents)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x_BHTW: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[i], x[i + W / 2]) by its position's angle."""
    cos, sin = rotation
    a, b = x_BHTW.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTW.dtype)


def sum_nats(x_ND: Tensor, embedding_VD: Tensor, targets_N: Tensor, chunk: int = LOGITS_CHUNK) -> Tensor:
    """Total cross entropy in nats, holding at most `chunk` logits at once and recomputing them in the backward.

    With 49,152 words the logits of the t4 preset's micro-batch, their softmax and their gradient take 7 GB at once.
    """
    rows = max(1, chunk // len(embedding_VD))
    if len(x_ND) <= rows:
        return _nats(x_ND, embedding_VD, targets_N)

    parts = [
        checkpoint(_nats, x_nD, embedding_VD, targets_n, use_reentrant=False, preserve_rng_state=False)
        for x_nD, targets_n in zip(torch.split(x_ND, rows), torch.split(targets_N, rows), strict=True)
    ]
    return torch.stack(parts).sum()


def _nats(x_nD: Tensor, embedding_VD: Tensor, targets_n: Tensor) -> Tensor:
    logits_nV = F.linear(x_nD, embedding_VD)
    wide = torch.promote_types(logits_nV.dtype, torch.float32)
    return F.cross_entropy(logits_nV.to(wide), targets_n, reduction="sum")


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest())
