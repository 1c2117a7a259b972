"""What each part of a trained model earns: `python -m moe.ablate DIR` takes them out one by one, and scores the rest.

config.json names a `checkpoint`, the directory of a finished training run of the same config and seed. It is only read.
score.json gets val_bpb of the whole model, a table `parts` with what removing each part adds to it, on the same text,
and a summary that may serve as a metric (moe/metrics.py).

- an expert: as if its router logit were -inf, so that its tokens go to their next best; under hash routing to the next
  in their order, under expert choice the other experts take more tokens in its place
- the shared experts of a layer, its attention, its feed-forward network: they add nothing to the residual stream
- a layer: both of these at once

Nothing is trained again, so this tells what the model relies on, not what it could do without. To remove a loss, train
without it: a treatment such as load_balance_weight=0. With L layers of E experts it takes about L * (E + 3) times as
long as one score.

B sequences, T positions, D d_model, V vocabulary, E experts, K experts a token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moe.config import Config
from moe.data import prepare
from moe.evaluate import Score, load_model, quality, result, score_tokens
from moe.layers import Mixture
from moe.model import Block, MoE
from moe.rundir import device_of, read_request, run_in, write_json

Kind = Literal["expert", "shared", "attention", "feed_forward", "layer"]


class Part(NamedTuple):
    """What can be taken out; `layer` counts from the bottom, from 0."""

    kind: Kind
    layer: int
    expert: int | None = None


class Ablation(NamedTuple):
    """A part, and what the model without it scores. `delta_bpb` is what removing it adds.

    `topic` is the one that it costs most, by `topic_delta_bpb`. `load` is the expert's part of the assignments.
    """

    part: Part
    val_bpb: float
    delta_bpb: float
    topic: str
    topic_delta_bpb: float
    load: float | None

    def row(self) -> dict[str, Any]:
        """Flat, as in score.json."""
        measured = self._asdict()
        part: Part = measured.pop("part")
        return part._asdict() | measured


class Nothing(nn.Module):
    """In place of attention or of a feed-forward network: adds nothing to the residual stream."""

    def forward(self, x_BTD: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(x_BTD)


def ablate(directory: Path) -> None:
    """Do as config.json asks.

    Raises:
        ConfigError: it names no checkpoint, or one of another run.
        FileNotFoundError: the checkpoint is gone.
    """
    request = read_request(directory)
    config = request.config
    device = device_of(request)
    model = load_model(request.checkpoint, request, device)
    data = prepare(config, request.data_dir)
    whole = score_tokens(model, data, request.split, config.eval_tokens, device)
    first = result(whole, data, request)
    ablations = []
    for part in parts_of(config):
        with removed(model, part):
            rest = score_tokens(model, data, request.split, config.eval_tokens, device)

        rest.require_finite()
        ablations.append(compare(part, whole, rest))

    rows = [ablation.row() for ablation in ablations]
    write_json(directory / "score.json", {**first, **summarize(ablations), **quality(whole), "parts": rows})


def parts_of(config: Config) -> Iterator[Part]:
    """All that can be taken out, from the bottom. A layer's only expert is its feed-forward network."""
    for layer, has_experts in enumerate(config.moe_layers):
        if has_experts and config.num_experts > 1:
            yield from (Part("expert", layer, expert) for expert in range(config.num_experts))

        if has_experts and config.num_shared_experts:
            yield Part("shared", layer)

        yield from (Part("attention", layer), Part("feed_forward", layer), Part("layer", layer))


@contextmanager
def removed(model: MoE, part: Part) -> Iterator[None]:
    """While it is open, the model lacks the part."""
    block = model.blocks[part.layer]
    assert isinstance(block, Block)
    attention, feed_forward = block.attention, block.feed_forward
    try:
        if part.kind in ("attention", "layer"):
            block.attention = Nothing()  # type: ignore[assignment]  # stands in for it

        if part.kind in ("feed_forward", "layer"):
            block.feed_forward = Nothing()  # type: ignore[assignment]  # likewise
        elif part.kind in ("expert", "shared"):
            assert isinstance(feed_forward, Mixture)
            kept = [expert for expert in range(feed_forward.config.num_experts) if expert != part.expert]
            block.feed_forward = _reduced(feed_forward, part.layer, kept, shared=part.kind != "shared")

        yield
    finally:
        block.attention, block.feed_forward = attention, feed_forward


def compare(part: Part, whole: Score, rest: Score) -> Ablation:
    """What the part was worth, on the same text."""
    before, after = whole.predictions.topics(), rest.predictions.topics()
    topic = max(after, key=lambda name: after[name]["bpb"] - before[name]["bpb"])
    load = None
    if part.expert is not None:
        load_E = whole.routers.loads[whole.routers.layers.index(part.layer)]
        load = float(load_E[part.expert] / load_E.sum())

    return Ablation(
        part=part,
        val_bpb=rest.bits_per_byte,
        delta_bpb=rest.bits_per_byte - whole.bits_per_byte,
        topic=topic,
        topic_delta_bpb=after[topic]["bpb"] - before[topic]["bpb"],
        load=load,
    )


def summarize(ablations: Sequence[Ablation]) -> dict[str, Any]:
    """The numbers of moe/metrics.py; None for experts where there is one a layer."""
    experts = [ablation for ablation in ablations if ablation.part.kind == "expert"]
    layers = [ablation.delta_bpb for ablation in ablations if ablation.part.kind == "layer"]
    top = max(experts, key=lambda ablation: ablation.delta_bpb, default=None)
    return {
        "expert_delta_max": top and top.delta_bpb,
        "expert_delta_median": median(ablation.delta_bpb for ablation in experts) if experts else None,
        "layer_delta_min": min(layers),
        "layer_delta_max": max(layers),
        "most_important_expert": top and {"layer": top.part.layer, "expert": top.part.expert},
    }


@torch.no_grad()
def _reduced(mixture: Mixture, layer: int, kept: Sequence[int], *, shared: bool) -> Mixture:
    """A copy with the `kept` experts alone, each under its own row of the router."""
    config = mixture.config
    smaller = config.model_copy(update={"num_experts": len(kept), "top_k": min(config.top_k, len(kept))})
    copy = Mixture(smaller, layer)
    state = mixture.state_dict()
    # All that a mixture holds besides its shared experts is a stack, expert by expert.
    copy.load_state_dict({name: t if name.startswith("shared.") else t[list(kept)] for name, t in state.items()})
    if config.routing == "hash":
        copy.hash_VK = _hashed(config, layer, kept)[:, : smaller.top_k]

    if not shared:
        copy.shared = None

    return copy.to(mixture.experts.w_in)  # its device and type


def _hashed(config: Config, layer: int, kept: Sequence[int]) -> Tensor:
    """Each token id's order of the kept experts, by their new numbers."""
    order_VE = Mixture(config.model_copy(update={"top_k": config.num_experts}), layer).hash_VK
    new_number_E = torch.full((config.num_experts,), -1)
    new_number_E[list(kept)] = torch.arange(len(kept))
    renumbered_VE = new_number_E[order_VE]
    return renumbered_VE[renumbered_VE >= 0].view(len(order_VE), len(kept))


def main(arguments: list[str]) -> int:
    """Returns the exit code of `python -m moe.ablate`."""
    return run_in(ablate, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
