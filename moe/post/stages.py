"""A config before and after what is done to its trained weights, and what is measured of the result. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from moe.config import Config, after_training, apply

METRICS: Mapping[str, Literal["lower", "higher"]] = MappingProxyType(
    {
        "weight_bytes": "lower",
        "prefill_tokens_per_second": "higher",
        "decode_tokens_per_second": "higher",
        "decode_batch_tokens_per_second": "higher",
    }
)
"""What only a post run measures, and which way is better; val_bpb is its guard."""

_SMALLER = ("prune_experts", "merge_experts")


def as_trained(config: Config) -> Config:
    """The config of the training run whose checkpoint a post run of `config` needs: nothing is done to the weights."""
    return apply(config, {name: Config.model_fields[name].default for name in after_training(config)})


def as_served(config: Config) -> Config:
    """The config of the model that comes out: without the experts that were pruned or merged away."""
    gone = config.prune_experts + config.merge_experts
    return apply(config, {"num_experts": config.num_experts - gone} | dict.fromkeys(_SMALLER, 0))


def needs_post(config: Config) -> bool:
    """Whether what the config describes is more than a training run."""
    return config != as_trained(config)
