"""What an experiment may be judged by, text sets of the user's own among it, and that those stay what they were.

A named set is pinned when an experiment that is judged by it is queued, as a corpus is: all of its runs are scored on
that text, and so are those of every later experiment with this metric. It is scored whole, in screening and in
confirmation: nothing of it is sealed, and a claim is one about this text (docs/corpora.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from db.errors import RefusedError
from db.experiments import plan_experiment, text_sets_pinned
from db.lab import Lab
from db.records import Experiment
from moe.fingerprint import PIN_DIGITS
from moe.metrics import METRICS, Metric, on_text_set, text_set_of
from moe.texts import BENCHMARKS, CorpusError, hash_set, known_sets


def metrics_to_judge_by(lab: Lab) -> list[Metric]:
    """Those that have a better side and are measured on both sides of a comparison."""
    usual = [metric for metric in METRICS.values() if metric.better is not None and metric.by != "ablate"]
    return usual + [on_text_set(name) for name in known_sets(lab.data_folder / BENCHMARKS)]


def pin_text_set(lab: Lab, experiment: Experiment) -> None:
    """Notes which text the experiment is judged by, where that is a named set.

    Raises:
        RefusedError: there is no such set, or experiments were judged by another text of this name.
    """
    name = text_set_of(experiment.metric)
    if name is None:
        return

    found = text_set_pin(lab, name)
    before = {text: key for text, key in text_sets_pinned(lab.store, experiment.metric).items() if text != found}
    if before:
        raise RefusedError(
            f"the text set {name!r} has changed since experiment {min(before.values())} was queued to be judged by it; "
            "put the old text back, or give the new one a name of its own"
        )

    plan_experiment(lab.store, experiment.id, metric_text=found)


def text_set_pin(lab: Lab, name: str) -> str:
    """The beginning of the SHA-256 of a named set as it is now.

    Raises:
        RefusedError: there is no such set, or it cannot be read.
    """
    try:
        return hash_set(lab.data_folder / BENCHMARKS, name)[:PIN_DIGITS]
    except CorpusError as error:
        raise RefusedError(str(error)) from None


def text_set_problems(experiment: Experiment, score: Mapping[str, Any], most_overlap: float) -> Iterator[str]:
    """What makes a score no measurement of the named set that the experiment is judged by, to follow "run 7"."""
    name = text_set_of(experiment.metric)
    if name is None:
        return

    row = score.get("benchmarks", {}).get(name, {})
    text, overlap = row.get("sha256"), row.get("train_overlap")
    if text is not None and not text.startswith(experiment.metric_text or ""):
        yield f"was scored on a text set {name!r} that had changed since the experiment was queued"

    if overlap is not None and overlap > most_overlap:
        yield f"has {overlap:.0%} of the text set {name!r} in its training text"
