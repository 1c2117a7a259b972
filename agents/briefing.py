"""The parts that briefs are made of: the knobs, the limits, what has been tried and what was learnt from it."""

from __future__ import annotations

from agents.domains import Domain, load_domains
from agents.preflight import Base
from agents.treatments import show
from db.experiments import latest_verdict, list_experiments, list_insights
from db.formats import part, places
from db.lab import Lab
from db.records import Experiment
from moe.config import KNOBS
from moe.knobs import Knob

_TRIED_MOST = 40
_TITLE_MOST = 70


def knob_table(lab: Lab, base: Base, domain: str | None) -> str:
    """Every knob that a treatment may change, those of the domain first and described, the others by name."""
    domains = load_domains(lab)
    chosen = domains[domain].knobs if domain in domains else [name for item in domains.values() for name in item.knobs]
    mine = list(dict.fromkeys(chosen))
    others = [name for name, knob in KNOBS.items() if knob.role == "science" and name not in mine]
    lines = [_line(KNOBS[name], base) for name in mine]
    if others:
        rest = ", ".join(f"{name} ({show(getattr(base.config, name))})" for name in others)
        lines.append(f"Also allowed, with the baseline's values: {rest}")

    return "\n".join(lines)


def baseline_line(base: Base) -> str:
    """Every field of the baseline in one line."""
    return ", ".join(f"{name}={show(value)}" for name, value in base.config.model_dump().items())


def limits_line(lab: Lab) -> str:
    """The limits of gpu_optimization; a treatment over one is refused, never clamped."""
    limits = lab.settings.gpu_optimization
    return (
        f"num_experts at most {limits.max_experts}, seq_len at most {limits.max_sequence_length}, "
        f"memory at most {limits.memory_safety_margin:.0%} of the card's; over a limit is refused"
    )


def tried_lines(lab: Lab, domain: str | None) -> str:
    """The newest experiments, one a line: what was changed and what came of it; the domain's own first."""
    newest = [item for item in list_experiments(lab.store, limit=200) if item.status != "superseded"]
    newest.sort(key=lambda item: item.domain != domain if domain else False)
    lines = [_tried(lab, item) for item in newest[:_TRIED_MOST]]
    return "\n".join(lines) or "Nothing yet."


def insight_lines(lab: Lab) -> str:
    """What the verdicts have taught so far."""
    return "\n".join(f"- {item.statement}" for item in list_insights(lab.store, limit=20)) or "Nothing yet."


def domain_line(domain: Domain) -> str:
    """A domain in one line."""
    return f"{domain.name}: {domain.title}. {domain.description} Focus areas: {', '.join(domain.focus_areas) or 'any'}."


def _line(knob: Knob, base: Base) -> str:
    values = "|".join(show(choice) for choice in knob.choices) or f"{knob.type} {_bounds(knob)}"
    now = show(getattr(base.config, knob.name))
    return f"- {knob.name} = {now} ({values}; acts on {knob.acts_on}): {knob.description}"


def _bounds(knob: Knob) -> str:
    if knob.type == "bool" or knob.low is None or knob.high is None:
        return ""

    worth = knob.search
    if worth is None:
        return f"{knob.low:g} to {knob.high:g}"

    usual = "|".join(map(show, worth.choices)) or f"{worth.low:g} to {worth.high:g}"
    return f"{knob.low:g} to {knob.high:g}, usually {usual}"


def _tried(lab: Lab, item: Experiment) -> str:
    treatment = ", ".join(f"{name}={show(value)}" for name, value in item.treatment.items())
    verdict = latest_verdict(lab.store, item.id)
    if verdict and verdict.effect is not None:
        where = "" if verdict.share == 1.0 else f" at {part(verdict.share)} of the budget"
        decimals = places(verdict.noise, verdict.effect)
        said = f"{verdict.said} ({verdict.metric} {verdict.effect:+,.{decimals}f}{where})"
    else:
        said = verdict.said if verdict else item.status

    return f"- {item.id}. {item.title[:_TITLE_MOST]} [{treatment}]: {said}"
