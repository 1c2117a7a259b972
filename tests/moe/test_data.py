"""The packaged text: split by document, tokenized without loss, read in an order of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe import corpus
from moe.config import Config, apply
from moe.corpus import hash_sentences, load_corpus, overlap, split_documents, split_of
from moe.data import Data, batch, prepare, windows
from moe.presets import PRESETS
from moe.texts import CorpusError, Document

NANO = PRESETS["nano"]
BPE = apply(NANO, {"tokenizer": "bpe", "vocab_size": 512})


@pytest.fixture(scope="module")
def documents(data_dir: Path) -> list[Document]:
    return load_corpus(NANO, data_dir).documents


@pytest.fixture(scope="module")
def data(data_dir: Path) -> Data:
    return prepare(NANO, data_dir)


def test_split_is_by_document_and_repeats(documents: list[Document]) -> None:
    parts = split_documents(documents)
    sizes = {split: len(part) for split, part in parts.items()}
    assert sizes == {"train": 9016, "val": 522, "test": 495}
    assert all(split_of(document.text) == split for split, part in parts.items() for document in part[:5])
    assert not set(parts["train"]) & (set(parts["val"]) | set(parts["test"]))


def test_hardly_any_held_out_sentence_is_in_train(documents: list[Document], data: Data) -> None:
    parts = {split: [text for text, _ in part] for split, part in split_documents(documents).items()}
    hashes = {split: hash_sentences(texts) for split, texts in parts.items()}
    assert 0 < data.train_overlap["val"] < 0.002
    assert data.train_overlap == {split: overlap(hashes[split], hashes["train"]) for split in parts}
    fresh = hash_sentences(["A sentence that is long enough. Another one, also long enough."])
    assert len(fresh) == 2
    assert overlap(fresh, hashes["train"]) == 0.0
    assert overlap(hash_sentences([parts["train"][0].upper(), parts["val"][0]]), hashes["train"]) > 0.2


@pytest.mark.parametrize("config", [NANO, BPE], ids=["byte", "bpe"])
def test_ids_stand_for_exactly_the_bytes_of_the_text(config: Config, data_dir: Path, documents: list[Document]) -> None:
    prepared = prepare(config, data_dir)
    text = "".join(text for text, _ in split_documents(documents)["val"]).encode()
    lengths = prepared.id_bytes[prepared.tokens["val"]].astype(int)
    assert lengths.sum() == len(text)
    assert lengths.min() >= 1
    # Not only in total: each document ends where its id 0 says, so the counts are right along the way.
    ends = np.flatnonzero(prepared.tokens["val"] == 0)
    assert [text[total - 1] for total in lengths.cumsum()[ends]] == [0] * 522


@pytest.mark.parametrize("config", [NANO, BPE], ids=["byte", "bpe"])
def test_each_document_has_its_place_and_topic(config: Config, data_dir: Path, documents: list[Document]) -> None:
    prepared = prepare(config, data_dir)
    assert len(prepared.topic_names) == 12
    assert prepared.topic_names[:2] == ("Arts", "Biology and health sciences")
    for split, part in split_documents(documents).items():
        tokens, starts = prepared.tokens[split], prepared.starts[split]
        assert starts[0] == 0
        assert (tokens[starts[1:] - 1] == 0).all()  # the document before ends there
        sizes = np.add.reduceat(prepared.id_bytes[tokens].astype(int), starts)
        assert sizes.tolist() == [len(document.text.encode()) for document in part]
        assert [prepared.topic_names[topic] for topic in prepared.topics[split]] == [topic for _, topic in part]


def test_another_text_than_expected_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CORPUS_SHA256", {"wikipedia": "0" * 64})
    with pytest.raises(CorpusError, match=r"has SHA-256 05ed445d.*, expected 0000"):
        load_corpus(NANO, tmp_path)


def test_batches_are_a_function_of_seed_and_number(data: Data) -> None:
    tokens = data.tokens["train"]
    torch.manual_seed(1)
    first = batch(tokens, NANO, seed=3, first=56, size=8)
    torch.manual_seed(2)
    again = batch(tokens, NANO, seed=3, first=56, size=8)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])
    assert first[0].shape == (8, 64)
    assert not torch.equal(first[0], batch(tokens, NANO, seed=3, first=64, size=8)[0])
    assert not torch.equal(first[0], batch(tokens, NANO, seed=4, first=56, size=8)[0])


def test_treatments_read_the_same_sequences_in_the_same_order(data: Data) -> None:
    tokens = data.tokens["train"]
    small = torch.cat([batch(tokens, NANO, seed=0, first=first, size=8)[0] for first in (0, 8, 16, 24)])
    large = torch.cat(
        [batch(tokens, apply(NANO, {"batch_size": 16}), seed=0, first=first, size=16)[0] for first in (0, 16)]
    )
    assert torch.equal(small, large)
    other_model = apply(NANO, {"num_experts": 8, "d_model": 64, "micro_batch_size": 2})
    assert torch.equal(small[:8], batch(tokens, other_model, seed=0, first=0, size=8)[0])


@pytest.mark.parametrize(
    ("n_targets", "seq_len", "rows"), [(1000, 64, 4), (1024, 64, 3), (10, 64, 4), (10**9, 500, 64)]
)
def test_windows_predict_each_token_once(data: Data, n_targets: int, seq_len: int, rows: int) -> None:
    tokens = data.tokens["val"]
    pairs = list(windows(tokens, n_targets, seq_len, rows))
    n_expected = min(n_targets, len(tokens) - 1)
    inputs, targets = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    assert targets.tolist() == tokens[1 : n_expected + 1].tolist()
    assert inputs.tolist() == tokens[:n_expected].tolist()
