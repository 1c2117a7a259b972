"""Tokenized text on disk, and the batches that a seed draws from it.

The corpus is tokenized once into a folder of `data_dir` named by everything that decides its content. Folders appear
whole, by a rename under a file lock, so any number of processes may prepare at once; a torn or altered file no longer
matches its sidecar and is rebuilt.

    data = prepare(config, Path("data"))
    tokens_BT, targets_BT = batch(data.tokens["train"], config, seed=0, first=56, size=8)

A batch is a function of the seed and of its sequences' numbers alone. Sequences are numbered through a run, whatever
the batch size, so every treatment with the same seq_len reads the same sequences in the same order.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.config import Config
from moe.corpus import END, PARTS, SPLITS, load_documents, overlap, split_documents
from moe.fingerprint import CORPUS_SHA256
from moe.rundir import Split, sync_folder, write_json
from moe.tokenizer import Tokens, bytes_of_ids, encode_bpe, encode_bytes, train_bpe

FORMAT = 2
"""Raised whenever prepare() would write other bytes for the same config."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tokens of each split and where its documents are.

    starts: the index of each document's first token, ascending. topics: the number of its topic in topic_names.
    id_bytes: the bytes of text behind each id. train_overlap: the part of a split's sentences found in train.
    """

    tokens: dict[Split, Tokens]
    starts: dict[Split, NDArray[np.int64]]
    topics: dict[Split, NDArray[np.int32]]
    topic_names: tuple[str, ...]
    id_bytes: NDArray[np.uint16]
    train_overlap: dict[Split, float]


def prepare(config: Config, data_dir: Path) -> Data:
    """Open the tokenized corpus, making it first if it is missing or damaged."""
    folder = data_dir / _folder_name(config)
    if not _is_whole(folder):
        data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(data_dir / f"{folder.name}.lock"):
            if not _is_whole(folder):
                _build(config, folder)

    sidecar = json.loads((folder / "sidecar.json").read_text())
    return Data(
        tokens={split: np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r") for split in SPLITS},
        starts={split: np.fromfile(folder / f"{split}_starts.bin", dtype=np.int64) for split in SPLITS},
        topics={split: np.fromfile(folder / f"{split}_topics.bin", dtype=np.int32) for split in SPLITS},
        topic_names=tuple(sidecar["topic_names"]),
        id_bytes=np.fromfile(folder / "id_bytes.bin", dtype=np.uint16),
        train_overlap={split: sidecar["train_overlap"][split] for split in SPLITS},
    )


def batch(tokens: Tokens, config: Config, *, seed: int, first: int, size: int) -> tuple[Tensor, Tensor]:
    """The `size` sequences of a run that come after `first` of them, and their next tokens, each [size, seq_len]."""
    starts = len(tokens) - config.seq_len
    rows = []
    for number in range(first, first + size):
        draw = int(np.random.Philox(key=seed, counter=number).random_raw())
        start = draw * starts >> 64
        rows.append(tokens[start : start + config.seq_len + 1])

    sequences = torch.from_numpy(np.stack(rows).astype(np.int64))
    return sequences[:, :-1], sequences[:, 1:]


def windows(tokens: Tokens, n_targets: int, seq_len: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `n_targets` next tokens, each exactly once, in windows of at most `seq_len`: a last one is shorter."""
    n_targets = min(n_targets, len(tokens) - 1)
    n_whole = n_targets // seq_len
    for first in range(0, n_whole, batch_size):
        rows = min(batch_size, n_whole - first)
        yield _window(tokens, first * seq_len, rows, seq_len)

    if n_targets % seq_len:
        yield _window(tokens, n_whole * seq_len, 1, n_targets % seq_len)


def _window(tokens: Tokens, start: int, rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
    part = torch.from_numpy(tokens[start : start + rows * seq_len + 1].astype(np.int64))
    return part[:-1].view(rows, seq_len), part[1:].view(rows, seq_len)


def _folder_name(config: Config) -> str:
    identity = [FORMAT, CORPUS_SHA256[config.corpus], END, PARTS, config.tokenizer, config.vocab_size]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return f"{config.corpus}-{config.tokenizer}-{config.vocab_size}-{digest}"


def _build(config: Config, folder: Path) -> None:
    parts = split_documents(load_documents(config.corpus))
    temporary = folder.with_name(f".{folder.name}.tmp")  # one builder at a time: we hold the lock
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()

    texts = {split: [document.text for document in parts[split]] for split in SPLITS}
    topic_names = sorted({document.topic for split in SPLITS for document in parts[split]})
    number = {name: index for index, name in enumerate(topic_names)}
    bpe = train_bpe(texts["train"], config.vocab_size) if config.tokenizer == "bpe" else None
    files: dict[str, NDArray[np.generic]] = {"id_bytes.bin": bytes_of_ids(bpe, config.vocab_size)}
    for split in SPLITS:
        encoded = encode_bytes(texts[split]) if bpe is None else encode_bpe(bpe, texts[split])
        files[f"{split}.bin"], files[f"{split}_starts.bin"] = encoded
        files[f"{split}_topics.bin"] = np.array([number[document.topic] for document in parts[split]], dtype=np.int32)

    for name, content in files.items():
        with (temporary / name).open("wb") as file:
            content.tofile(file)
            os.fsync(file.fileno())

    if bpe is not None:
        bpe.save(str(temporary / "tokenizer.json"))

    write_json(
        temporary / "sidecar.json",
        {
            "files": {name: _digest(temporary / name) for name in files},
            "topic_names": topic_names,
            "train_overlap": {split: overlap(texts[split], texts["train"]) for split in SPLITS},
            "documents": {split: len(parts[split]) for split in SPLITS},
        },
    )
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder.parent)


def _is_whole(folder: Path) -> bool:
    try:
        sidecar = json.loads((folder / "sidecar.json").read_text())
        return all(_digest(folder / name) == digest for name, digest in sidecar["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:  # the lock ends with the process, however it ends
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
