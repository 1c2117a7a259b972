"""What a training run is: one flat, typed, torch-free config, and what each of its fields acts on.

Everyone reads this module: the trainer to build the model, the proposers for their search space, the tools for
their schema, pre-flight for its accounting. Each field is a *knob* with bounds, a description, a source, and a
declaration of where it can be seen to act; tests/moe/test_knobs.py perturbs every one and looks there.

    config = apply(PRESETS["micro"], {"top_k": 1, "lr": 1e-3})

A field belongs to one of five roles:
- science: part of the question; a treatment may change it
- post: what is done to the weights after training; a treatment may change it, and trains nothing new with it
- budget, evaluation: what makes two runs comparable; equal on both sides, never changed by a treatment
- machine: how the same gradients are computed on a smaller card; no part of the fingerprint
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import ConfigDict, ValidationError, model_validator

from moe.advice import unknown_name, wrong_value
from moe.knobs import Acts, Knob, Value
from moe.space.backbone import BackboneKnobs
from moe.space.experts import ExpertKnobs
from moe.space.optimization import OptimizationKnobs
from moe.space.post import PostKnobs
from moe.space.routing import RoutingKnobs
from moe.space.run import RunKnobs

BYTES = 256
"""Ids of the byte tokenizer, one of which ends documents; a BPE has one more for that."""

MIN_SEQ_LEN = 8
"""Tokens of the shortest sequence, also where `length_doublings` cuts them."""


class ConfigError(ValueError):
    """A config that cannot be: names each field at fault, its bound, and the nearest known name. Raised by apply()."""


class Config(PostKnobs, RunKnobs, OptimizationKnobs, RoutingKnobs, ExpertKnobs, BackboneKnobs):
    """One training configuration: the fields of moe/space/, in one flat record."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._contradictions()]
        if problems:
            raise ValueError("; ".join(problems))

        return self

    def _contradictions(self) -> Iterator[str]:
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            yield f"n_heads={self.n_heads} must divide d_model={self.d_model} into an even head width"

        if self.n_heads % self.gqa_group_size:
            yield f"gqa_group_size={self.gqa_group_size} must divide n_heads={self.n_heads}"

        if self.top_k > self.num_experts:
            yield f"top_k={self.top_k} is more than num_experts={self.num_experts}"

        if not any(self.moe_layers):
            yield f"first_k_dense={self.first_k_dense} and moe_every={self.moe_every} leave no layer with experts"

        if self.batch_size % self.micro_batch_size:
            yield f"micro_batch_size={self.micro_batch_size} must divide batch_size={self.batch_size}"

        if self.micro_batch_size % self.routing_group:
            yield f"routing_group={self.routing_group} must divide micro_batch_size={self.micro_batch_size}"

        first_batch, rest = divmod(self.batch_size, 1 << self.batch_doublings)
        if rest or first_batch % self.routing_group:
            yield (
                f"batch_doublings={self.batch_doublings} must leave a whole number of routing groups of "
                f"{self.routing_group} at first: batch_size={self.batch_size} / {1 << self.batch_doublings}"
            )

        if self.seq_len % (1 << self.length_doublings) or self.seq_len >> self.length_doublings < MIN_SEQ_LEN:
            yield (
                f"length_doublings={self.length_doublings} must cut seq_len={self.seq_len} into equal pieces of at "
                f"least {MIN_SEQ_LEN} tokens"
            )

        if self.corpus == "smollm" and self.corpus_documents is None:
            yield "corpus=smollm is streamed; say with corpus_documents how much of it"

        if self.tokenizer == "byte" and self.vocab_size != BYTES:
            yield f"vocab_size={self.vocab_size} must be {BYTES} with the byte tokenizer"

        if self.tokenizer == "bpe" and self.vocab_size <= BYTES:
            yield f"vocab_size={self.vocab_size} must be more than {BYTES} with tokenizer=bpe: the bytes and an end"

        if (self.budget_tokens is None) == (self.budget_seconds is None):
            yield "exactly one of budget_tokens and budget_seconds must be set"

        if self.budget_tokens is not None and self.budget_tokens < self.batch_size * self.seq_len:
            yield (
                f"budget_tokens={self.budget_tokens} is less than one batch of "
                f"batch_size * seq_len = {self.batch_size * self.seq_len} tokens"
            )

        gone = self.prune_experts + self.merge_experts
        if gone > self.num_experts - self.top_k:
            yield (
                f"prune_experts={self.prune_experts} and merge_experts={self.merge_experts} must leave "
                f"top_k={self.top_k} of num_experts={self.num_experts}"
            )

        if gone and self.routing != "token_choice":
            yield f"prune_experts and merge_experts need tokens that choose their experts; routing={self.routing}"

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads // self.gqa_group_size

    @property
    def dense_width(self) -> int:
        """Hidden width of a dense layer."""
        return max(1, round(self.dense_scale * (self.top_k + self.num_shared_experts) * self.d_expert))

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """Which layers, from the bottom, are mixtures of experts."""
        first, every = self.first_k_dense, self.moe_every
        return tuple(layer >= first and (layer - first + 1) % every == 0 for layer in range(self.n_layers))

    @property
    def causal(self) -> bool:
        """Whether no position can see later ones, as far as the config tells; moe/probe.py looks at the model."""
        return self.routing != "expert_choice"

    @property
    def steps(self) -> int | None:
        """Optimizer steps of a budget in tokens; None for one in seconds."""
        return None if self.budget_tokens is None else self._stages()[0]

    @property
    def sequences(self) -> int | None:
        """Sequences that those steps train on: the last whole batch within the budget is the last step."""
        return None if self.budget_tokens is None else self._stages()[1]

    def _stages(self) -> tuple[int, int]:
        # Stage by stage as moe/schedule.py goes: a stage's last batch may reach into the next.
        available = (self.budget_tokens or 0) // self.seq_len
        stages = self.batch_doublings + 1
        steps = done = 0
        for stage in range(stages):
            size = self.batch_size >> (self.batch_doublings - stage)
            end = -(-available * (stage + 1) // stages)
            fitting = (available - done) // size
            count = min(fitting, max(0, -(-(end - done) // size)))
            steps, done = steps + count, done + count * size

        return steps, done


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
        needs=acts.needs,
    )


KNOBS: Mapping[str, Knob] = MappingProxyType({name: _describe(name) for name in Config.model_fields})
"""Every field of Config by name."""


def apply(base: Config, overrides: Mapping[str, Any]) -> Config:
    """`base` with `overrides`, validated. A micro-batch that no longer fits the batch shrinks, unless it is overridden.

    Raises:
        ConfigError: an unknown field (with the nearest known name), a value out of bounds or of the wrong type,
            or fields that contradict each other.
    """
    unknown = [name for name in overrides if name not in Config.model_fields]
    if unknown:
        raise ConfigError("; ".join(unknown_name(name, KNOBS) for name in unknown))

    values = base.model_dump() | {name: _as_declared(name, value) for name, value in overrides.items()}
    if "micro_batch_size" not in overrides:
        values["micro_batch_size"] = _refit(values)

    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [
            wrong_value(str(detail["loc"][0]), detail["input"], detail["msg"], KNOBS)
            if detail["loc"]
            else detail["msg"]
            for detail in error.errors(include_url=False)
        ]
        raise ConfigError("; ".join(problem.replace("Value error, ", "") for problem in problems)) from None


def apply_treatment(base: Config, treatment: Mapping[str, Any]) -> Config:
    """apply(), but only for fields that are science or post, and only for values that differ from the baseline's.

    Raises:
        ConfigError: as apply(); also when nothing is changed, or what makes runs comparable is.
    """
    if not treatment:
        raise ConfigError("the treatment changes nothing; name at least one knob")

    config = apply(base, treatment)
    for name in treatment:
        role = KNOBS[name].role
        if role not in ("science", "post"):
            raise ConfigError(f"{name} is {role}, equal on both sides of a comparison; a treatment cannot change it")

        if getattr(config, name) == getattr(base, name):
            raise ConfigError(f"{name}={treatment[name]!r} is the baseline's own value; it would change nothing")

        needs = KNOBS[name].needs
        if needs is not None and getattr(config, needs[0]) != needs[1]:
            raise ConfigError(f"{name} acts only with {needs[0]}={needs[1]!r}; set that as well, or leave {name} alone")

    return config


def scientific(config: Config) -> dict[str, Value]:
    """The fields that decide what training comes to: all but those of the roles machine and post."""
    return {name: value for name, value in config.model_dump().items() if KNOBS[name].role not in ("machine", "post")}


def after_training(config: Config) -> dict[str, Value]:
    """The fields that decide what is done to the trained weights: those of role post."""
    return {name: value for name, value in config.model_dump().items() if KNOBS[name].role == "post"}


def _refit(values: Mapping[str, Any]) -> Any:
    # The micro-batch is not science: it follows a new batch_size or routing_group down to the nearest size that works.
    micro, batch, group = values["micro_batch_size"], values["batch_size"], values["routing_group"]
    if not (isinstance(batch, int) and isinstance(group, int)):
        return micro

    fitting = [size for size in range(1, micro + 1) if batch % size == 0 and group > 0 and size % group == 0]
    return max(fitting, default=micro)


def _as_declared(name: str, value: Any) -> Any:
    # JSON has one kind of number: 1 for a float and 8.0 for an int are what the sender meant.
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        return value

    if KNOBS[name].type == "float":
        return float(value)

    if KNOBS[name].type == "int" and float(value).is_integer():
        return int(value)

    return value
