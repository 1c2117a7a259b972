"""Generation with a KV cache, and how fast it is: reading a prompt (prefill) and adding to it (decode).

    cache = Cache(model, batch=1, length=128)
    x_BTD = extend(model, prompt_BT, cache)                     # any number of positions at once
    token_B1 = next_tokens(model, x_BTD)
    x_BTD = extend(model, token_B1, cache)

The logits are those of one pass over the whole text, to rounding.

B sequences, T new positions, D d_model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import ConfigError
from moe.layers import KeyValues, rotary
from moe.loss import cap
from moe.model import MoE
from moe.tokenizer import Tokens

DECODE_BATCH = 8  # sequences that are continued together, beside one alone
DECODE_TOKENS = 32  # added to each prompt of half a sequence, or as many as fit
REPEATS = 7  # of each measurement, after one that is not counted


class Cache:
    """Room for the keys and values of `length` positions in every layer.

    Raises:
        ConfigError: the model looks at later positions, so it has none to go on from.
    """

    def __init__(self, model: MoE, *, batch: int, length: int) -> None:
        config = model.config
        if not config.causal:
            raise ConfigError(f"routing={config.routing} looks at later tokens; such a model cannot generate")

        dtype, device = model.compute or model.embedding.dtype, model.embedding.device
        self.layers = [KeyValues(config, batch, length, dtype, device) for _ in model.blocks]
        self.length = length

    @property
    def count(self) -> int:
        """Positions that are taken in."""
        return self.layers[0].count


@torch.no_grad()
def extend(model: MoE, tokens_BT: Tensor, cache: Cache) -> Tensor:
    """What the head sees of the tokens that come next, [B, T, D].

    Raises:
        ValueError: they are more than the cache has room for.
    """
    start, end = cache.count, cache.count + tokens_BT.shape[1]
    if end > cache.length:
        raise ValueError(f"{end} positions do not fit in a cache of {cache.length}")

    x_BTD = F.embedding(tokens_BT, model.embedding)
    dtype = model.compute or x_BTD.dtype
    rotation = rotary(model.config, torch.arange(start, end, device=x_BTD.device), dtype)
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        x_BTD, _ = block(x_BTD, tokens_BT, rotation, dtype, None, layer)

    normed_BTD: Tensor = model.norm(x_BTD).to(dtype)
    return normed_BTD


def logits(model: MoE, x_BTD: Tensor) -> Tensor:
    """Logits [B, T, V] of what the head sees."""
    return cap(F.linear(x_BTD, model.head_weight.to(x_BTD.dtype)), model.config.logit_softcap)


def next_tokens(model: MoE, x_BTD: Tensor) -> Tensor:
    """The most probable token after each last position, [B, 1]."""
    return logits(model, x_BTD[:, -1:]).argmax(dim=-1)


def measure_speed(model: MoE, text: Tokens) -> dict[str, float]:
    """Tokens a second: the median over REPEATS, and as `..._spread` the range over the median.

    prefill: one prompt of seq_len tokens. decode: one sequence, and DECODE_BATCH together, from prompts of half that.
    """
    seq_len = model.config.seq_len
    half = seq_len // 2
    n_new = min(DECODE_TOKENS, seq_len - half)
    prompts = np.resize(text[: DECODE_BATCH * seq_len], (DECODE_BATCH, seq_len))  # a short text is repeated
    prompts_BT = torch.from_numpy(prompts.astype(np.int64)).to(model.embedding.device)
    measured = {
        "prefill": _rates(lambda: _prefill(model, prompts_BT[:1]), seq_len),
        "decode": _rates(lambda: _decode(model, prompts_BT[:1, :half], n_new), n_new),
        "decode_batch": _rates(lambda: _decode(model, prompts_BT[:, :half], n_new), n_new * DECODE_BATCH),
    }
    speeds = {}
    for name, rates in measured.items():
        typical = median(rates)
        speeds[f"{name}_tokens_per_second"] = typical
        speeds[f"{name}_tokens_per_second_spread"] = (max(rates) - min(rates)) / typical

    return speeds


def _rates(timed: Callable[[], float], tokens: int) -> list[float]:
    timed()
    return [tokens / timed() for _ in range(REPEATS)]


def _prefill(model: MoE, prompt_BT: Tensor) -> float:
    cache = Cache(model, batch=len(prompt_BT), length=prompt_BT.shape[1])
    started = _now(prompt_BT.device)
    next_tokens(model, extend(model, prompt_BT, cache))
    return _now(prompt_BT.device) - started


def _decode(model: MoE, prompt_BT: Tensor, n_new: int) -> float:
    cache = Cache(model, batch=len(prompt_BT), length=prompt_BT.shape[1] + n_new)
    tokens_B1 = next_tokens(model, extend(model, prompt_BT, cache))
    started = _now(prompt_BT.device)
    for _ in range(n_new):
        tokens_B1 = next_tokens(model, extend(model, tokens_B1, cache))

    return _now(prompt_BT.device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":  # the clock stands for what the card has done, not for what it was given to do
        torch.cuda.synchronize(device)

    return time.perf_counter()
