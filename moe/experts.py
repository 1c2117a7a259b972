"""A layer's experts: stacked feed-forward networks, each applied to the tokens routed to it.

Plain matrix products do the work, so that cuBLAS and the CPU's GEMM are used at their best sizes. No fused kernels:
Triton and F.grouped_mm are documented for compute capability 8.0 and up, a T4 has 7.5.

N tokens, K experts a token, E experts, C tokens that an expert takes, D d_model, F d_expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.compiled import arrange_op, mix_op
from moe.config import Config
from moe.dispatch import mix
from moe.slots import Path, Slots, arrange, arrange_chosen
from moe.space.experts import GATED


class Experts(nn.Module):
    """E feed-forward networks as stacks [E, out, in], cast to the type of what they are given."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n_experts, d, f = config.num_experts, config.d_model, config.d_expert
        self.kind = config.expert_kind
        self.path: Path = "auto"
        self.w_in = nn.Parameter(torch.empty(n_experts, 2 * f if self.kind in GATED else f, d))  # gate, then up
        self.w_out = nn.Parameter(torch.empty(n_experts, d, f))

    def forward(
        self, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor, load_E: Tensor, slots: int | None = None
    ) -> Tensor:
        """Sum of each token's experts, weighted by its gates.

        Args:
            gates_NK: in fp32 or wider; rounded to the type of x_ND.
            experts_NK: E, with gate 0, where a capacity dropped the assignment.
            load_E: how many assignments each expert keeps.
            slots: a bound on load_E that is known without looking at it, where there is a capacity.
        """
        d, f = self.w_out.shape[1:]
        if torch.compiler.is_compiling():
            layout = Slots(*arrange_op(experts_NK, load_E, self.path, slots, d, f, x_ND))
        else:
            layout = arrange(experts_NK, load_E, path=self.path, slots=slots, d_model=d, d_expert=f, dtype=x_ND.dtype)

        return self._mix(x_ND, gates_NK.flatten(), layout)

    def forward_chosen(self, x_ND: Tensor, tokens_EC: Tensor, gates_EC: Tensor) -> Tensor:
        """Expert choice: sum over the experts that took a token, weighted by their gates."""
        layout = arrange_chosen(tokens_EC, len(x_ND))
        return self._mix(x_ND, gates_EC.flatten().gather(0, layout.slot_A), layout)

    def _mix(self, x_ND: Tensor, gate_A: Tensor, layout: Slots) -> Tensor:
        if torch.compiler.is_compiling():
            keep = torch.is_grad_enabled()
            y_ND: Tensor = mix_op(x_ND, gate_A, self.w_in, self.w_out, *layout, self.kind, keep)[0]
            return y_ND

        return mix(x_ND, gate_A, self.w_in, self.w_out, layout, self.kind)
