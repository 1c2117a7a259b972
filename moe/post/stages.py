"""A config before and after what is done to its trained weights, and when that matters. Torch-free."""

from __future__ import annotations

from moe.config import Config, after_training, apply
from moe.metrics import METRICS

_SMALLER = ("prune_experts", "merge_experts")


def as_trained(config: Config) -> Config:
    """The config of the training run whose checkpoint a post run of `config` needs: nothing is done to the weights."""
    return apply(config, {name: Config.model_fields[name].default for name in after_training(config)})


def as_served(config: Config) -> Config:
    """The config of the model that comes out: without the experts that were pruned or merged away."""
    gone = config.prune_experts + config.merge_experts
    return apply(config, {"num_experts": config.num_experts - gone} | dict.fromkeys(_SMALLER, 0))


def needs_post(metric: str, *configs: Config) -> bool:
    """Whether these configs are to be compared by post runs: for the metric's sake, or for what they do to weights."""
    measured = METRICS.get(metric)
    return any(config != as_trained(config) for config in configs) or (measured is not None and measured.by == "post")
