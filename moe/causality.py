"""Does the model peek? An audit of the network itself, not of its code: change later tokens, and see what moves.

Three questions, in float64 on a small stand-in: do earlier logits move when later tokens change, in evaluation and in
training; and, in evaluation, do a sequence's logits move when another sequence of its batch changes? A model that
fails one has a val_bpb that is no likelihood of the text, however low.

B sequences, T positions, N = B * T tokens, V vocabulary, L layers with experts, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import Config
from moe.model import MoE
from moe.noise import router_noise

LEAK = 1e-9  # the largest movement of a logit, in float64, that is rounding


class Audit(NamedTuple):
    """The most that any logit moved that should not have; inf where one became something that is not a number."""

    future_in_evaluation: float
    future_in_training: float
    neighbours_in_evaluation: float

    @property
    def causal(self) -> bool:
        return max(self) <= LEAK

    @property
    def detail(self) -> str:
        return (
            f"changing later tokens moves earlier logits by at most {self.future_in_evaluation:.1e} in evaluation and "
            f"{self.future_in_training:.1e} in training; changing another sequence moves them by "
            f"{self.neighbours_in_evaluation:.1e} in evaluation"
        )


def audit(model: MoE, config: Config) -> Audit:
    """Asks all three of a float64 `model`, on random tokens and with random weights in place of its own.

    Fresh weights may hide a leak: a projection that starts at zero lets nothing through.
    """
    noise_LNE = router_noise(config, seed=0, first=0, count=2 * config.routing_group)
    model = _with_random_weights(model)
    with torch.no_grad():
        model.train()
        in_training = future_leak(lambda tokens_BT: model.logits(tokens_BT, noise_LNE), config)
        model.eval()
        in_evaluation = future_leak(model.logits, config)
        neighbours = neighbour_leak(model.logits, config)

    return Audit(in_evaluation, in_training, neighbours)


def future_leak(logits: Callable[[Tensor], Tensor], config: Config) -> float:
    """The most that any logit moves when only later tokens change; `logits` maps [B, T] to [B, T, V]."""
    tokens_BT, others_BT = _two_texts(config)
    before_BTV = logits(tokens_BT)
    moved = 0.0
    for kept in sorted({1, config.seq_len // 2, config.seq_len - 1}):
        changed_BT = torch.cat((tokens_BT[:, :kept], others_BT[:, kept:]), dim=1)
        moved = max(moved, _largest((logits(changed_BT) - before_BTV)[:, :kept]))

    return moved


def neighbour_leak(logits: Callable[[Tensor], Tensor], config: Config) -> float:
    """The most that any logit of a batch's other sequences moves when its first one changes."""
    tokens_BT, others_BT = _two_texts(config)
    changed_BT = torch.cat((others_BT[:1], tokens_BT[1:]))
    return _largest((logits(changed_BT) - logits(tokens_BT))[1:])


@torch.no_grad()
def _with_random_weights(model: MoE) -> MoE:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)

    return model


def _two_texts(config: Config) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2 * config.routing_group, config.seq_len)
    tokens_BT, others_BT = (torch.randint(config.vocab_size, shape, generator=generator) for _ in range(2))
    return tokens_BT, others_BT


def _largest(difference: Tensor) -> float:
    return float(difference.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max())
