"""The user's own text: in any form, pinned to its content, prepared once whatever happens; benchmark sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from moe.config import KNOBS, ConfigError, apply
from moe.corpus import split_documents
from moe.data import Data, benchmarks, prepare
from moe.fingerprint import fingerprint, pin
from moe.presets import PRESETS
from moe.rundir import Request, Split
from moe.texts import BLOCK, CorpusError, Document, hash_set, read_set
from moe.train import Trainer

NANO = PRESETS["nano"]
OWN = apply(NANO, {"corpus": "mine"})
BPE = {"tokenizer": "bpe", "vocab_size": 300}

RECORDS = [
    {"text": f"Tale {number}.\nIn the year {number * 37} a fox met {number % 9 + 2} öxen.", "topic": "ab"[number % 2]}
    for number in range(200)
]
DOCUMENTS = [Document(record["text"] + "\0", record["topic"]) for record in RECORDS]


def write_jsonl(path: Path, records: Iterable[object] = RECORDS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, **columns: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)


def write_folder(folder: Path) -> None:
    for number, (text, topic) in enumerate(DOCUMENTS):
        path = folder / topic / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.removesuffix("\0"))


def write_forms(folder: Path) -> None:
    write_jsonl(folder / "lines.jsonl")
    write_parquet(folder / "table.parquet", text=(r["text"] for r in RECORDS), topic=(r["topic"] for r in RECORDS))
    write_folder(folder / "files")
    write_jsonl(folder / "parts" / "1.jsonl", RECORDS[:90])
    write_parquet(folder / "parts" / "2.parquet", text=[r["text"] for r in RECORDS[90:]], topic=["a", "b"] * 55)


def sizes_of(data: Data, split: Split) -> list[int]:
    """Bytes of text that each document's ids stand for."""
    sizes: list[int] = np.add.reduceat(data.id_bytes[data.tokens[split]].astype(int), data.starts[split]).tolist()
    return sizes


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A data folder with the text set `mine`."""
    write_jsonl(tmp_path / "texts" / "mine.jsonl")
    return tmp_path


@pytest.mark.parametrize("name", ["lines", "table", "files", "parts"])
def test_every_form_says_the_same(name: str, tmp_path: Path) -> None:
    write_forms(tmp_path)
    expected = sorted(DOCUMENTS, key=lambda document: document.topic) if name == "files" else DOCUMENTS
    assert list(read_set(tmp_path, name)) == expected


def test_topics_may_be_left_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "deep" / "er" / "a.jsonl", [{"text": "one"}, {"text": "two", "topic": "own"}])
    write_parquet(tmp_path / "set" / "b.parquet", text=["three"])
    assert list(read_set(tmp_path, "set")) == [
        Document("three\0", "text"),
        Document("one\0", "deep/er"),
        Document("two\0", "own"),
    ]


def test_one_large_file_is_cut_between_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * (number % 90) + "\n\n" for number in range(400)]
    book = "".join(paragraphs) + "The end\r\n\r\n"
    (tmp_path / "book.txt").write_bytes(book.encode())
    texts = [document.text.removesuffix("\0") for document in read_set(tmp_path, "book")]
    assert "".join(texts) == book
    assert all(text.endswith("\n\n") for text in texts[:-1])
    assert all(BLOCK <= len(text) < BLOCK + max(map(len, paragraphs)) for text in texts[:-1])
    assert texts[0].count("Paragraph") > 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt, line 2 is not UTF-8 \(byte 0xff\)"),
        ("a.txt", b"one\n\0two", r"a\.txt, line 1 has a NUL character"),
        ("a.txt", b" \n", r"a\.txt has no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', r"a\.jsonl, line 3 is not UTF-8"),
        ("a.jsonl", b'{"body": "x"}\n', r'a\.jsonl, line 1 has no "text" that is a string \(it has body\)'),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'{"text": null}\n', r'a\.jsonl, line 1 has no "text"'),
        ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl, line 1 has no text in it"),
        ("a.jsonl", b'{"text": "x", "topic": 3}\n', r'a\.jsonl, line 1 has a "topic" that is no string'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1 has half a character"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1 is not an object"),
        ("a.jsonl", b"\n", r"a\.jsonl is empty"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a whole Parquet file"),
        ("a/b.pdf", b"%PDF", r"b\.pdf is none of \.txt, \.jsonl, \.parquet"),
        ("a/.hidden.txt", b"x", r"a has no text in it"),
        ("b.txt", b"x", r"there is no text set 'a' in .* \(known: b\); put a\.txt"),
    ],
)
def test_what_is_not_text_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(read_set(tmp_path, "a"))


def test_a_parquet_file_without_text_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "body.parquet", body=["x"])
    with pytest.raises(CorpusError, match=r"body\.parquet has no column text; it has body"):
        list(read_set(tmp_path, "body"))

    write_parquet(tmp_path / "gap.parquet", text=["x", None])
    with pytest.raises(CorpusError, match=r'gap\.parquet, row 2 has no "text"'):
        list(read_set(tmp_path, "gap"))

    write_parquet(tmp_path / "page.parquet", text=["All of it is text."] * 1000)
    whole = (tmp_path / "page.parquet").read_bytes()
    (tmp_path / "page.parquet").write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    with pytest.raises(CorpusError, match=r"page\.parquet is not a whole Parquet file"):
        list(read_set(tmp_path, "page"))

    write_parquet(tmp_path / "none.parquet", text=pa.array([], pa.string()))
    with pytest.raises(CorpusError, match=r"none\.parquet is empty"):
        list(read_set(tmp_path, "none"))


def test_links_are_followed_or_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    link = folder / "a.txt"
    link.symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(CorpusError, match=r"a\.txt cannot be read: No such file"):
        hash_set(tmp_path, "set")

    (tmp_path / "elsewhere.txt").write_text("Text from elsewhere.")
    assert len(hash_set(tmp_path, "set")) == 64
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(CorpusError, match=r"more is none of \.txt"):
        hash_set(tmp_path, "set")


def test_one_name_is_one_set(tmp_path: Path) -> None:
    write_forms(tmp_path)
    write_jsonl(tmp_path / "files.jsonl")
    with pytest.raises(CorpusError, match=r"files and .*files\.jsonl have the same name"):
        hash_set(tmp_path, "files")


@pytest.mark.parametrize("tokens", [{}, BPE], ids=["byte", "bpe"])
def test_own_text_is_split_and_tokenized_like_any(tokens: dict[str, str | int], own: Path) -> None:
    data = prepare(apply(OWN, tokens), own)
    assert data.topic_names == ("a", "b")
    assert data.corpus_sha256 == hash_set(own / "texts", "mine")
    for split, part in split_documents(DOCUMENTS).items():
        assert part
        assert sizes_of(data, split) == [len(document.text.encode()) for document in part]
        assert [data.topic_names[topic] for topic in data.topics[split]] == [topic for _, topic in part]


def test_another_corpus_is_another_loss(own: Path) -> None:
    write_jsonl(own / "texts" / "yours.jsonl", ({"text": record["text"].upper()} for record in RECORDS))
    losses = []
    for name in ("mine", "yours"):
        request = Request(kind="train", config=apply(NANO, {"corpus": name}), seed=0, device="cpu", data_dir=own)
        trainer = Trainer(request, prepare(request.config, own), torch.device("cpu"))
        losses.append(trainer.optimizer_step(1e-3)["train_loss"])

    assert KNOBS["corpus"].acts_on == "loss"
    assert losses[0] != losses[1]


def test_only_the_first_documents_are_used(own: Path) -> None:
    part = split_documents(DOCUMENTS[:150])
    data = prepare(apply(OWN, {"corpus_documents": 150}), own)
    assert {split: len(starts) for split, starts in data.starts.items()} == {s: len(part[s]) for s in part}
    with pytest.raises(CorpusError, match="has 200 documents, fewer than corpus_documents=201"):
        prepare(apply(OWN, {"corpus_documents": 201}), own)


def test_too_little_text_says_what_to_do(tmp_path: Path) -> None:
    held_out = {split: part[0] for split, part in split_documents(DOCUMENTS).items()}
    write_jsonl(tmp_path / "texts" / "mine.jsonl", [{"text": held_out["train"].text.removesuffix("\0")}])
    with pytest.raises(CorpusError, match=r"has 1 documents, none of which is for val or test: .* Add documents"):
        prepare(OWN, tmp_path)

    write_jsonl(tmp_path / "texts" / "mine.jsonl", [{"text": one.text.removesuffix("\0")} for one in held_out.values()])
    with pytest.raises(CorpusError, match=r"has \d+ tokens to train on, which is no more than seq_len=64; add text"):
        prepare(OWN, tmp_path)


def test_a_name_is_pinned_to_its_content(own: Path) -> None:
    pinned = pin(OWN, own)
    assert pinned.corpus == f"mine@{hash_set(own / 'texts', 'mine')[:16]}"
    assert pin(pinned, own) == pinned
    assert pin(NANO, own) == NANO

    identity = fingerprint("train", pinned, "cpu")
    (own / "texts" / "mine.jsonl").rename(own / "texts" / "same.jsonl")
    write_jsonl(own / "texts" / "mine.jsonl", RECORDS[1:])
    assert fingerprint("train", pin(OWN, own), "cpu") != identity
    assert pin(apply(OWN, {"corpus": "same"}), own).corpus.split("@")[1] == pinned.corpus.split("@")[1]
    with pytest.raises(CorpusError, match="can change behind its name"):
        fingerprint("train", OWN, "cpu")


def test_a_text_that_changed_since_is_refused_unless_it_was_prepared(own: Path) -> None:
    early, late = pin(OWN, own), pin(apply(OWN, BPE), own)
    before = prepare(early, own)
    path = own / "texts" / "mine.jsonl"
    state = path.stat()
    path.write_bytes(path.read_bytes().replace(b"fox", b"cat"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # as large as before, edited the moment after
    with pytest.raises(CorpusError, match=r"'mine' in .* has changed: it was [0-9a-f]{16}, now it is [0-9a-f]{16}"):
        prepare(late, own)

    assert np.array_equal(prepare(early, own).tokens["val"], before.tokens["val"])
    assert prepare(OWN, own).tokens_sha256 != before.tokens_sha256
    path.unlink()
    assert prepare(early, own).tokens_sha256 == before.tokens_sha256


def test_an_unknown_corpus_is_refused_with_the_known_ones(own: Path) -> None:
    with pytest.raises(CorpusError, match=r"'yours' is not known\. Corpora: wikipedia, smollm\. Text sets .*: mine;"):
        prepare(apply(NANO, {"corpus": "yours"}), own)

    for name in ("../mine", "mine@12", ""):
        with pytest.raises(ConfigError, match="corpus="):
            apply(NANO, {"corpus": name})


@pytest.mark.parametrize("content", ["null", "[]", '{"files": {}}', '{"files": 3}'])
def test_a_sidecar_that_is_none_is_made_again(content: str, own: Path) -> None:
    before = prepare(OWN, own)
    (sidecar,) = own.glob("mine-*/sidecar.json")
    sidecar.write_text(content)
    assert prepare(OWN, own).tokens_sha256 == before.tokens_sha256


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, text in (("plain.txt", "Text."), ("lines.jsonl", '{"text": "Text."}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [document.text for document in read_set(tmp_path, Path(name).stem)] == ["Text.\0"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
@pytest.mark.parametrize("file", ["val.bin", "val_starts.bin", "train_sentences.bin", "tokenizer.json", "sidecar.json"])
def test_a_damaged_file_is_noticed_and_rebuilt(file: str, damage: str, own: Path) -> None:
    config = pin(apply(OWN, BPE), own)
    before = prepare(config, own)
    (target,) = own.glob(f"mine-*/{file}")
    content = target.read_bytes()
    if damage == "missing":
        target.unlink()
    else:
        target.write_bytes(
            bytes([content[0] ^ 1]) + content[1:] if damage == "flipped" else content[: len(content) // 2]
        )

    assert prepare(config, own).tokens_sha256 == before.tokens_sha256
    assert target.read_bytes() == content


def test_two_processes_prepare_at_once_where_a_third_was_killed(
    own: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_jsonl(elsewhere / "texts" / "mine.jsonl")
    expected = prepare(apply(OWN, BPE), elsewhere).tokens_sha256
    (done,) = elsewhere.glob("mine-*/")
    half_made = own / f".{done.name}.tmp"
    half_made.mkdir()
    (half_made / "val.bin").write_bytes(b"torn")
    code = (
        "import sys; from pathlib import Path; from moe.config import apply; from moe.presets import PRESETS\n"
        "from moe.data import prepare\n"
        "config = apply(PRESETS['nano'], {'corpus': 'mine', 'tokenizer': 'bpe', 'vocab_size': 300})\n"
        "print(prepare(config, Path(sys.argv[1])).tokens_sha256)"
    )
    command = [sys.executable, "-c", code, str(own)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [child.communicate(timeout=90)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert printed == [expected + "\n"] * 2
    assert {path.name for path in own.iterdir()} == {"texts", done.name, f"{done.name}.lock"}


@pytest.mark.parametrize("tokens", [{}, BPE], ids=["byte", "bpe"])
def test_benchmark_sets_are_read_in_the_tokens_of_the_model(tokens: dict[str, str | int], own: Path) -> None:
    config = apply(OWN, tokens)
    assert benchmarks(config, own) == {}

    trained_on = split_documents(DOCUMENTS)["train"][:3]
    fresh = "A sentence that nobody has ever written before. Here is another one of the same kind."
    write_jsonl(own / "benchmarks" / "seen.jsonl", [{"text": document.text[:-1]} for document in trained_on])
    (own / "benchmarks" / "fresh.txt").write_text(fresh)
    sets = benchmarks(config, own)
    assert list(sets) == ["fresh", "seen"]
    assert sizes_of(sets["fresh"], "test") == [len(fresh) + 1]
    assert sizes_of(sets["seen"], "test") == [len(document.text.encode()) for document in trained_on]
    ids = sets["seen"].tokens["test"]
    assert np.array_equal(ids, prepare(config, own).tokens["train"][: len(ids)])
    assert (sets["fresh"].train_overlap, sets["seen"].train_overlap) == ({"test": 0.0}, {"test": 1.0})
    assert sets["fresh"].corpus_sha256 == hash_set(own / "benchmarks", "fresh")
    assert sets["fresh"].topic_names == ("text",)
