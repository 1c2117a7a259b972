"""The network around the experts: width, depth, attention, embeddings."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from moe.knobs import Acts, Search

_TRANSFORMER = "Vaswani et al. 2017, arXiv:1706.03762"


class BackboneKnobs(BaseModel):
    """A decoder-only Transformer. Sizes in tokens are per sequence."""

    d_model: Annotated[
        int,
        Field(ge=16, le=4096, description="width of the residual stream"),
        Acts(on="loss", source=_TRANSFORMER),
    ]
    n_layers: Annotated[
        int,
        Field(ge=1, le=64, description="number of transformer blocks"),
        Acts(on="loss", source=_TRANSFORMER, search=Search(low=1, high=12)),
    ]
    n_heads: Annotated[
        int,
        Field(ge=1, le=64, description="attention heads; divides d_model into an even head width"),
        Acts(on="loss", source=_TRANSFORMER, search=Search(choices=(1, 2, 4, 8, 16))),
    ]
    gqa_group_size: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="query heads that share one head of keys and values (GQA); 1: multi-head, n_heads: multi-query "
            "attention; divides n_heads",
        ),
        Acts(on="loss", source="GQA, arXiv:2305.13245", search=Search(choices=(1, 2, 4))),
    ] = 1
    seq_len: Annotated[
        int,
        Field(ge=8, le=8192, description="tokens per training sequence"),
        Acts(on="loss", source="Shortformer, arXiv:2012.15832", search=Search(choices=(64, 128, 256, 512))),
    ]
    rope_base: Annotated[
        float,
        Field(ge=10.0, le=1e7, description="base of the rotary position frequencies"),
        Acts(on="loss", source="RoFormer, arXiv:2104.09864", search=Search(low=100.0, high=1e6, log=True)),
    ]
    qk_norm: Annotated[
        bool,
        Field(description="RMSNorm with a learned scale on each head's queries and keys, before the rotation"),
        Acts(
            on="loss",
            source="Henry et al. 2020, arXiv:2010.04245; Qwen3, arXiv:2505.09388",
            search=Search(choices=(True, False)),
        ),
    ] = False
    tie_embeddings: Annotated[
        bool,
        Field(description="one matrix for input embedding and output head, or one each"),
        Acts(on="loss", source="Press and Wolf 2017, arXiv:1608.05859", search=Search(choices=(True, False))),
    ] = True
    logit_softcap: Annotated[
        float,
        Field(ge=0.0, le=1000.0, description="c: output logits become c * tanh(logits / c); 0 leaves them alone"),
        Acts(on="loss", source="Gemma 2, arXiv:2408.00118 (30)", search=Search(choices=(0.0, 10.0, 15.0, 30.0))),
    ] = 0.0
    init_std: Annotated[
        float,
        Field(ge=1e-4, le=1.0, description="standard deviation of the initial weights"),
        Acts(on="loss", source="GPT-2's released code (0.02)", search=Search(low=0.005, high=0.1, log=True)),
    ]
    zero_init_out: Annotated[
        bool,
        Field(
            description="start the matrices that write to the residual stream at zero, instead of at "
            "init_std / sqrt(2 n_layers)"
        ),
        Acts(
            on="loss",
            source="Fixup, arXiv:1901.09321; Tensor Programs V, arXiv:2203.03466 (output layers)",
            search=Search(choices=(True, False)),
        ),
    ] = False
