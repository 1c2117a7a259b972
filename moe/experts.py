"""A layer's experts: stacked feed-forward networks, each applied to the tokens routed to it.

Plain matrix products do the work, so that cuBLAS and the CPU's GEMM are used at their best sizes. No fused kernels:
Triton and F.grouped_mm are documented for compute capability 8.0 and up, a T4 has 7.5.

N tokens, E experts, D d_model, F d_expert; the letters of routings as in moe/routing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.compiled import arrange_op, mix_op
from moe.config import Config
from moe.dispatch import mix
from moe.routing import ExpertChoice, Routing, TokenChoice
from moe.slots import Layout, Slots, arrange, arrange_chosen
from moe.space.experts import GATED


class Experts(nn.Module):
    """E feed-forward networks as stacks [E, out, in], cast to the type of what they are given."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n_experts, d, f = config.num_experts, config.d_model, config.d_expert
        self.kind = config.expert_kind
        self.path: Layout = "auto"
        self.w_in = nn.Parameter(torch.empty(n_experts, 2 * f if self.kind in GATED else f, d))  # gate, then up
        self.w_out = nn.Parameter(torch.empty(n_experts, d, f))

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Sum of each token's experts, weighted by their gates, which are rounded to the type of x_ND."""
        if isinstance(routing, ExpertChoice):
            layout = arrange_chosen(routing.tokens_EC, len(x_ND))
            gate_A = routing.gates_EC.flatten().gather(0, layout.slot_A)
        else:
            layout = self._arrange(routing, x_ND)
            gate_A = routing.gates_NK.flatten()

        if torch.compiler.is_compiling():
            keep = torch.is_grad_enabled()
            y_ND: Tensor = mix_op(x_ND, gate_A, self.w_in, self.w_out, *layout, self.kind, keep)[0]
            return y_ND

        return mix(x_ND, gate_A, self.w_in, self.w_out, layout, self.kind)

    def _arrange(self, routing: TokenChoice, x_ND: Tensor) -> Slots:
        _, experts_NK, load_GE, _, capacity, row_NK = routing
        d, f = self.w_out.shape[1:]
        if torch.compiler.is_compiling():
            return Slots(*arrange_op(experts_NK, load_GE, capacity, row_NK, self.path, d, f, x_ND))

        return arrange(experts_NK, load_GE, capacity, row_NK, path=self.path, d_model=d, d_expert=f, dtype=x_ND.dtype)
