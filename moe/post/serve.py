"""From a trained model to the one that is served: pruned, merged and quantized as its config says.

B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from moe.config import Config, apply
from moe.data import Data, batch, prepare, windows
from moe.model import MoE
from moe.post.prune import shrink, watch_routing
from moe.post.quantize import matrices, quantize_model
from moe.post.stages import as_trained

CALIBRATION_TOKENS = 16_384
"""Of the training split, to see which experts are used: about 4,000 choices an expert with 8 experts, top-2."""

BATCH_TOKENS = 8192


def serve(model: MoE, config: Config, data: Data, dtype: torch.dtype) -> MoE:
    """The served model of `config`, made of the trained one, which is used up. Its products are computed in `dtype`.

    Matrices that are not quantized are stored in `dtype`, as one would serve them; the rest stays in fp32.
    """
    if config.prune_experts or config.merge_experts:
        model = shrink(model, config, watch_routing(model, _calibration(config, data, model.embedding.device)))

    model.requires_grad_(False).eval()
    model.compute = dtype
    if config.quantize == "none":
        for matrix in matrices(model):
            setattr(matrix.module, matrix.name, nn.Parameter(matrix.weight.to(dtype), requires_grad=False))
    elif config.quantize == "int8":
        quantize_model(model, 8, None, dtype)
    else:
        quantize_model(model, 4, config.quantize_group, dtype)

    return model


@torch.no_grad()
def served_loss(config: Config, data_dir: Path, seed: int) -> float:
    """Cross entropy on one training sequence of the served but untrained model: how a probe sees a knob act.

    The model is cut off above its first mixture of experts. What is left keeps its real size, as the groups of weights
    that share a scale do not show in smaller matrices.
    """
    data = prepare(config, data_dir)
    shallow = apply(config, {"n_layers": config.moe_layers.index(True) + 1})
    trained = MoE(as_trained(shallow))
    trained.init_weights(seed)
    model = serve(trained, shallow, data, torch.float32)
    return float(model(*batch(data.tokens["train"], shallow, seed=seed, first=0, size=1)).cross_entropy)


def _calibration(config: Config, data: Data, device: torch.device) -> Iterator[Tensor]:
    rows = max(1, BATCH_TOKENS // config.seq_len)
    for tokens_BT, _ in windows(data.tokens["train"], CALIBRATION_TOKENS, config.seq_len, rows):
        yield tokens_BT.to(device)
