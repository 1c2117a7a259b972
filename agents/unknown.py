"""What a score does not say, though a gate looks at it: a gate that sees nothing has not been passed.

Scores of a version of moe/ that never measured a fact are let through, since it could not be known then; the verdict
says so. Today's version measures all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.sides import is_lost
from db.comparisons import Pair, is_ever_scored
from db.records import Experiment, Run
from db.store import Store
from moe.fingerprint import code_hash
from moe.metrics import text_set_of

Fact = tuple[str, ...]
"""Where it stands in a score: a key, or the keys that lead to it."""

_OF_EVERY_SCORE = ("evaluator", "code", "corpus_sha256", "split", "train_overlap")


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A fact that the score of a run does not say."""

    run: Run
    side: str
    fact: Fact

    @property
    def name(self) -> str:
        return ".".join(self.fact)


def unknown_problem(store: Store, experiment: Experiment, found: Sequence[Pair]) -> str | None:
    """A gate of agents/gates.py that has nothing to look at, though the run's version of moe/ measures it."""
    for gap in _gaps(experiment, found):
        if not _was_never_known(store, gap):
            return (
                f"{gap.name} of run {gap.run.id} ({gap.side}, seed {gap.run.seed}) is not known: its score does not "
                "say it, so that gate is not passed"
            )

    return None


def unknown_remark(store: Store, experiment: Experiment, found: Sequence[Pair]) -> str | None:
    """Which gates had nothing to look at, since the version of moe/ that scored the runs never measured it."""
    never = Counter((gap.name, gap.run.code) for gap in _gaps(experiment, found) if _was_never_known(store, gap))
    said = [
        f"{name} of {count} of the runs is not known, as version {code[:12]} of moe/ never measured it"
        for (name, code), count in never.items()
    ]
    return "; ".join(said) or None


def _gaps(experiment: Experiment, found: Sequence[Pair]) -> Iterator[Gap]:
    for pair in found:
        for side, run in (("baseline", pair.baseline), ("treatment", pair.treatment)):
            if run is None or run.status != "completed" or (side == "treatment" and is_lost(pair)):
                continue

            for fact in _needed(experiment, run):
                if not _says(run.score or {}, fact):
                    yield Gap(run=run, side=side, fact=fact)


def _needed(experiment: Experiment, run: Run) -> Iterator[Fact]:
    yield from ((name,) for name in _OF_EVERY_SCORE)
    if run.kind == "train":
        if run.config.get("budget_tokens") is not None:
            yield ("train_tokens",)

        if run.config.get("budget_seconds") is not None:
            yield ("train_seconds",)
            yield ("steps",)

    if (name := text_set_of(experiment.metric)) is not None:
        yield ("benchmarks", name, "sha256")
        yield ("benchmarks", name, "train_overlap")


def _says(score: Mapping[str, Any], fact: Fact) -> bool:
    value: Any = score
    for key in fact:
        value = value.get(key) if isinstance(value, Mapping) else None

    return value is not None


def _was_never_known(store: Store, gap: Gap) -> bool:
    """Whether no score in the lab by this version of moe/, which is not today's, says it."""
    return gap.run.code != code_hash() and not is_ever_scored(store, gap.run.code, gap.run.kind, gap.fact)
