"""A layer's experts: stacked feed-forward networks, each applied to the tokens routed to it.

Tokens are sorted by expert, so that each expert is two plain matrix products over a contiguous slice; cuBLAS and the
CPU's GEMM do the rest. The stacks are unbound once per forward: indexing them in a loop would zero-fill a whole stack's
gradient for every expert (about 3 times slower at 64 experts). One host sync a layer, for the slice sizes.

No fused kernels: Triton and F.grouped_mm are documented for compute capability 8.0 and up, a T4 has 7.5, and without a
kernel for the card F.grouped_mm is the same loop. tests/moe/test_experts.py holds this against a slow reference.

N tokens, K experts a token, A = N * K assignments, E experts, D d_model, F d_expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import Config


class Experts(nn.Module):
    """E feed-forward networks as stacks [E, out, in]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n_experts, d, f = config.num_experts, config.d_model, config.d_expert
        self.gated = config.expert_kind == "swiglu"
        self.w_in = nn.Parameter(torch.empty(n_experts, 2 * f if self.gated else f, d))  # swiglu: gate, then up
        self.w_out = nn.Parameter(torch.empty(n_experts, d, f))

    def forward(self, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor, load_E: Tensor) -> Tensor:
        """Sum of each token's experts, weighted by its gates."""
        n_tokens, top_k = gates_NK.shape
        order_A = experts_NK.flatten().argsort(stable=True)
        place_A = torch.empty_like(order_A)
        place_A[order_A] = torch.arange(len(order_A), device=order_A.device)

        sorted_AD = x_ND.index_select(0, order_A // top_k)
        slices = zip(torch.split(sorted_AD, load_E.tolist()), self.w_in.unbind(), self.w_out.unbind(), strict=True)
        y_AD = torch.cat([self._feed_forward(x_nD, w_in, w_out) for x_nD, w_in, w_out in slices if len(x_nD)])
        y_NKD = y_AD.index_select(0, place_A).view(n_tokens, top_k, -1)
        return (y_NKD * gates_NK[:, :, None]).sum(dim=1)

    def _feed_forward(self, x_nD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        hidden = F.linear(x_nD, w_in)
        if self.gated:
            gate_nF, up_nF = hidden.chunk(2, dim=-1)
            return F.linear(F.silu(gate_nF) * up_nF, w_out)

        return F.linear(F.silu(hidden), w_out)
