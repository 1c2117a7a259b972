"""Fewer experts after training: the least used ones are taken out, or the two most alike become one, layer by layer.

What is used, and what is alike, is measured on text of the training split: an expert by its gate mass (the sum of the
gates with which it was chosen), two experts by the cosine between their router logits. Merging averages by load; the
hidden units of one expert are first matched to the other's, since two networks that compute the same may number them
differently (M-SMoE, arXiv:2310.01334; Git Re-Basin, arXiv:2209.04836). The router's rows are averaged alike, which,
logits being linear, averages the logits.

What this does not do: train what is left, which is what recovers most of the loss in both papers.

B sequences, T positions, N = B * T tokens, K experts a token, E experts, F hidden units, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import Config
from moe.layers import Mixture
from moe.model import MoE, looking_at
from moe.post.stages import as_served
from moe.routing import TokenChoice
from moe.space.experts import GATED

STACKS = ("router", "router_noise", "balance_bias", "experts.w_in", "experts.w_out")
"""What a layer holds for each expert, E coming first; not every config has all of them."""


class Usage(NamedTuple):
    """How one layer used its experts on some text, in float64.

    `logits_EE` holds the products of the experts' router logits, summed over tokens.
    """

    mass_E: Tensor
    load_E: Tensor
    logits_EE: Tensor

    def keep(self, kept: Tensor) -> Usage:
        return Usage(self.mass_E[kept], self.load_E[kept], self.logits_EE[kept][:, kept])


@torch.no_grad()
def watch_routing(model: MoE, batches: Iterable[Tensor]) -> list[Usage]:
    """The usage of each layer with experts over batches of tokens [B, T]."""
    model.eval()
    usages = [_no_usage(model.config.num_experts, model.embedding.device) for _ in model.mixtures]
    for tokens_BT in batches:
        with looking_at(model, _products_of_logits) as products:
            _, routings = model.hidden(tokens_BT)

        for usage, routing, products_EE in zip(usages, routings, products, strict=True):
            if not isinstance(routing, TokenChoice):
                raise TypeError("experts are pruned and merged by the tokens that choose them")

            usage.mass_E.index_add_(0, routing.experts_NK.flatten(), routing.gates_NK.flatten().double())
            usage.load_E.add_(routing.load_E)
            usage.logits_EE.add_(products_EE)

    return usages


def shrink(model: MoE, config: Config, usages: list[Usage]) -> MoE:
    """A model of as_served(config): prune_experts fewer, then merge_experts times two made one, in each layer."""
    state = model.state_dict()
    layers = [layer for layer, is_mixture in enumerate(config.moe_layers) if is_mixture]
    for layer, usage in zip(layers, usages, strict=True):
        names = {name: f"blocks.{layer}.feed_forward.{name}" for name in STACKS}
        stacks = {name: state[key] for name, key in names.items() if key in state}
        kept = usage.mass_E.topk(config.num_experts - config.prune_experts).indices.sort().values
        stacks, usage = {name: stack[kept] for name, stack in stacks.items()}, usage.keep(kept)
        for _ in range(config.merge_experts):
            stacks, usage = merge(stacks, usage, config)

        state |= {names[name]: stack for name, stack in stacks.items()}

    smaller = MoE(as_served(config), model.compute)
    smaller.load_state_dict(state)
    return smaller.to(model.embedding.device)


def merge(stacks: dict[str, Tensor], usage: Usage, config: Config) -> tuple[dict[str, Tensor], Usage]:
    """The two experts whose router logits are most alike become one, in the place of the first."""
    first, second = _most_alike(usage.logits_EE)
    units = _match(stacks, first, second, config)
    matched = {name: stack.clone() for name, stack in stacks.items()}
    matched["experts.w_in"][second] = _reorder(stacks["experts.w_in"][second], units, config)
    matched["experts.w_out"][second] = stacks["experts.w_out"][second][:, units]

    # Average rows `first` and `second` into `first`, and leave `second` out: a matrix [E - 1, E] that does both.
    load = usage.load_E[[first, second]]
    part = load / load.sum() if float(load.sum()) > 0.0 else torch.full_like(load, 0.5)
    average = torch.eye(len(usage.load_E), dtype=torch.float64, device=load.device)
    total = average.clone()
    average[first, first], average[first, second] = part
    total[first, second] = 1.0
    rest = [expert for expert in range(len(average)) if expert != second]
    average, total = average[rest], total[rest]
    return (
        {name: torch.tensordot(average.to(stack.dtype), stack, dims=1) for name, stack in matched.items()},
        Usage(total @ usage.mass_E, total @ usage.load_E, average @ usage.logits_EE @ average.mT),
    )


def _products_of_logits(mixture: Mixture, x_ND: Tensor) -> Tensor:
    logits_NE = F.linear(x_ND, mixture.router).double()
    return logits_NE.mT @ logits_NE


def _most_alike(logits_EE: Tensor) -> tuple[int, int]:
    size = logits_EE.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    cosine_EE = (logits_EE / torch.outer(size, size)).triu(1) - 2.0 * torch.ones_like(logits_EE).tril()
    best = int(cosine_EE.argmax())
    return best // len(cosine_EE), best % len(cosine_EE)


def _match(stacks: dict[str, Tensor], first: int, second: int, config: Config) -> Tensor:
    """The order of the second expert's hidden units in which they are most like the first's."""
    from scipy.optimize import linear_sum_assignment  # takes half a second, for which every probe would wait

    ours, theirs = (_units(stacks, expert, config) for expert in (first, second))
    _, order = linear_sum_assignment((ours @ theirs.mT).cpu().numpy(), maximize=True)
    return torch.as_tensor(order, device=ours.device)


def _units(stacks: dict[str, Tensor], expert: int, config: Config) -> Tensor:
    w_in, w_out = stacks["experts.w_in"][expert], stacks["experts.w_out"][expert]
    return torch.cat((*_halves(w_in, config), w_out.mT), dim=1).double()


def _reorder(w_in: Tensor, units: Tensor, config: Config) -> Tensor:
    return torch.cat([half[units] for half in _halves(w_in, config)])


def _halves(w_in: Tensor, config: Config) -> tuple[Tensor, ...]:
    return w_in.chunk(2) if config.expert_kind in GATED else (w_in,)


def _no_usage(n_experts: int, device: torch.device) -> Usage:
    zeros_E = torch.zeros(n_experts, dtype=torch.float64, device=device)
    return Usage(zeros_E, zeros_E.clone(), torch.zeros(n_experts, n_experts, dtype=torch.float64, device=device))
