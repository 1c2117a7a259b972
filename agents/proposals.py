"""What crosses the border into the agents, from a chat assistant or a language model, and what goes back."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from db.records import Experiment, Review

KnobName = Annotated[str, Field(max_length=100)]
KnobText = Annotated[str, Field(max_length=100)]
Score = Annotated[float, Field(ge=1.0, le=10.0)]


class Proposal(BaseModel):
    """One idea for an experiment: a hypothesis, and the config overrides that test it against the baseline."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    title: Annotated[str, Field(min_length=3, max_length=200, description="the idea in one line")]
    hypothesis: Annotated[
        str,
        Field(
            min_length=10,
            max_length=2000,
            description="what is expected of the metric, in which direction, and by what mechanism",
        ),
    ]
    method: Annotated[
        str, Field(max_length=4000, description="what is changed, what stays equal, and what would count against it")
    ] = ""
    domain: Annotated[
        str, Field(min_length=1, max_length=60, description="research domain, such as moe_architecture or optimization")
    ]
    focus_area: Annotated[str | None, Field(max_length=120, description="part of the domain")] = None
    treatment: Annotated[
        dict[KnobName, bool | int | Annotated[float, Field(allow_inf_nan=False)] | KnobText],
        Field(min_length=1, max_length=12, description='config overrides over the baseline, such as {"top_k": 1}'),
    ]
    metric: Annotated[
        str | None,
        Field(
            max_length=60,
            description="what to judge by; null: the lab's (val_bpb), or weight_bytes if trained weights are changed. "
            "Others: prefill_tokens_per_second, decode_tokens_per_second, accuracy, calibration_error, bpb_late, and "
            "benchmark_NAME for each text set in data/benchmarks. "
            "val_bpb guards all of them",
        ),
    ] = None
    equal_flops: Annotated[
        bool,
        Field(description="at equal training FLOPs, not equal tokens: a treatment that costs more a token gets fewer"),
    ] = False
    source: Annotated[str | None, Field(max_length=500, description="paper or document that the idea is from")] = None

    @field_validator("title", "hypothesis", "method", "focus_area", "source")
    @classmethod
    def _is_text(cls, value: str | None) -> str | None:
        if value and any(unicodedata.category(letter) == "Cc" and letter not in "\n\r\t" for letter in value):
            raise ValueError("it has control characters; write it without them")

        return value


class GivenReview(BaseModel):
    """Scores from 1 (poor) to 10 (excellent) on the five criteria."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    novelty: Annotated[Score, Field(description="how much it differs from what this lab has tried (weight .25)")]
    feasibility: Annotated[Score, Field(description="fits the card, the time and the code (weight .20)")]
    impact: Annotated[Score, Field(description="how much the metric could gain (weight .20)")]
    clarity: Annotated[Score, Field(description="one testable question with a direction (weight .15)")]
    efficiency: Annotated[Score, Field(description="knowledge gained for the GPU time spent (weight .20)")]
    feedback: Annotated[str, Field(min_length=1, max_length=4000, description="what to change, concretely")]
    success_probability: Annotated[float | None, Field(ge=0.0, le=1.0)] = None


class Refusal(BaseModel):
    """A proposal that did not become an experiment, and why."""

    model_config = ConfigDict(frozen=True)

    title: str
    reason: str
    duplicate_of: int | None = None


class Suggested(BaseModel):
    """What suggest made."""

    model_config = ConfigDict(frozen=True)

    experiments: list[Experiment]
    refused: list[Refusal]


class Reviewed(BaseModel):
    """What review wrote."""

    model_config = ConfigDict(frozen=True)

    reviews: list[Review]


class Improved(BaseModel):
    """What improve made: a new experiment in place of its parent, or the parent's rejection and the reason."""

    model_config = ConfigDict(frozen=True)

    parent_id: int
    experiment: Experiment | None
    changes: str


class Improvements(BaseModel):
    """What improve made of each experiment."""

    model_config = ConfigDict(frozen=True)

    improvements: list[Improved]
