"""An experiment's runs, queued anew from their rows alone, in another lab. What came of it: agents/agreement.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from agents.checkout import commit_with
from agents.pairs import run_values
from agents.textsets import text_set_pin
from db.comparisons import Pair, pairs
from db.errors import RefusedError
from db.experiments import add_experiment, get_experiment, latest_verdict
from db.lab import Lab
from db.queue import add_run, get_run
from db.records import Arm, Experiment, Run, Runner
from moe.config import Config, ConfigError, apply
from moe.fingerprint import CORPUS_SHA256, EVALUATOR_VERSION, code_hash, pin, split_pin
from moe.metrics import text_set_of
from moe.presets import PRESETS
from moe.texts import CorpusError

_COLUMNS = {
    *("title", "hypothesis", "method", "domain", "focus_area", "preset", "baseline", "treatment", "metric"),
    *("direction", "guard_metric", "guard_margin", "proposer", "source", "confirm", "equal_flops"),
    *("screen_share", "metric_text"),
}


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """A run of one arm, and the id of its second run in the other lab."""

    arm: Arm
    run: Run
    again: int


def ended_pairs(lab: Lab, experiment_id: int) -> list[Pair]:
    """The pairs that can be run again.

    Raises:
        NotFoundError: there is no such experiment.
        RefusedError: there is no verdict, or some pairs are still to come.
    """
    get_experiment(lab.store, experiment_id)
    found = pairs(lab.store, experiment_id)
    if not found or latest_verdict(lab.store, experiment_id) is None:
        raise RefusedError(f"experiment {experiment_id} has no verdict yet, so there is nothing to reproduce")

    if any(run is None or run.status not in ("completed", "pruned") for pair in found for run in _arms(pair).values()):
        raise RefusedError(f"experiment {experiment_id} has runs without a result; let them end, or enqueue it again")

    return found


def changes_since(lab: Lab, experiment: Experiment, found: Sequence[Pair]) -> list[str]:
    """What is no longer as it was when the runs were made, and can change a score: code, evaluator, text."""
    runs = [run for pair in found for run in _arms(pair).values() if run is not None]
    scores = [run.score for run in runs if run.score]
    said = [
        _other_code(lab, experiment, code) for code in dict.fromkeys(run.code for run in runs) if code != code_hash()
    ]
    said += [
        f"the evaluator was version {known} and here it is {EVALUATOR_VERSION}"
        for known in dict.fromkeys(score.get("evaluator", EVALUATOR_VERSION) for score in scores)
        if known != EVALUATOR_VERSION
    ]
    if (text_set := text_set_of(experiment.metric)) is not None:
        try:
            changed = text_set_pin(lab, text_set) != experiment.metric_text
            said += [f"the text set {text_set!r} has changed"] if changed else []
        except RefusedError as error:
            said.append(str(error))

    for corpus in dict.fromkeys(str(run.config["corpus"]) for run in runs):
        if corpus in CORPUS_SHA256:
            texts = dict.fromkeys(score.get("corpus_sha256", CORPUS_SHA256[corpus]) for score in scores)
            said += [f"the text {corpus} is no longer {text[:12]}" for text in texts if text != CORPUS_SHA256[corpus]]
        else:
            try:
                pin(apply(PRESETS["nano"], {"corpus": corpus, "corpus_documents": 1}), lab.data_folder)
            except CorpusError as error:
                said.append(str(error))

    return said


def queue_again(lab: Lab, other: Lab, experiment_id: int, runner: Runner) -> list[Rerun]:
    """Queues all pairs of the experiment in the other lab, for its runner: the same configs, seeds and stages.

    Raises:
        RefusedError: a config is not valid with this version of moe/, or its text is not to be had.
    """
    experiment = get_experiment(lab.store, experiment_id)
    made: list[Rerun] = []
    with other.store.transaction():
        # It stays "suggested", so that nobody judges it there and adds pairs.
        copy = add_experiment(other.store, experiment.model_dump(include=_COLUMNS))
        for pair in ended_pairs(lab, experiment_id):
            for arm, run in _arms(pair).items():
                if run is not None:
                    made.append(Rerun(arm=arm, run=run, again=_queue(lab, other, copy, arm, run, runner).id))

    return made


def _other_code(lab: Lab, experiment: Experiment, code: str) -> str:
    differs = f"the code of moe/ was {code[:12]} and here it is {code_hash()[:12]}"
    commit = commit_with(code)
    if commit is None:
        return f"{differs}; no commit here has it, so the runs were made elsewhere or with changes never committed"

    command = f"{sys.executable} -m server.cli --lab {lab.folder} reproduce {experiment.id}"
    return (
        f"{differs}; what made the runs is a commit: git worktree add ../then {commit[:12]} && cd ../then && {command}"
    )


def _queue(lab: Lab, other: Lab, copy: Experiment, arm: Arm, run: Run, runner: Runner) -> Run:
    needs = None
    if run.kind == "post" and run.needs_run_id is not None:
        checkpoint = get_run(lab.store, run.needs_run_id)
        needs = _queue(lab, other, copy, "checkpoint", checkpoint, runner).id

    values = run_values(run.kind, _config(other, run), runner.hardware_class, run.seed, run.purpose, copy.metric_text)
    return add_run(other.store, copy.id, arm, values | {"priority": 0, "needs_run_id": needs}).run


def _config(other: Lab, run: Run) -> Config:
    try:
        config = Config.model_validate(run.config)
        name, _ = split_pin(config.corpus)
        return pin(config if name == config.corpus else apply(config, {"corpus": name}), other.data_folder)
    except (ConfigError, CorpusError, ValueError) as error:
        raise RefusedError(f"run {run.id} cannot be run again: {error}") from None


def _arms(pair: Pair) -> dict[Arm, Run | None]:
    return {"baseline": pair.baseline, "treatment": pair.treatment}
