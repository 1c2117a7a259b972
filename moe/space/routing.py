"""Who goes to which expert, with what weight, and what keeps the load even."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from moe.knobs import Acts, Search

RoutingKind = Literal["token_choice", "expert_choice", "hash"]


class RoutingKnobs(BaseModel):
    """A layer's router. Losses, capacity and expert choice act on routing groups of a fixed number of sequences."""

    routing: Annotated[
        RoutingKind,
        Field(
            description="token_choice: each token takes its top_k experts; expert_choice: each expert takes its best "
            "tokens of a routing group, which looks at FUTURE tokens (not causal: such a model cannot generate text as "
            "it was trained, and its val_bpb is no honest likelihood); hash: experts fixed by the token id, a control"
        ),
        Acts(
            on="loss",
            source="Shazeer et al. 2017, arXiv:1701.06538; expert choice, arXiv:2202.09368; "
            "hash layers, arXiv:2106.04426",
            search=Search(choices=("token_choice", "hash")),
        ),
    ] = "token_choice"
    router_score: Annotated[
        Literal["softmax", "sigmoid"],
        Field(description="how router logits become affinities: over all experts together, or each expert alone"),
        Acts(
            on="loss",
            source="softmax: arXiv:1701.06538; sigmoid: BASE layers, arXiv:2103.16716, DeepSeek-V3, arXiv:2412.19437",
            search=Search(choices=("softmax", "sigmoid")),
        ),
    ] = "softmax"
    normalize_gates: Annotated[
        bool,
        Field(description="scale the chosen experts' gates to sum to 1 (Mixtral) or leave the raw scores (Switch)"),
        Acts(on="loss", source="Mixtral, arXiv:2401.04088", search=Search(choices=(True, False))),
    ]
    noisy_top_k: Annotated[
        bool,
        Field(
            description="add normal noise to the router logits while training, its size learned per token and "
            "expert (softplus of a second projection)"
        ),
        Acts(
            on="loss",
            source="Shazeer et al. 2017, arXiv:1701.06538, equation 4",
            search=Search(choices=(True, False)),
            needs=("routing", "token_choice"),
        ),
    ] = False
    load_balance_weight: Annotated[
        float,
        Field(ge=0.0, le=10.0, description="weight of the auxiliary load-balancing loss"),
        Acts(
            on="gradient",
            source="Switch Transformer, arXiv:2101.03961 (0.01)",
            search=Search(low=1e-4, high=1.0, log=True),
            needs=("routing", "token_choice"),
        ),
    ]
    router_z_weight: Annotated[
        float,
        Field(
            ge=0.0,
            le=10.0,
            description="weight of the router z-loss, the mean squared log-sum-exp of its logits",
        ),
        Acts(
            on="gradient",
            source="ST-MoE, arXiv:2202.08906 (0.001)",
            search=Search(low=1e-5, high=0.1, log=True),
        ),
    ]
    balance_bias_rate: Annotated[
        float,
        Field(
            ge=0.0,
            le=1.0,
            description="balancing without a loss: after each step a bias that only selects experts (no gate sees it) "
            "moves by this much towards those with less than the mean load; 0 is off",
        ),
        Acts(
            on="gradient",
            source="Wang et al. 2024, arXiv:2408.15664 (0.001)",
            search=Search(low=1e-4, high=0.1, log=True),
            needs=("routing", "token_choice"),
        ),
    ] = 0.0
    capacity_factor: Annotated[
        float,
        Field(
            ge=0.0,
            le=64.0,
            description="while training, an expert takes at most this times the mean load of a routing group; later "
            "tokens lose it. 0 drops nothing (dropless). Evaluation never drops",
        ),
        Acts(
            on="loss",
            source="GShard, arXiv:2006.16668; Switch Transformer, arXiv:2101.03961 (1.25)",
            search=Search(choices=(0.0, 1.0, 1.25, 2.0)),
            needs=("routing", "token_choice"),
        ),
    ] = 0.0
    routing_group: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="sequences over which expert load is balanced and limited; divides micro_batch_size",
        ),
        Acts(
            on="gradient",
            source="Demons in the detail (balance scope), arXiv:2501.11873",
            search=Search(choices=(1, 2, 4)),
        ),
    ]
    router_precision: Annotated[
        Literal["fp32", "low"],
        Field(description="compute the router's logits in fp32, or in the precision of the other matrices"),
        Acts(
            on="loss",
            source="Switch Transformer, arXiv:2101.03961, section 2.4",
            search=Search(choices=("fp32", "low")),
        ),
    ] = "fp32"
    router_init_scale: Annotated[
        float,
        Field(ge=0.0, le=100.0, description="initial spread of the router's weights, as a multiple of init_std"),
        Acts(
            on="loss",
            source="Switch Transformer, arXiv:2101.03961 (0.1)",
            search=Search(low=0.01, high=10.0, log=True),
        ),
    ] = 1.0
    router_lr_scale: Annotated[
        float,
        Field(ge=0.0, le=100.0, description="learning rate of the router, as a multiple of lr; 0 freezes it"),
        Acts(
            on="gradient",
            source="per-parameter learning rates, Tensor Programs V, arXiv:2203.03466",
            search=Search(low=0.1, high=10.0, log=True),
        ),
    ] = 1.0
