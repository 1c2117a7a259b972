"""Generation with a KV cache says what one pass over the whole text says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from moe.config import ConfigError, apply
from moe.model import MoE
from moe.post.inference import Cache, extend, logits, measure_speed, next_tokens
from moe.presets import PRESETS

NANO = PRESETS["nano"]


def build(**changes: Any) -> MoE:
    """A nano model with random weights, in evaluation."""
    model = MoE(apply(NANO, changes))
    model.init_weights(seed=1)
    return model.eval()


def some_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_heads": 4, "gqa_group_size": 2, "qk_norm": True, "rope_base": 100.0},
        {"n_heads": 4, "gqa_group_size": 4, "first_k_dense": 1, "expert_kind": "relu2", "logit_softcap": 5.0},
        {"routing": "hash", "num_shared_experts": 1, "tie_embeddings": False},
        {"noisy_top_k": True, "capacity_factor": 1.0, "router_score": "sigmoid", "balance_bias_rate": 0.1, "top_k": 1},
    ],
    ids=str,
)
def test_the_cache_gives_the_logits_of_one_pass(changes: dict[str, Any]) -> None:
    model = build(**changes).double()
    tokens = some_tokens(3, 24)
    cache = Cache(model, batch=3, length=24)
    parts = [logits(model, extend(model, part, cache)) for part in torch.split(tokens, [7, 1, 1, 9, 1, 5], dim=1)]
    with torch.no_grad():
        whole = model.logits(tokens)

    assert cache.count == 24
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0.0, atol=1e-9)


def test_greedy_text_is_what_one_pass_for_every_token_would_write() -> None:
    model = build().double()
    prompt = some_tokens(2, 5)
    cache = Cache(model, batch=2, length=20)
    written = [next_tokens(model, extend(model, prompt, cache))]
    while cache.count < 19:
        written.append(next_tokens(model, extend(model, written[-1], cache)))

    text = prompt
    with torch.no_grad():
        for _ in written:
            text = torch.cat((text, model.logits(text)[:, -1:].argmax(dim=-1)), dim=1)

    assert torch.equal(torch.cat((prompt, *written), dim=1), text)


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(ConfigError, match="expert_choice looks at later tokens"):
        Cache(build(routing="expert_choice"), batch=1, length=8)


def test_a_full_cache_says_so() -> None:
    model = build()
    cache = Cache(model, batch=1, length=8)
    extend(model, some_tokens(1, 8), cache)
    with pytest.raises(ValueError, match="9 positions do not fit in a cache of 8"):
        extend(model, some_tokens(1, 1), cache)


def test_speeds_are_measured_with_their_spread() -> None:
    speeds = measure_speed(build(seq_len=16, budget_tokens=1024), np.arange(100, dtype=np.uint16))
    names = {f"{kind}_tokens_per_second" for kind in ("prefill", "decode", "decode_batch")}
    assert speeds.keys() == names | {f"{name}_spread" for name in names}
    assert all(math.isfinite(speeds[name]) and speeds[name] > 0 for name in names)
