"""The text: split by document, tokenized without loss, prepared once whatever happens, read in an order of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moe import corpus
from moe.config import Config, apply
from moe.corpus import CorpusError, Document, load_documents, overlap, split_documents, split_of
from moe.data import Data, batch, prepare, windows
from moe.presets import PRESETS

NANO = PRESETS["nano"]
BPE = apply(NANO, {"tokenizer": "bpe", "vocab_size": 512})


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return load_documents("wikipedia")


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
    assert 0 < data.train_overlap["val"] < 0.002
    assert data.train_overlap == {split: overlap(part, parts["train"]) for split, part in parts.items()}
    assert overlap(["A sentence that is long enough. Another one, also long enough."], parts["train"]) == 0.0
    assert overlap([parts["train"][0], parts["val"][0]], parts["train"]) > 0.2


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


def test_another_text_than_expected_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CORPUS_SHA256", {"wikipedia": "0" * 64})
    with pytest.raises(CorpusError, match=r"has SHA-256 05ed445d.*, expected 0000"):
        load_documents("wikipedia")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "sidecar cut"])
def test_a_damaged_file_is_noticed_and_rebuilt(damage: str, tmp_path: Path, data: Data) -> None:
    prepare(NANO, tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    target = folder / ("sidecar.json" if damage == "sidecar cut" else "val.bin")
    content = target.read_bytes()
    if damage == "missing":
        target.unlink()
    else:
        target.write_bytes(
            bytes([content[0] ^ 1]) + content[1:] if damage == "flipped" else content[: len(content) // 2]
        )

    again = prepare(NANO, tmp_path)
    assert all(np.array_equal(again.tokens[split], data.tokens[split]) for split in again.tokens)
    assert target.read_bytes() == content


def test_two_processes_prepare_at_once_where_a_third_was_killed(tmp_path: Path, data_dir: Path, data: Data) -> None:
    (done,) = (path for path in data_dir.glob("wikipedia-byte-*") if path.is_dir())
    half_made = tmp_path / "data" / f".{done.name}.tmp"
    half_made.mkdir(parents=True)
    (half_made / "val.bin").write_bytes(b"torn")
    code = (
        "import sys; from pathlib import Path; from moe.presets import PRESETS; from moe.data import prepare\n"
        "print(prepare(PRESETS['nano'], Path(sys.argv[1])).tokens['train'].astype(int).sum())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sums == [f"{data.tokens['train'].astype(int).sum()}\n"] * 2
    assert {path.name for path in (tmp_path / "data").iterdir()} == {done.name, f"{done.name}.lock"}


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
