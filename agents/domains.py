"""Research domains: one TOML file each, here in domains/ and in the lab's own domains/, which replaces by name.

title = "Optimization"
description = "How the weights are found."
focus_areas = ["learning rate", "batch size"]
knobs = ["lr", "batch_size"]
weight = 1.0

[[interventions]]                 # the catalog: what the literature makes worth trying
title = "A tenth of the learning rate"
focus_area = "learning rate"
hypothesis = "..."
method = "..."
treatment = { lr = { scale = 0.1 } }     # relative to the baseline; a plain value is absolute
expect = "worse"                  # improved, worse or equivalent
size = "large"                    # large, moderate or small; not for equivalent
prior = 0.02                      # probability that the metric improves
source = "..."
order = 1                         # optional: before all without one
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agents.proposals import Proposal
from agents.treatments import changes_of, describe
from db.errors import RefusedError, SettingsError
from db.lab import Lab
from moe.config import KNOBS, Config, ConfigError, apply_treatment
from moe.knobs import Value

_BUILT_IN = Path(__file__).parent / "domains"


class _Toml(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_strip_whitespace=True)


class Relative(_Toml):
    """A value relative to the baseline's."""

    scale: Annotated[float, Field(gt=0.0)]

    def of(self, value: Value, kind: str) -> Value:
        """The scaled value, an int rounded to the nearest, a float to six digits."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value

        return round(value * self.scale) if kind == "int" else float(f"{value * self.scale:.6g}")


class Intervention(_Toml):
    """One thing worth trying by the literature, and what to expect of it here.

    expect, size and prior are the catalog's own judgement for a small budget; `method` says what the source found.
    """

    title: Annotated[str, Field(min_length=3, max_length=200)]
    focus_area: Annotated[str | None, Field(max_length=120)] = None
    hypothesis: Annotated[str, Field(min_length=10, max_length=2000)]
    method: Annotated[str, Field(max_length=3000)] = ""
    treatment: Annotated[dict[str, Relative | bool | int | float | str], Field(min_length=1, max_length=12)]
    expect: Literal["improved", "worse", "equivalent"]
    size: Literal["large", "moderate", "small"] | None = None
    prior: Annotated[float, Field(ge=0.0, le=1.0)]
    source: Annotated[str, Field(min_length=3, max_length=500)]
    order: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        _check_knobs(self.treatment)
        if (self.size is None) != (self.expect == "equivalent"):
            raise ValueError("size is given exactly when expect is improved or worse")

        return self

    def resolve(self, base: Config) -> dict[str, Value] | None:
        """The treatment over `base`; None where it does not apply, such as a value that the baseline already has."""
        values = {
            name: value.of(getattr(base, name), KNOBS[name].type) if isinstance(value, Relative) else value
            for name, value in self.treatment.items()
        }
        try:
            config = apply_treatment(base, values)
        except ConfigError:
            return None

        return {name: getattr(config, name) for name in values}

    def propose(self, domain: str, base: Config) -> Proposal | None:
        """The intervention as a proposal for this baseline; None where it does not apply."""
        treatment = self.resolve(base)
        if treatment is None:
            return None

        moves = describe(changes_of(base, treatment))
        return Proposal(
            title=self.title,
            hypothesis=self.hypothesis,
            method=f"{self.method} Changed: {moves}; everything else as in the baseline.".strip(),
            domain=domain,
            focus_area=self.focus_area,
            treatment={name: value for name, value in treatment.items() if value is not None},
            source=self.source,
        )


class Domain(_Toml):
    """One field of research: its knobs, and the catalog of what is known to be worth asking."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,60}$")]
    title: Annotated[str, Field(min_length=1, max_length=200)]
    description: Annotated[str, Field(max_length=2000)]
    focus_areas: list[str] = []
    knobs: Annotated[list[str], Field(min_length=1)]
    weight: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    interventions: list[Intervention] = []

    @model_validator(mode="after")
    def _known(self) -> Self:
        _check_knobs(self.knobs)
        return self


def load_domains(lab: Lab) -> dict[str, Domain]:
    """All domains by name: those that come with Blueberry, under the lab's own.

    Raises:
        SettingsError: a file is malformed; the message names it and the key.
    """
    return _built_in() | _read_all(lab.domains_folder)


def get_domain(lab: Lab, name: str) -> Domain:
    """The domain of that name.

    Raises:
        RefusedError: there is none.
    """
    domains = load_domains(lab)
    if name not in domains:
        raise RefusedError(
            f"there is no domain {name!r}; known: {', '.join(domains)}; or describe it in "
            f"{lab.domains_folder / 'NAME.toml'}"
        )

    return domains[name]


def in_order(domains: Mapping[str, Domain]) -> Iterator[tuple[Domain, Intervention]]:
    """The catalog in the order to try it: ordered entries first, then by prior, domains in turn by weight."""
    ranked = []
    for domain in domains.values():
        unordered = sorted((item for item in domain.interventions if item.order is None), key=lambda item: -item.prior)
        for item in domain.interventions:
            turn = 0.0 if item.order else (unordered.index(item) + 1) / domain.weight
            ranked.append(((item.order or float("inf"), turn, -item.prior, domain.name), domain, item))

    for _, domain, item in sorted(ranked, key=lambda entry: entry[0]):
        yield domain, item


@functools.cache
def _built_in() -> dict[str, Domain]:
    return _read_all(_BUILT_IN)


def _read_all(folder: Path) -> dict[str, Domain]:
    return {path.stem: _read(path) for path in sorted(folder.glob("*.toml"))}


def _read(path: Path) -> Domain:
    try:
        return Domain.model_validate({**tomllib.loads(path.read_text(encoding="utf-8")), "name": path.stem})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, detail['loc'])) or 'domain'}: {detail['msg'].removeprefix('Value error, ')}"
            for detail in error.errors(include_url=False, include_input=False)
        ]
        raise SettingsError(f"{path}: {'; '.join(problems)}") from None


def _check_knobs(names: list[str] | Mapping[str, object]) -> None:
    for name in names:
        if name not in KNOBS:
            raise ValueError(f"unknown knob {name!r}; known: {', '.join(KNOBS)}")

        if KNOBS[name].role not in ("science", "post"):
            raise ValueError(f"{name} is {KNOBS[name].role}; a treatment cannot change it")
