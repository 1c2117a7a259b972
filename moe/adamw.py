"""torch's optimizers without what they load for torch.compile, which this project does not use around them.

The first call of a method that torch guards against being compiled imports torch._dynamo and sympy: 1.8 s and 72 MB of
every process that trains, and in the midst of writing a checkpoint when SIGTERM gives it 2.5 s. The methods inside the
guards are the same.
"""

from __future__ import annotations

from inspect import unwrap

import torch


class Optimizer(torch.optim.Optimizer):
    """torch's, with its own methods unguarded. A subclass brings a step() without a guard."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Optimizer, torch.optim.AdamW):
    """Decoupled weight decay (arXiv:1711.05101), as torch computes it."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
