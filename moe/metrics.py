"""What is measured of a model: name, unit, which way is better. Torch-free; docs/metrics.md has the definitions.

METRICS holds the numbers that stand in a score.json under their own names. One with a direction may be the metric of
an experiment; one without describes the model and is neither good nor bad by itself. Text sets of the user's own, in
data/benchmarks, add one metric each (docs/corpora.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Better = Literal["lower", "higher"]
Step = Literal["evaluate", "ablate", "post"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a score; `by` names the module of moe/ that writes it."""

    name: str
    unit: str
    meaning: str
    better: Better | None = None
    by: Step = "evaluate"


_ALL = (
    Metric(name="val_bpb", unit="bits a byte", better="lower", meaning="cross entropy over the bytes of the text"),
    Metric(name="val_loss", unit="nats a token", better="lower", meaning="the same over tokens of this tokenizer"),
    Metric(
        name="bpb_late",
        unit="bits a byte",
        better="lower",
        meaning="val_bpb over the second half of the window: with seq_len / 2 tokens of context or more",
    ),
    Metric(name="accuracy", unit="fraction", better="higher", meaning="how often the likeliest token is the next one"),
    Metric(name="confidence", unit="probability", meaning="mean probability of the likeliest token"),
    Metric(
        name="calibration_error",
        unit="probability",
        better="lower",
        meaning="mean distance of confidence and accuracy over 15 bins of confidence",
    ),
    Metric(
        name="load_imbalance",
        unit="ratio",
        better="lower",
        meaning="the busiest expert's load over the mean, averaged over layers; 1 is even",
    ),
    Metric(name="dead_experts", unit="experts", better="lower", meaning="experts that got no token, over all layers"),
    Metric(name="load_entropy", unit="nats", better="higher", meaning="entropy of the mean load; ln E is even"),
    Metric(name="router_entropy", unit="nats", meaning="entropy of a token's affinities, averaged over tokens"),
    Metric(
        name="router_margin",
        unit="affinity",
        meaning="the last chosen expert's affinity less that of the first one not chosen",
    ),
    Metric(
        name="expert_topic_mi",
        unit="bits",
        meaning="mutual information of an assignment's expert and its document's topic, adjusted for chance",
    ),
    Metric(name="expert_topic_mi_share", unit="fraction", meaning="expert_topic_mi over the entropy of the topics"),
    Metric(
        name="expert_delta_max",
        unit="bits a byte",
        by="ablate",
        meaning="what removing the most important expert adds to val_bpb",
    ),
    Metric(
        name="expert_delta_median",
        unit="bits a byte",
        by="ablate",
        meaning="what removing an expert adds to val_bpb, in the middle: near 0 where experts are redundant",
    ),
    Metric(
        name="layer_delta_min",
        unit="bits a byte",
        by="ablate",
        meaning="what skipping the most dispensable layer adds to val_bpb",
    ),
    Metric(
        name="layer_delta_max",
        unit="bits a byte",
        by="ablate",
        meaning="what skipping the most important layer adds to val_bpb",
    ),
    Metric(
        name="weight_bytes",
        unit="bytes",
        better="lower",
        by="post",
        meaning="of the tensors that hold the served model: packed weights, scales, and what stays in fp32",
    ),
    Metric(
        name="prefill_tokens_per_second",
        unit="tokens/s",
        better="higher",
        by="post",
        meaning="reading one prompt of seq_len tokens into the KV cache, median of several",
    ),
    Metric(
        name="decode_tokens_per_second",
        unit="tokens/s",
        better="higher",
        by="post",
        meaning="writing one text token by token with the KV cache, median of several",
    ),
    Metric(
        name="decode_batch_tokens_per_second",
        unit="tokens/s",
        better="higher",
        by="post",
        meaning="the same for 8 texts at once, their tokens together",
    ),
)

BENCHMARK = "benchmark_"
"""Begins the names of what is measured on the user's own text sets, which no table can list."""

METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _ALL})
"""By name, in the order of docs/metrics.md."""


def on_text_set(name: str) -> Metric:
    """What is measured on the user's text set of that name."""
    return Metric(
        name=f"{BENCHMARK}{name}",
        unit="bits a byte",
        better="lower",
        meaning=f"val_bpb of the whole text set {name}, on which nothing trains",
    )


def text_set_of(metric: str) -> str | None:
    """The name of the text set that a metric is measured on; None for those of METRICS."""
    return metric.removeprefix(BENCHMARK) if metric.startswith(BENCHMARK) else None
