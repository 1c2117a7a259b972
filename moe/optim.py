"""The optimizers of a model's parameters, in groups that share a learning rate and a weight decay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe.adamw import AdamW
from moe.config import Config
from moe.experts import Experts
from moe.layers import Attention, Dense
from moe.model import MoE
from moe.muon import Muon
from moe.space.experts import GATED

ADAM_EPS = 1e-8  # Adam, arXiv:1412.6980


def build_optimizers(model: MoE, config: Config) -> list[torch.optim.Optimizer]:
    """Fused AdamW (about 3 times faster than foreach on CPU), after Muon for the matrices where it is configured.

    Weights of one dimension, embeddings and the output head do not decay. Routers learn at `router_lr_scale` times the
    rate of the rest. Muon computes in bf16 where the model does, in the type of the weights otherwise: in fp16
    its iteration is unstable.
    """
    matrices: list[Tensor] = []
    groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        router, matrix = _is_router(name), _is_matrix(name, parameter)
        if matrix and config.optimizer == "muon":
            matrices.append(parameter)
        else:
            decay = config.weight_decay if matrix or router else 0.0
            groups[decay, config.router_lr_scale if router else 1.0].append(parameter)

    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        muon = Muon(
            _by_rows(model, matrices),
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            steps=config.muon_steps,
            dtype=torch.bfloat16 if model.compute is torch.bfloat16 else None,
        )
        optimizers.append(muon)

    adamw = AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (decay, scale), parameters in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=ADAM_EPS,
        fused=True,
    )
    return [*optimizers, adamw]


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


def _is_router(name: str) -> bool:
    return name.endswith(("router", "router_noise"))


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and name not in ("embedding", "head") and not _is_router(name)


def _by_rows(model: nn.Module, matrices: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Groups of parameters that hold matrices of the same heights (see Muon)."""
    rows: dict[Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            queries, keys = module.n_heads * module.width, module.kv_heads * module.width
            rows[module.w_qkv] = (queries, keys, keys)
        elif isinstance(module, Dense | Experts) and module.kind in GATED:
            gate = module.w_in.shape[-2] // 2
            rows[module.w_in] = (gate, gate)

    groups: dict[tuple[int, ...] | None, list[Tensor]] = defaultdict(list)
    for parameter in matrices:
        groups[rows.get(parameter)].append(parameter)

    return [{"params": parameters, "rows": heights, "lr_scale": 1.0} for heights, parameters in groups.items()]
