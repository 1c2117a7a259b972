"""How the weights are learned: the optimizer, its schedules, what is averaged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from moe.knobs import Acts, Search


class OptimizationKnobs(BaseModel):
    """The optimizer and everything that changes during a run. Batch sizes count sequences."""

    optimizer: Annotated[
        Literal["adamw", "muon"],
        Field(
            description="adamw; muon: orthogonalized momentum for the matrices of attention and experts, scaled to "
            "AdamW's size of update so that lr and weight_decay carry over, and AdamW for the rest"
        ),
        Acts(
            on="gradient",
            source="AdamW, arXiv:1711.05101; Muon, kellerjordan.github.io/posts/muon; its scale: arXiv:2502.16982",
            search=Search(choices=("adamw", "muon")),
        ),
    ] = "adamw"
    lr: Annotated[
        float,
        Field(gt=0.0, le=1.0, description="peak learning rate"),
        Acts(on="schedule", source="AdamW, arXiv:1711.05101", search=Search(low=1e-4, high=3e-2, log=True)),
    ]
    schedule: Annotated[
        Literal["cosine", "wsd", "linear"],
        Field(
            description="the learning rate after warm-up: cosine or linear down to the end; wsd: constant, then "
            "linear down over the last decay_fraction"
        ),
        Acts(
            on="schedule",
            source="cosine: arXiv:1608.03983; WSD: MiniCPM, arXiv:2404.06395; linear: arXiv:2502.15938",
            search=Search(choices=("cosine", "wsd", "linear")),
        ),
    ] = "cosine"
    decay_fraction: Annotated[
        float,
        Field(gt=0.0, le=1.0, description="part of the run in which schedule=wsd lowers the learning rate"),
        Acts(
            on="schedule",
            source="Haegele et al. 2024, arXiv:2405.18392 (0.2)",
            search=Search(low=0.05, high=0.6),
            needs=("schedule", "wsd"),
        ),
    ] = 0.2
    min_lr_ratio: Annotated[
        float,
        Field(ge=0.0, le=1.0, description="learning rate at the end of the run, as a fraction of the peak"),
        Acts(on="schedule", source="Chinchilla, arXiv:2203.15556 (0.1)", search=Search(low=0.0, high=0.5)),
    ]
    warmup_fraction: Annotated[
        float,
        Field(ge=0.0, le=0.9, description="part of the run spent raising the learning rate from 0"),
        Acts(on="schedule", source="Vaswani et al. 2017, arXiv:1706.03762", search=Search(low=0.0, high=0.3)),
    ]
    weight_decay: Annotated[
        float,
        Field(ge=0.0, le=10.0, description="decoupled weight decay on matrices (not on norms or embeddings)"),
        Acts(
            on="gradient",
            source="AdamW, arXiv:1711.05101; GPT-3, arXiv:2005.14165 (0.1)",
            search=Search(low=0.001, high=1.0, log=True),
        ),
    ]
    beta1: Annotated[
        float,
        Field(ge=0.0, lt=1.0, description="decay of Adam's first moment"),
        Acts(on="gradient", source="Adam, arXiv:1412.6980", search=Search(low=0.8, high=0.98)),
    ]
    beta2: Annotated[
        float,
        Field(ge=0.0, lt=1.0, description="decay of Adam's second moment"),
        Acts(on="gradient", source="GPT-3, arXiv:2005.14165 (0.95)", search=Search(low=0.9, high=0.999)),
    ]
    muon_momentum: Annotated[
        float,
        Field(ge=0.0, lt=1.0, description="decay of Muon's (Nesterov) momentum"),
        Acts(
            on="gradient",
            source="Muon, kellerjordan.github.io/posts/muon (0.95)",
            search=Search(low=0.8, high=0.99),
            needs=("optimizer", "muon"),
        ),
    ] = 0.95
    muon_steps: Annotated[
        int,
        Field(ge=1, le=10, description="Newton-Schulz iterations of Muon"),
        Acts(
            on="gradient",
            source="Muon, kellerjordan.github.io/posts/muon (5)",
            search=Search(choices=(3, 5, 7)),
            needs=("optimizer", "muon"),
        ),
    ] = 5
    grad_clip: Annotated[
        float,
        Field(gt=0.0, le=1e6, description="largest global gradient norm; greater ones are scaled down to it"),
        Acts(
            on="gradient",
            source="Pascanu et al. 2013, arXiv:1211.5063; GPT-3, arXiv:2005.14165 (1.0)",
            search=Search(low=0.1, high=10.0, log=True),
        ),
    ]
    batch_size: Annotated[
        int,
        Field(ge=1, le=4096, description="sequences per optimizer step"),
        Acts(
            on="gradient",
            source="McCandlish et al. 2018, arXiv:1812.06162",
            search=Search(choices=(4, 8, 16, 32, 64)),
        ),
    ]
    batch_doublings: Annotated[
        int,
        Field(
            ge=0,
            le=6,
            description="times the batch doubles, in equal parts of the run, from batch_size / 2^n up to batch_size",
        ),
        Acts(
            on="schedule",
            source="Smith et al. 2018, arXiv:1711.00489; GPT-3 (ramp), arXiv:2005.14165",
            search=Search(choices=(0, 1, 2)),
        ),
    ] = 0
    length_doublings: Annotated[
        int,
        Field(
            ge=0,
            le=6,
            description="times the sequence length doubles, in equal parts of the run: sequences are cut into 2^n "
            "pieces at first, so a step's tokens stay the same",
        ),
        Acts(
            on="schedule",
            source="Shortformer, arXiv:2012.15832; GrowLength, arXiv:2310.00576",
            search=Search(choices=(0, 1, 2)),
        ),
    ] = 0
    ema_decay: Annotated[
        float,
        Field(
            ge=0.0,
            lt=1.0,
            description="the model that is scored is an exponential moving average of the weights, with this decay a "
            "step; 0 scores the last weights",
        ),
        Acts(
            on="gradient",
            source="Polyak and Juditsky 1992; Morales-Brotons et al. 2024, arXiv:2411.18704",
            search=Search(choices=(0.0, 0.9, 0.98, 0.995)),
        ),
    ] = 0.0
