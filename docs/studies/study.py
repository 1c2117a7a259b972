"""What all studies do: questions in a lab of its own, asked one after the other, and work until all are answered."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from agents.hands import register, start_runner, stop_runners
from agents.planner import enqueue
from agents.proposals import GivenReview, Proposal
from agents.reviewer import review
from agents.suggester import suggest
from db.experiments import list_experiments
from db.lab import Lab
from db.records import Experiment
from db.runners import list_runners

_SCORES = {"novelty": 7.0, "feasibility": 10.0, "impact": 7.0, "clarity": 8.0, "efficiency": 9.0}


def open_lab(folder: Path, settings: str) -> Lab:
    """The lab in the folder, with this blueberry.toml if it is new."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "blueberry.toml"
    if not file.exists():
        file.write_text(settings, encoding="utf-8")

    lab = Lab(folder)
    register(lab)
    return lab


def experiments(lab: Lab) -> list[Experiment]:
    """All of them, oldest first."""
    return list_experiments(lab.store, oldest_first=True, limit=1000)


def ask(lab: Lab, proposals: Iterable[Proposal], feedback: str, *, confirm: bool = False) -> None:
    """Queues those proposals that were not asked yet; one that is refused is told and left out."""
    asked = {experiment.title for experiment in experiments(lab)}
    for proposal in proposals:
        if proposal.title in asked:
            continue

        made = suggest(lab, count=1, proposals=[proposal])
        for refusal in made.refused:
            sys.stderr.write(f"refused: {refusal.title}: {refusal.reason}\n")

        for experiment in made.experiments:
            review(lab, [experiment.id], given=GivenReview(**_SCORES, feedback=feedback))
            enqueue(lab, [experiment.id], confirm=confirm)


def work_off(lab: Lab) -> None:
    """Returns when nothing is queued or trains; a runner that died meanwhile is started again."""
    start_runner(lab)
    while waiting := sum(experiment.status in ("queued", "running") for experiment in experiments(lab)):
        sys.stderr.write(f"{waiting} experiments to go\n")
        time.sleep(20)
        if not any(runner.status == "running" for runner in list_runners(lab.store)):
            start_runner(lab)

    stop_runners(lab)
