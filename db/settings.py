"""The lab's configuration: built-in defaults, under blueberry.toml, under environment variables.

    BLUEBERRY_AUTO_REVIEW_THRESHOLD=6.5   BLUEBERRY_RUNNER__DEVICE=cpu   (two underscores enter a section)

Secrets come from the environment or a 0600 `.env` in the lab, never from blueberry.toml.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from db import failpoints
from db.errors import SettingsError

_PREFIX = "BLUEBERRY_"
_NOT_SETTINGS = frozenset({"BLUEBERRY_LAB", failpoints.VARIABLE})


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GpuOptimization(_Section):
    """Limits of one card. A treatment over a limit is refused with the number, never clamped."""

    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Largest micro-batch, in sequences."""
    max_sequence_length: Annotated[int, Field(ge=8, le=8192)] = 1024
    max_experts: Annotated[int, Field(ge=1, le=256)] = 16
    """Most routed experts per layer."""
    memory_safety_margin: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Part of the memory that a run may be planned to use."""


class Llm(_Section):
    """The language model behind the agents, reached through OpenRouter."""

    model: Annotated[str, Field(min_length=1)] = "anthropic/claude-sonnet-4.5"
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.7
    max_tokens: Annotated[int, Field(ge=256, le=64_000)] = 8_000
    timeout_seconds: Annotated[float, Field(gt=0.0, le=600.0)] = 120.0
    attempts: Annotated[int, Field(ge=1, le=5)] = 3
    """Calls made for one answer: a malformed one is sent back with the error."""
    usd_per_million_tokens: Annotated[float, Field(ge=0.0)] = 15.0
    """Price at which an unanswered call is charged, as its worst case."""
    max_usd_per_day: Annotated[float, Field(ge=0.0)] = 5.0
    """Hard cap over one UTC day; 0 forbids calls."""


class Runner(_Section):
    """The GPU runner daemon."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int | None, Field(ge=1, le=1024)] = None
    """CPU threads of a training process; by default half of the cores, shared out among processes, so that OpenMP never
    spins against the rest."""
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that train one run together: on as many cards of one kind, or sharing the CPU. Part of the hardware
    class: gradients are equal but for rounding, so runs of other numbers of processes are not compared."""
    poll_seconds: Annotated[float, Field(gt=0.0, le=60.0)] = 0.3
    sample_seconds: Annotated[float, Field(gt=0.0, le=600.0)] = 5.0
    lease_seconds: Annotated[float, Field(ge=1.0, le=3600.0)] = 30.0
    max_failures: Annotated[int, Field(ge=1, le=20)] = 2
    """Failed attempts (a crash; not a diverged model, which is a result) after which a run is failed."""
    max_lost: Annotated[int, Field(ge=1, le=100)] = 10
    """Lost attempts (killed from outside) after which a run is failed."""
    max_run_seconds: Annotated[float | None, Field(gt=0.0)] = None
    """Time in which an attempt must be done, its evaluation included; none by default: budgets end honest runs, and
    stall_seconds those that hang. A treatment out of time at its last try counts at the worst bound."""
    stall_seconds: Annotated[float | None, Field(gt=0.0)] = 1800.0
    """Time without a metric, a log line or any new file after which an attempt is taken for hung. Compiling and
    evaluating are silent for minutes."""
    prune: bool = True
    """Whether a screening run whose val_bpb is hopelessly behind its baseline's is stopped (gpu_runner/pruning.py)."""
    keep: Literal["needed", "all"] = "needed"
    """Trained weights on disk. needed: of baselines, of what improved, and what an open experiment may read; all: of
    every run, until the disk or max_disk_gib has no room for the next one."""
    max_disk_gib: Annotated[float | None, Field(gt=0.0)] = None
    """Most that runs/ may hold; None: as much as the disk does."""
    gpu_hours_per_day: Annotated[float | None, Field(ge=0.0, le=2400.0)] = None
    """Hard cap over one UTC day, over all devices of the lab: then nothing trains until the next. None: no cap."""
    kwh_per_day: Annotated[float | None, Field(ge=0.0)] = None
    """Hard cap over one UTC day of what the runs use, as the cards measure it; without a measurement nothing starts."""


