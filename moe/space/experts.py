"""The feed-forward layers: which are mixtures, of how many experts of what kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from moe.knobs import Acts, Search

ExpertKind = Literal["swiglu", "geglu", "relu2", "mlp"]

GATED: frozenset[ExpertKind] = frozenset({"swiglu", "geglu"})
"""Kinds with three matrices: gate, up and down."""


class ExpertKnobs(BaseModel):
    """Routed experts, shared experts, and dense layers between."""

    num_experts: Annotated[
        int,
        Field(ge=1, le=256, description="routed experts per layer"),
        Acts(on="loss", source="Shazeer et al. 2017, arXiv:1701.06538", search=Search(choices=(1, 2, 4, 8, 16))),
    ]
    top_k: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="experts that each token is sent to (expert choice: on average); at most num_experts",
        ),
        Acts(on="loss", source="Shazeer et al. 2017, arXiv:1701.06538", search=Search(choices=(1, 2, 3, 4))),
    ]
    d_expert: Annotated[
        int,
        Field(
            ge=8,
            le=16384,
            description="hidden width of one expert; fine-grained experts: a smaller one with "
            "num_experts and top_k raised by the same factor",
        ),
        Acts(
            on="loss",
            source="DeepSeekMoE (fine-grained experts), arXiv:2401.06066",
            search=Search(low=32, high=2048, log=True),
        ),
    ]
    expert_kind: Annotated[
        ExpertKind,
        Field(
            description="swiglu, geglu: three matrices with a SiLU or GELU gate; mlp, relu2: two matrices with SiLU or "
            "squared ReLU between"
        ),
        Acts(
            on="loss",
            source="GLU variants, arXiv:2002.05202; Primer (squared ReLU), arXiv:2109.08668",
            search=Search(choices=("swiglu", "geglu", "relu2", "mlp")),
        ),
    ]
    num_shared_experts: Annotated[
        int,
        Field(ge=0, le=64, description="experts that every token goes to beside its top_k, each of width d_expert"),
        Acts(on="loss", source="DeepSeekMoE, arXiv:2401.06066", search=Search(choices=(0, 1, 2))),
    ] = 0
    first_k_dense: Annotated[
        int,
        Field(ge=0, le=64, description="layers at the bottom with one dense feed-forward network instead of experts"),
        Acts(on="loss", source="DeepSeekMoE (the first layer), arXiv:2401.06066", search=Search(choices=(0, 1))),
    ] = 0
    moe_every: Annotated[
        int,
        Field(ge=1, le=64, description="of the layers above those, every n-th is a mixture of experts, the rest dense"),
        Acts(on="loss", source="GShard, arXiv:2006.16668; GLaM (2), arXiv:2112.06905", search=Search(choices=(1, 2))),
    ] = 1
    dense_scale: Annotated[
        float,
        Field(
            ge=0.05,
            le=32.0,
            description="hidden width of a dense layer, as a multiple of that of the experts one token meets, "
            "(top_k + num_shared_experts) * d_expert",
        ),
        Acts(on="loss", source="DeepSeekMoE, arXiv:2401.06066", search=Search(low=0.5, high=4.0, log=True)),
    ] = 1.0
