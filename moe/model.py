"""The model: a decoder-only Transformer whose feed-forward layers are mixtures of experts.

RMSNorm before each layer, rotary positions, causal attention through SDPA, no biases, no dropout. Matrix products are
computed in the *compute type* (bf16, fp16 or the weights' own); the residual stream, the norms, the router and the
loss stay in fp32. Weights are drawn per parameter from the seed and the parameter's name, so two configs that differ in
one place share all other initial weights.

    model = MoE(config)
    model.init_weights(seed=0)
    model(tokens_BT, targets_BT).loss.backward()

B sequences, T positions, N = B * T tokens, D d_model, V vocabulary, E experts, L layers with experts.

moe/README.md says where each guarantee of this package is made, and which test shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import Config
from moe.layers import Attention, Dense, KeyValues, Mixture, RMSNorm, Rotation, rotary
from moe.loss import cap, sum_nats
from moe.routing import Routing, TokenChoice, losses_of
from moe.seeded import generator_of

Seen = TypeVar("Seen")


class Output(NamedTuple):
    """`loss` is what training descends: cross entropy in nats a token plus the weighted router losses.

    The router losses, the entropy and `dropped` (the part of assignments lost to a capacity) are means over layers.
    """

    loss: Tensor
    cross_entropy: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    load_LE: Tensor
    router_entropy: Tensor
    dropped: Tensor


class MoE(nn.Module):
    """The whole network. Its parameters are uninitialized until init_weights()."""

    def __init__(self, config: Config, compute: torch.dtype | None = None) -> None:
        """`compute` is the type of the matrix products; None: that of the weights."""
        super().__init__()
        self.config = config
        self.compute = compute
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model)
        self._rotation_key: tuple[int, torch.dtype, torch.device] | None = None
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights from `seed` and config.replicate; equal ones give equal bits."""
        for name, parameter in self.named_parameters():
            std = self._initial_std(name)
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif std == 0.0:
                parameter.zero_()
            else:
                drawn_as = f"{seed}/{self.config.replicate}/{name}" if self.config.replicate else f"{seed}/{name}"
                parameter.copy_(torch.randn(parameter.shape, generator=generator_of(drawn_as)).mul_(std))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, noise_LNE: Tensor | None = None) -> Output:
        """The training loss of a micro-batch and what its routers did.

        Args:
            noise_LNE: of moe.noise.router_noise(); needed for training with noisy_top_k, else ignored.
        """
        x_ND, routings = self.hidden(tokens_BT, noise_LNE)
        nats = sum_nats(x_ND, self.head_weight, targets_BT.flatten(), self.config.logit_softcap)
        cross_entropy = nats / targets_BT.numel()
        balance, z, entropy = (loss_L.mean() for loss_L in losses_of(routings, self.config.router_score))
        load_LE = torch.stack([routing.load_E for routing in routings])
        return Output(
            loss=cross_entropy + self.config.load_balance_weight * balance + self.config.router_z_weight * z,
            cross_entropy=cross_entropy.detach(),
            balance_loss=balance.detach(),
            z_loss=z.detach(),
            load_LE=load_LE,
            router_entropy=entropy,
            dropped=_dropped(routings, load_LE),
        )

    def logits(self, tokens_BT: Tensor, noise_LNE: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] for the token after each position."""
        x_ND, _ = self.hidden(tokens_BT, noise_LNE)
        logits_NV = F.linear(x_ND, self.head_weight.to(x_ND.dtype))
        return cap(logits_NV, self.config.logit_softcap).view(*tokens_BT.shape, -1)

    def hidden(self, tokens_BT: Tensor, noise_LNE: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """What the head sees, [N, D] in the compute type, and where each layer with experts sent the tokens."""
        x_BTD = F.embedding(tokens_BT, self.embedding)
        dtype = self.compute or x_BTD.dtype
        rotation = self._rotation(tokens_BT.shape[1], dtype, tokens_BT.device)
        noises = iter(() if noise_LNE is None else noise_LNE)
        routings = []
        for block in self.blocks:
            noise_NE = next(noises, None) if isinstance(block.feed_forward, Mixture) else None
            arguments = (x_BTD, tokens_BT, rotation, dtype, noise_NE)
            if self.config.activation_checkpointing and self.training:
                x_BTD, routing = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, routing = block(*arguments)

            if routing is not None:
                routings.append(routing)

        return self.norm(x_BTD).flatten(0, 1).to(dtype), routings

    @property
    def head_weight(self) -> Tensor:
        return self.embedding if self.head is None else self.head

    @property
    def mixtures(self) -> list[Mixture]:
        """The layers with experts, from the bottom."""
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, Mixture)]

    def update_balance(self, load_LE: Tensor) -> None:
        """After an optimizer step, from the load of its whole batch: balancing by bias, where it is configured."""
        if self.config.balance_bias_rate > 0.0 and self.config.routing == "token_choice":
            for mixture, load_E in zip(self.mixtures, load_LE, strict=True):
                mixture.update_balance(load_E)

    def _rotation(self, length: int, dtype: torch.dtype, device: torch.device) -> Rotation:
        # Kept between passes: to make it each time would take 1 % of a small model's step.
        key = (length, dtype, device)
        if self._rotation_key != key:
            self._kept_rotation = rotary(self.config, torch.arange(length, device=device), dtype)
            self._rotation_key = key

        return self._kept_rotation

    def _initial_std(self, name: str) -> float:
        config = self.config
        if name.endswith("router_noise"):  # Shazeer et al. 2017, appendix A: both projections start at zero
            return 0.0
        if name.endswith("router"):
            return config.init_std * config.router_init_scale
        if name.endswith("w_out"):  # GPT-2: layers that write to the residual stream start smaller
            return 0.0 if config.zero_init_out else config.init_std / (2 * config.n_layers) ** 0.5
        return config.init_std


class Block(nn.Module):
    """Attention, then a mixture of experts or a dense network, each added to the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model)
        self.feed_forward = Mixture(config, layer) if config.moe_layers[layer] else Dense(config, config.dense_width)

    def forward(
        self,
        x_BTD: Tensor,
        tokens_BT: Tensor,
        rotation: Rotation,
        dtype: torch.dtype,
        noise_NE: Tensor | None,
        cache: KeyValues | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD).to(dtype), rotation, cache)
        normed_BTD = self.feed_forward_norm(x_BTD)
        if isinstance(self.feed_forward, Mixture):
            y_BTD, routing = self.feed_forward(normed_BTD, tokens_BT, dtype, noise_NE)
            return x_BTD + y_BTD, routing

        return x_BTD + self.feed_forward(normed_BTD.to(dtype)), None


@contextmanager
def looking_at(model: MoE, look: Callable[[Mixture, Tensor], Seen]) -> Iterator[list[Seen]]:
    """While it is open, each pass of `model` appends look(mixture, x_ND) to the list for every layer with experts.

    x_ND is the layer's input. Layers come from the bottom; clear the list between passes.
    """
    seen: list[Seen] = []

    def append(mixture: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(mixture, Mixture)
        seen.append(look(mixture, arguments[0].flatten(0, 1)))

    handles = [mixture.register_forward_pre_hook(append) for mixture in model.mixtures]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _dropped(routings: list[Routing], load_LE: Tensor) -> Tensor:
    kept = [routing.kept_E for routing in routings if isinstance(routing, TokenChoice) and routing.capacity is not None]
    return 1.0 - torch.stack(kept).sum() / load_LE.sum() if kept else torch.zeros((), device=load_LE.device)
