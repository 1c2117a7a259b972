"""Who has the ideas: the assistant, a language model, the catalog of the literature, or the optimizer.

Whatever the source, a proposal becomes an experiment only through admission: known domain and knobs, values within
bounds and limits, not asked before. What does not pass comes back as a refusal with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from agents.admission import METRIC, NotAdmittedError, admit, check, metric_of_lab, usual_metric
from agents.briefing import baseline_line, domain_line, insight_lines, knob_table, limits_line, tried_lines
from agents.domains import Domain, Intervention, get_domain, in_order, load_domains
from agents.llm import ask, has_model
from agents.optimizer import propose
from agents.preflight import Base, base_of
from agents.prompts import render
from agents.proposals import Proposal, Refusal, Suggested
from db.errors import RefusedError
from db.lab import Lab
from db.records import Experiment, Proposer

_CATALOG_SHARE = 5
"""One in five ideas without a model is the optimizer's; the others are the catalog's."""


class Ideas(BaseModel):
    """What a language model answers with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    proposals: Annotated[list[Proposal], Field(min_length=1, max_length=50)]


class _Idea(NamedTuple):
    proposer: Proposer
    proposal: Proposal


def suggest(
    lab: Lab,
    *,
    count: int,
    domain: str | None = None,
    focus_area: str | None = None,
    proposer: Literal["auto", "llm", "optimizer", "catalog"] = "auto",
    proposals: Sequence[Proposal] = (),
    cycle_id: int | None = None,
    task_id: int | None = None,
) -> Suggested:
    """Makes experiments of new ideas, all in one transaction.

    Args:
        count: how many ideas to generate, at most max_experiments_per_suggestion; not used with `proposals`.
        proposer: auto is the language model where there is a key, otherwise the catalog and the optimizer.
        proposals: the assistant's own ideas, in place of generated ones.

    Raises:
        RefusedError: an unknown domain or metric, or too many asked for.
        LLMError: the model gave no usable answer; nothing is invented in its place.
    """
    if domain is not None:
        get_domain(lab, domain)

    most = lab.settings.max_experiments_per_suggestion
    if not proposals and not 1 <= count <= most:
        raise RefusedError(f"count={count} is outside 1 to {most} (max_experiments_per_suggestion)")

    base = base_of(lab)
    metric_of_lab(lab)
    if proposals:
        ideas = [_Idea("assistant", proposal) for proposal in proposals]
    elif proposer == "llm" or (proposer == "auto" and has_model(lab)):
        ideas = _ask_model(lab, base, count, domain, focus_area, task_id)
    else:
        ideas = _without_model(lab, base, count, domain, focus_area, proposer)

    suggested = _write(lab, base, ideas, cycle_id)
    if not proposals and len(ideas) < count:
        return suggested.model_copy(update={"refused": [*suggested.refused, _too_few(count, len(ideas), proposer)]})

    return suggested


def brief(lab: Lab, domain: str | None, focus_area: str | None) -> str:
    """All that a proposer needs: goal, baseline, knobs, limits, what was tried and learnt, and the form of the answer.

    For an assistant, which answers with one Proposal an idea; the language model's prompt is the same text.
    """
    return _brief(lab, base_of(lab), domain, focus_area, "Give each idea as one object of this form", Proposal)


def _brief(lab: Lab, base: Base, domain: str | None, focus_area: str | None, form: str, schema: type[BaseModel]) -> str:
    domains = [get_domain(lab, domain)] if domain else list(load_domains(lab).values())
    metric = metric_of_lab(lab)
    return render(
        "suggest",
        {
            "domains": "\n".join(f"- {domain_line(item)}" for item in domains),
            "insights": insight_lines(lab),
            "tried": tried_lines(lab, domain),
        },
        metric=f"{metric.name} ({metric.meaning}, in {metric.unit}; {metric.better} is better)",
        focus=f"Focus on: {focus_area[:200]}" if focus_area else "Any focus area of the domain.",
        preset=base.preset,
        baseline=baseline_line(base),
        limits=limits_line(lab),
        knobs=knob_table(lab, base, domain),
        form=form,
        schema=json.dumps(schema.model_json_schema()),
    )


def _ask_model(
    lab: Lab, base: Base, count: int, domain: str | None, focus_area: str | None, task_id: int | None
) -> list[_Idea]:
    form = (
        f"Answer with exactly {count} ideas that differ from each other, as one JSON object of this form, nothing else"
    )
    prompt = _brief(lab, base, domain, focus_area, form, Ideas)
    answer = ask(lab, agent="suggester", prompt=prompt, schema=Ideas, task_id=task_id)
    return [_Idea("llm", proposal) for proposal in answer.value.proposals[:count]]


def _without_model(
    lab: Lab, base: Base, count: int, domain: str | None, focus_area: str | None, proposer: str
) -> list[_Idea]:
    domains = {domain: get_domain(lab, domain)} if domain else load_domains(lab)
    share = round(count / _CATALOG_SHARE) if lab.settings.metric == METRIC else count
    optimized = {"catalog": 0, "optimizer": count}.get(proposer, share)
    ideas = _from_catalog(lab, base, domains, focus_area, count - optimized)
    if proposer != "catalog":
        taken = [idea.proposal.treatment for idea in ideas]
        wanted = count - len(ideas)
        ideas += [_Idea("optimizer", item) for item in propose(lab, base, domains, wanted, taken=taken)]

    return ideas


def _from_catalog(lab: Lab, base: Base, domains: dict[str, Domain], focus_area: str | None, count: int) -> list[_Idea]:
    ideas: list[_Idea] = []
    for domain, item in in_order(domains):
        if len(ideas) == count:
            break

        proposal = item.propose(domain.name, base.config) if _is_about(item, focus_area) else None
        if proposal is not None:
            proposal = proposal.model_copy(update={"metric": usual_metric(proposal.treatment)})

        if proposal is not None and _is_new(lab, base, proposal):
            ideas.append(_Idea("catalog", proposal))

    return ideas


def _is_about(item: Intervention, focus_area: str | None) -> bool:
    if focus_area is None:
        return True

    text = f"{item.focus_area or ''} {item.title} {item.hypothesis}".lower()
    return focus_area.lower().strip() in text


def _is_new(lab: Lab, base: Base, proposal: Proposal) -> bool:
    try:
        check(lab, base, proposal)
    except NotAdmittedError:
        return False

    return True


def _write(lab: Lab, base: Base, ideas: list[_Idea], cycle_id: int | None) -> Suggested:
    experiments: list[Experiment] = []
    refused: list[Refusal] = []
    with lab.store.transaction():
        for proposer, proposal in ideas:
            try:
                experiments.append(admit(lab, base, proposal, proposer=proposer, cycle_id=cycle_id))
            except NotAdmittedError as error:
                refused.append(Refusal(title=proposal.title, reason=str(error), duplicate_of=error.duplicate_of))

    return Suggested(experiments=experiments, refused=refused)


def _too_few(count: int, made: int, proposer: str) -> Refusal:
    source = "catalog and optimizer" if proposer == "auto" else proposer
    return Refusal(
        title=f"{count - made} of {count} ideas",
        reason=f"the {source} had no more that are new on this baseline; try another domain or focus area, or give "
        "proposals of your own",
    )
