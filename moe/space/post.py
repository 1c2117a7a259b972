"""What is done to the weights after training: quantization, pruning and merging of experts.

These fields train nothing: a run of kind post applies them to another run's checkpoint, and measures what that saves
and what it costs (moe/post/).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from moe.knobs import Acts, Search

Quantization = Literal["none", "int8", "int4"]


class PostKnobs(BaseModel):
    """Applied in this order: experts are pruned, then merged, then the weights are quantized."""

    prune_experts: Annotated[
        int,
        Field(
            ge=0,
            le=255,
            description="experts taken out of each layer after training, together with their rows of the router: those "
            "with the least gate mass on text of the training split",
        ),
        Acts(
            on="evaluation",
            source="expert pruning: NAEE, arXiv:2402.14800; SEER-MoE, arXiv:2404.05089",
            role="post",
            search=Search(low=0, high=8),
        ),
    ] = 0
    merge_experts: Annotated[
        int,
        Field(
            ge=0,
            le=255,
            description="merges in each layer after training, each of the two experts whose router logits are most "
            "alike: weights averaged by load, hidden units matched first",
        ),
        Acts(
            on="evaluation",
            source="M-SMoE, arXiv:2310.01334",
            role="post",
            search=Search(low=0, high=8),
        ),
    ] = 0
    quantize: Annotated[
        Quantization,
        Field(
            description="weights of attention, experts and dense layers after training, rounded to nearest: int8 with "
            "a scale per output channel, int4 with one per quantize_group of its weights; embeddings, router and norms "
            "stay"
        ),
        Acts(
            on="evaluation",
            source="LLM.int8() (absmax scales), arXiv:2208.07339; GPTQ (round to nearest in groups, its baseline), "
            "arXiv:2210.17323",
            role="post",
            search=Search(choices=("none", "int8", "int4")),
        ),
    ] = "none"
    quantize_group: Annotated[
        int,
        Field(
            ge=8,
            le=4096,
            multiple_of=2,
            description="weights of an output channel that share a scale with quantize=int4, an even number; a smaller "
            "group is more exact and takes more bytes",
        ),
        Acts(
            on="evaluation",
            source="GPTQ (grouping, 128), arXiv:2210.17323",
            role="post",
            search=Search(low=16, high=256, log=True),
            needs=("quantize", "int4"),
        ),
    ] = 64