class Settings(BaseSettings):
    """Everything that can be configured. An unknown key or a value out of range is an error that names it."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, allow_inf_nan=False
    )

    auto_review_threshold: Annotated[float, Field(ge=1.0, le=10.0)] = 7.0
    """A review of this score or more approves."""
    auto_improve_threshold: Annotated[float, Field(ge=1.0, le=10.0)] = 5.0
    """Below it a method is rewritten; from here up to auto_review_threshold it is refined."""
    max_experiments_per_suggestion: Annotated[int, Field(ge=1, le=50)] = 5
    auto_start_runner: bool = False
    """Whether enqueue starts the runner daemon."""
    max_improvement_rounds: Annotated[int, Field(ge=0, le=10)] = 2
    """Revisions of one idea before it is rejected."""
    preset: Literal["auto", "nano", "micro", "t4"] = "auto"
    """Baseline of new experiments; auto: t4 where a card is registered, otherwise micro."""
    baseline_from: Literal["champion", "preset"] = "champion"
    """What new suggestions are compared with: the config that confirmed gains have led to, or always the preset."""
    baseline: dict[str, bool | int | float | str] = {}
    """Fields of moe.config changed in every baseline of this lab, such as budget_tokens; budget_seconds in its place
    gives both sides of a comparison equal time."""
    metric: Annotated[str, Field(min_length=1, max_length=60)] = "val_bpb"
    """What new ideas are judged by unless they name another, such as benchmark_NAME of a text set. The catalog is about
    val_bpb: with another metric the optimizer or the model has the ideas."""
    min_seeds: Annotated[int, Field(ge=1, le=20)] = 1
    """Fewest pairs of runs that screen an experiment. With 1 there is a second one where the noise is not known well
    yet, or the first leaves the question open (agents/screening.py)."""
    max_seeds: Annotated[int, Field(ge=2, le=50)] = 4
    """Most pairs that a screening may be asked to have."""
    screen_share: Annotated[float, Field(ge=0.0625, le=1.0)] = 1.0
    """Part of the budget that screening trains for, on both sides; a confirmation always has all of it. Short trainings
    rank otherwise than long ones (docs/evidence.md): worth it where a run takes long and many ideas are to be tried."""
    max_pairs: Annotated[int, Field(ge=2, le=200)] = 16
    """Most new pairs that confirm a promising experiment; the judge stops before where going on is pointless."""
    campaign: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w .:-]+$")] = "lab"
    """Over what false discoveries are controlled: lab is the lab's whole life, cycle each automatic campaign for
    itself, any other name a study or night of that name. Reports show the lab's life too."""
    gpu_optimization: GpuOptimization = GpuOptimization()
    llm: Llm = Llm()
    runner: Runner = Runner()

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.auto_improve_threshold > self.auto_review_threshold:
            raise ValueError("auto_improve_threshold must not be above auto_review_threshold")

        if self.min_seeds > self.max_seeds:
            raise ValueError("min_seeds must not be above max_seeds")

        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The file's values come in as init arguments; the environment stands above them.
        return env_settings, init_settings


class OpenRouter(BaseSettings):
    """Access to OpenRouter; api_key None means that the lab works without a language model."""

    model_config = SettingsConfigDict(
        env_prefix="OPENROUTER_", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    api_key: SecretStr | None = None
    site_url: str | None = None
    site_name: str | None = None
    base_url: str = "https://openrouter.ai/api/v1"


def load_settings(folder: Path) -> Settings:
    """The configuration of the lab in `folder`.

    Raises:
        SettingsError: malformed TOML, an unknown key, or a value out of range; the message names it.
    """
    path = folder / "blueberry.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None

    unknown = sorted(set(_unknown_variables()))
    if unknown:
        raise SettingsError(
            f"unknown environment variable {', '.join(unknown)}; settings are {', '.join(_variables(Settings))}"
        )

    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_explain(error, path)) from None
    except SourceError as error:
        raise SettingsError(f"an environment variable cannot be read: {error}") from None


def load_openrouter(folder: Path) -> OpenRouter:
    """Access to OpenRouter from the environment, over `.env` in the lab.

    Raises:
        SettingsError: `.env` can be read by others.
    """
    path = folder / ".env"
    if path.exists() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"{path} holds a secret and can be read by others; run: chmod 600 {path}")

    return OpenRouter(_env_file=path if path.exists() else None)


def _explain(error: ValidationError, path: Path) -> str:
    problems = []
    for detail in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}")
        elif key:
            problems.append(f"{key}={detail['input']!r}: {detail['msg']}")
        else:
            problems.append(detail["msg"].removeprefix("Value error, "))

    return f"{path} (or a {_PREFIX} environment variable): {'; '.join(problems)}"


def _variables(model: type[BaseModel], prefix: str = _PREFIX) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name.upper()}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, f"{prefix}{name.upper()}__")


def _unknown_variables() -> Iterator[str]:
    known = {*_variables(Settings), *_NOT_SETTINGS}
    for name in os.environ:
        if name.startswith(_PREFIX) and name not in known and not name.startswith(f"{_PREFIX}BASELINE__"):
            yield name
