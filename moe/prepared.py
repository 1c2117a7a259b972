"""The folder of a config's tokenized corpus: made once, by whoever needs it first, and checked whenever it is opened.

A folder of `data_dir` is named by everything that decides its content. Folders appear whole, by a rename under a file
lock, so any number of processes may prepare at once; a torn or altered file no longer matches its sidecar and is
rebuilt. Once it is there, a run needs neither the source text nor the network.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer

from moe.config import Config
from moe.corpus import PARTS, SPLITS, hash_sentences, load_corpus, overlap, split_documents
from moe.fingerprint import corpus_identity, pin, split_pin
from moe.rundir import Split, sync_folder, write_json
from moe.texts import END, CorpusError, Document, hash_file
from moe.tokenizer import Encoded, bytes_of_ids, encode, open_smollm, train_bpe

FORMAT = 3
"""Raised whenever other bytes would be written for the same config."""


class Sidecar(BaseModel):
    """sidecar.json: the SHA-256 of each file of the folder, and what Data says of the text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, str]
    corpus_sha256: str
    topic_names: tuple[str, ...]
    train_overlap: dict[Split, float]
    documents: dict[Split, int]


def read_sidecar(folder: Path) -> Sidecar:
    """Raises OSError or ValidationError where there is none, or a damaged one."""
    return Sidecar.model_validate_json((folder / "sidecar.json").read_bytes())


def prepared_folder(config: Config, data_dir: Path) -> Path:
    """The folder, whole.

    Raises:
        CorpusError: the text cannot be had, is not what the corpus is pinned to, or leaves a split empty.
    """
    if split_pin(config.corpus)[1] == "":
        config = pin(config, data_dir)

    folder = data_dir / _folder_name(config)
    if not _is_whole(folder):
        data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(data_dir / f"{folder.name}.lock"):
            if not _is_whole(folder):
                _build(config, data_dir, folder)

    return folder


def _folder_name(config: Config) -> str:
    identity = [FORMAT, corpus_identity(config), config.corpus_documents, END, PARTS]
    identity += [config.tokenizer, config.vocab_size]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return f"{split_pin(config.corpus)[0]}-{config.tokenizer}-{config.vocab_size}-{digest}"


def _build(config: Config, data_dir: Path, folder: Path) -> None:
    corpus = load_corpus(config, data_dir)
    parts = split_documents(corpus.documents)
    _require_each_split(config, parts)
    temporary = folder.with_name(f".{folder.name}.tmp")  # one builder at a time: we hold the lock
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()

    texts = {split: [document.text for document in parts[split]] for split in SPLITS}
    sentences = {split: hash_sentences(texts[split]) for split in SPLITS}
    topic_names = topic_names_of(corpus.documents)
    tokenizer = _tokenizer(config, data_dir, texts["train"])
    id_bytes = bytes_of_ids(tokenizer, config.vocab_size)
    files: dict[str, NDArray[Any]] = {"id_bytes.bin": id_bytes, "train_sentences.bin": np.unique(sentences["train"])}
    for split in SPLITS:
        encoded = encode(tokenizer, texts[split])
        _require_lossless(config, encoded, id_bytes, texts[split])
        files[f"{split}.bin"], files[f"{split}_starts.bin"] = encoded
        files[f"{split}_topics.bin"] = numbers_of(parts[split], topic_names)

    for name, content in files.items():
        with (temporary / name).open("wb") as file:
            content.tofile(file)

    if tokenizer is not None:
        tokenizer.save(str(temporary / "tokenizer.json"))

    names = sorted(path.name for path in temporary.iterdir())
    for name in names:
        with (temporary / name).open("rb") as file:
            os.fsync(file.fileno())

    sidecar = Sidecar(
        files={name: hash_file(temporary / name) for name in names},
        corpus_sha256=corpus.sha256,
        topic_names=topic_names,
        train_overlap={split: overlap(sentences[split], sentences["train"]) for split in SPLITS},
        documents={split: len(parts[split]) for split in SPLITS},
    )
    write_json(temporary / "sidecar.json", sidecar.model_dump())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder.parent)


def _tokenizer(config: Config, data_dir: Path, train: list[str]) -> Tokenizer | None:
    if config.tokenizer == "byte":
        return None

    if config.tokenizer == "bpe":
        return train_bpe(train, config.vocab_size)

    tokenizer = open_smollm(data_dir / "tokenizers")
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        raise CorpusError(f"tokenizer={config.tokenizer} has {size} ids, more than vocab_size={config.vocab_size}")

    return tokenizer


def _require_each_split(config: Config, parts: Mapping[Split, Sequence[Document]]) -> None:
    missing = [split for split in SPLITS if not parts[split]]
    if missing:
        total = sum(len(part) for part in parts.values())
        raise CorpusError(
            f"{config.corpus} has {total} documents, none of which is for {' or '.join(missing)}: 1 of {PARTS} is, by "
            f"its hash. Add documents, some hundreds or more for scores to mean much, or cut long ones (see "
            f"docs/corpora.md)"
        )


def _require_lossless(config: Config, encoded: Encoded, id_bytes: NDArray[np.uint16], texts: Sequence[str]) -> None:
    expected = sum(len(text.encode()) for text in texts)
    found = int(id_bytes[encoded.tokens].sum(dtype=np.int64))
    if found != expected:
        raise CorpusError(f"tokenizer={config.tokenizer} spells {expected} bytes of text as {found}; it loses some")


def topic_names_of(documents: Iterable[Document]) -> tuple[str, ...]:
    return tuple(sorted({document.topic for document in documents}))


def numbers_of(documents: Iterable[Document], topic_names: Sequence[str]) -> NDArray[np.int32]:
    """The place of each document's topic in `topic_names`."""
    number = {name: index for index, name in enumerate(topic_names)}
    return np.array([number[document.topic] for document in documents], dtype=np.int32)


def _is_whole(folder: Path) -> bool:
    try:
        return all(hash_file(folder / name) == digest for name, digest in read_sidecar(folder).files.items())
    except (OSError, ValidationError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:  # the lock ends with the process, however it ends
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
