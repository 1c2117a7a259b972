"""Small stand-ins for two configs that are to be compared: the same question at a size that takes milliseconds.

Every size on which both agree is cut to a cap. A size on which they differ stays if it is small, and otherwise becomes
a small pair in the same order. Nothing else changes: not the number of experts, not the routing, not the optimizer.
What happens over a whole run (growing batches and sequences) has no place in a few updates and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from moe.config import BYTES, Config, apply
from moe.knobs import Value

CAPS: Mapping[str, int] = {"seq_len": 32, "d_expert": 32, "vocab_size": 2 * (BYTES + 1)}
HEAD_WIDTH = 8
SEQUENCES = 2  # routing groups a batch at least, so that splitting into groups can be seen


def stand_in(a: Config, b: Config) -> tuple[Config, Config]:
    """Shrink both alike."""
    sizes = [_pair(getattr(a, name), getattr(b, name), cap) for name, cap in CAPS.items()]
    sizes += [_widths(a, b), _layers(a, b)]
    names = [*CAPS, "d_model", "n_layers"]
    groups = _pair(a.routing_group, b.routing_group, 2)
    whole = math.lcm(*groups) * SEQUENCES
    batches = _ordered(a.batch_size, b.batch_size, whole)
    return (
        _resize(a, dict(zip(names, (size[0] for size in sizes), strict=True)), groups[0], batches[0]),
        _resize(b, dict(zip(names, (size[1] for size in sizes), strict=True)), groups[1], batches[1]),
    )


def _resize(config: Config, sizes: dict[str, int], group: int, batch: int) -> Config:
    changes: dict[str, Value] = {"routing_group": group, "batch_size": batch, "micro_batch_size": batch}
    changes |= {"batch_doublings": 0, "length_doublings": 0, "activation_checkpointing": False}
    changes["tokenizer"] = "byte" if sizes["vocab_size"] == BYTES else "bpe"  # the probe maps real ids into it
    return apply(config, sizes | changes)


def _pair(a: int, b: int, cap: int) -> tuple[int, int]:
    if a == b:
        return min(a, cap), min(b, cap)

    return (a, b) if max(a, b) <= cap else _ordered(a, b, cap // 2)


def _ordered(a: int, b: int, small: int) -> tuple[int, int]:
    return (small if a <= b else 2 * small), (small if b <= a else 2 * small)


def _layers(a: Config, b: Config) -> tuple[int, int]:
    # Enough to have a mixture above the dense layers.
    pattern = max(a.first_k_dense + a.moe_every, b.first_k_dense + b.moe_every)
    if a.n_layers == b.n_layers or max(a.n_layers, b.n_layers) <= pattern + 1:
        return min(a.n_layers, pattern + 1), min(b.n_layers, pattern + 1)

    return _ordered(a.n_layers, b.n_layers, pattern)


def _widths(a: Config, b: Config) -> tuple[int, int]:
    return _ordered(a.d_model, b.d_model, HEAD_WIDTH * math.lcm(2, a.n_heads, b.n_heads))  # 16 at least, as Config asks
