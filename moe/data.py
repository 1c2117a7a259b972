"""Tokenized text, and the batches that a seed draws from it.

    data = prepare(config, Path("data"))
    tokens_BT, targets_BT = batch(data.tokens["train"], config, seed=0, first=56, size=8)

A batch is a function of the seed and of its sequences' numbers alone. Sequences are numbered through a run, whatever
the batch size, so every treatment with the same seq_len reads the same sequences in the same order.

B sequences, T positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.config import Config
from moe.corpus import SPLITS, hash_sentences, overlap
from moe.prepared import numbers_of, prepared_folder, read_sidecar, topic_names_of
from moe.rundir import Split
from moe.texts import BENCHMARKS, CorpusError, hash_set, known_sets, read_set
from moe.tokenizer import Tokens, encode, open_tokenizer


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tokens of each split and where its documents are.

    starts: the index of each document's first token, ascending. topics: the number of its topic in topic_names.
    id_bytes: the bytes of text behind each id. train_overlap: the part of a split's sentences found in train.
    corpus_sha256: of the source text. tokens_sha256: of all that training and scoring read of it.
    """

    tokens: dict[Split, Tokens]
    starts: dict[Split, NDArray[np.int64]]
    topics: dict[Split, NDArray[np.int32]]
    topic_names: tuple[str, ...]
    id_bytes: NDArray[np.uint16]
    train_overlap: dict[Split, float]
    corpus_sha256: str
    tokens_sha256: str


def prepare(config: Config, data_dir: Path) -> Data:
    """Open the tokenized corpus, making it first if it is missing or damaged.

    Raises:
        CorpusError: the text cannot be had, is not what the corpus is pinned to, or is too little to train and score.
    """
    folder = prepared_folder(config, data_dir)
    sidecar = read_sidecar(folder)
    data = Data(
        tokens={split: np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r") for split in SPLITS},
        starts={split: np.fromfile(folder / f"{split}_starts.bin", dtype=np.int64) for split in SPLITS},
        topics={split: np.fromfile(folder / f"{split}_topics.bin", dtype=np.int32) for split in SPLITS},
        topic_names=sidecar.topic_names,
        id_bytes=np.fromfile(folder / "id_bytes.bin", dtype=np.uint16),
        train_overlap=sidecar.train_overlap,
        corpus_sha256=sidecar.corpus_sha256,
        tokens_sha256=hashlib.sha256(json.dumps(sidecar.files, sort_keys=True).encode()).hexdigest(),
    )
    if len(data.tokens["train"]) <= config.seq_len:
        raise CorpusError(
            f"{config.corpus} has {len(data.tokens['train'])} tokens to train on, which is no more than "
            f"seq_len={config.seq_len}; add text"
        )

    return data


def benchmarks(config: Config, data_dir: Path) -> dict[str, Data]:
    """The text sets in data_dir/benchmarks by name, in the tokens of `config`, each as the test split of a Data.

    They are no part of the corpus: no run trains on them, unless the corpus itself says the same. train_overlap tells
    how much of them it does say.

    Raises:
        CorpusError: as read_set(), or as prepare().
    """
    names = known_sets(data_dir / BENCHMARKS)
    if not names:
        return {}

    folder = prepared_folder(config, data_dir)
    tokenizer = None if config.tokenizer == "byte" else open_tokenizer(folder / "tokenizer.json")
    id_bytes = np.fromfile(folder / "id_bytes.bin", dtype=np.uint16)
    sentences = np.fromfile(folder / "train_sentences.bin", dtype=np.uint64)
    found = {}
    for name in names:
        documents = list(read_set(data_dir / BENCHMARKS, name))
        texts = [document.text for document in documents]
        encoded = encode(tokenizer, texts)
        topic_names = topic_names_of(documents)
        found[name] = Data(
            tokens={"test": encoded.tokens},
            starts={"test": encoded.starts},
            topics={"test": numbers_of(documents, topic_names)},
            topic_names=topic_names,
            id_bytes=id_bytes,
            train_overlap={"test": overlap(hash_sentences(texts), sentences)},
            corpus_sha256=hash_set(data_dir / BENCHMARKS, name),
            tokens_sha256=hashlib.sha256(encoded.tokens.tobytes()).hexdigest(),
        )

    return found


def batch(tokens: Tokens, config: Config, *, seed: int, first: int, size: int) -> tuple[Tensor, Tensor]:
    """The `size` sequences of a run that come after `first` of them, and their next tokens, each [size, seq_len]."""
    draws = np.random.Philox(key=seed, counter=first).random_raw(4 * size)[::4]  # Philox makes four numbers a count
    starts = [draw * (len(tokens) - config.seq_len) >> 64 for draw in draws.tolist()]
    plain = np.asarray(tokens)  # slices of a memmap take three times as long
    rows = [plain[start : start + config.seq_len + 1] for start in starts]
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
