"""Has this been asked before? Shared knobs and full-text search shortlist; structured fields alone decide.

Texts never decide: "raise X" and "lower X" read nearly alike, and the same idea can be told in other words.

What failed or was cancelled has answered nothing and may be asked again, unless it was registered as a hypothesis: then
it keeps its question, and goes on with its evidence. Otherwise one could cancel what looks bad, and start afresh.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from agents.continuing import can_go_on, was_answered_elsewhere
from agents.treatments import change_of, changes_of, is_near, is_same_baseline
from db.experiments import experiments_of, experiments_on_knobs, latest_verdict, search_experiments
from db.records import Experiment, Value
from db.store import Store
from moe.config import Config

Relation = Literal["equal", "near", "same direction", "opposite direction", "shares a knob", "similar words"]

_ORDER: tuple[Relation, ...] = (
    "equal",
    "near",
    "same direction",
    "opposite direction",
    "shares a knob",
    "similar words",
)
_UNANSWERED = ("failed", "cancelled")


class Neighbour(BaseModel):
    """A past experiment, how it relates to a new idea, and what came of it."""

    model_config = ConfigDict(frozen=True)

    experiment_id: int
    title: str
    treatment: dict[str, Value]
    status: str
    relation: Relation
    verdict: str | None
    effect: float | None

    @property
    def is_duplicate(self) -> bool:
        """Whether it asks the same question."""
        return self.relation in ("equal", "near")


def neighbours(
    store: Store,
    base: Config,
    treatment: Mapping[str, Value],
    text: str,
    *,
    metric: str | None = None,
    equal_flops: bool | None = None,
    hardware_class: str | None = None,
    anew: bool = False,
    ignore: Collection[int] = (),
    limit: int = 5,
) -> list[Neighbour]:
    """The past experiments on this baseline nearest to an idea, nearest first; with a `metric`, those judged by it, and
    with `equal_flops` those that compare so, or not. Those that have answered nothing are left out.

    Args:
        hardware_class: of the runner that the idea would be tried on; None where none is known.
        anew: also leave out what was answered only on other hardware or with another version of moe/.
    """
    alike = [*experiments_on_knobs(store, treatment), *experiments_of(store, treatment)]
    found = {item.id: item for item in [*alike, *search_experiments(store, text)]}
    kept = [
        (_relation(base, treatment, item.treatment), item)
        for item in found.values()
        if item.id not in ignore
        and metric in (None, item.metric)
        and equal_flops in (None, item.equal_flops)
        and is_same_baseline(base, item.baseline)
        and _counts(store, item, hardware_class, anew=anew)
    ]
    kept.sort(key=lambda pair: (_ORDER.index(pair[0]), -pair[1].id))
    return [_neighbour(store, relation, item) for relation, item in kept[:limit]]


def find_duplicate(
    store: Store,
    base: Config,
    treatment: Mapping[str, Value],
    text: str,
    *,
    metric: str,
    equal_flops: bool,
    hardware_class: str | None = None,
    anew: bool = False,
    ignore: Collection[int] = (),
) -> Neighbour | None:
    """The past experiment on this baseline that asks the same question, to be judged by the same metric; arguments as
    those of neighbours().
    """
    nearest = neighbours(
        store,
        base,
        treatment,
        text,
        metric=metric,
        equal_flops=equal_flops,
        hardware_class=hardware_class,
        anew=anew,
        ignore=ignore,
        limit=1,
    )
    return nearest[0] if nearest and nearest[0].is_duplicate else None


def _counts(store: Store, item: Experiment, hardware_class: str | None, *, anew: bool) -> bool:
    if item.status == "superseded" or (anew and was_answered_elsewhere(store, item.id, hardware_class)):
        return False

    return item.status not in _UNANSWERED or can_go_on(store, item.id, hardware_class)


def _relation(base: Config, new: Mapping[str, Value], old: Mapping[str, Value]) -> Relation:
    if dict(new) == dict(old):
        return "equal"

    shared = new.keys() & old.keys()
    if not shared:
        return "similar words"

    if new.keys() != old.keys():
        return "shares a knob"

    pairs = [
        (change, change_of(change.knob, getattr(base, change.knob), old[change.knob]))
        for change in changes_of(base, new)
    ]
    if any(one.direction != other.direction for one, other in pairs):
        return "opposite direction"

    if all(is_near(one.knob, one.after, other.after) for one, other in pairs):
        return "near"

    if any(one.direction == "changed" and one.after != other.after for one, other in pairs):
        return "shares a knob"

    return "same direction"


def _neighbour(store: Store, relation: Relation, item: Experiment) -> Neighbour:
    verdict = latest_verdict(store, item.id)
    return Neighbour(
        experiment_id=item.id,
        title=item.title,
        treatment=item.treatment,
        status=item.status,
        relation=relation,
        verdict=verdict.said if verdict and verdict.final else None,
        effect=verdict.effect if verdict and verdict.final and verdict.share == 1.0 else None,
    )
