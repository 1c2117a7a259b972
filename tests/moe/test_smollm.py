"""The SmolLM recipe: streamed over HTTP from a local hub with a data set of the same layout; its tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from moe import smollm, tokenizer
from moe.config import Config, ConfigError, apply
from moe.corpus import load_corpus, split_documents
from moe.data import prepare
from moe.fingerprint import fingerprint
from moe.presets import PRESETS
from moe.texts import CorpusError, Document, hash_file

NANO = PRESETS["nano"]
SMOLLM = {"tokenizer": "smollm", "vocab_size": 320}
RECIPE = apply(NANO, {"corpus": "smollm", "corpus_documents": 150})
FORMATS = ("story", "textbook")
TEXTS = [f"Tale {number}.\nIn {number * 37} a fox met {number % 9 + 2} öxen. <|endoftext|>" for number in range(200)]
DOCUMENTS = [Document(text + "\0", FORMATS[number % 2]) for number, text in enumerate(TEXTS)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """What the hub stores: two Parquet files of Cosmopedia's columns, behind the card's configuration."""
    folder = tmp_path / "hub"
    (folder / smollm.SUBSET).mkdir(parents=True)
    for shard in range(2):
        part = DOCUMENTS[shard * 100 : shard * 100 + 100]
        columns: dict[str, list[Any]] = {
            "prompt": ["Write a tale."] * 100,
            "text": [text.removesuffix("\0") for text, _ in part],
            "token_length": [30] * 100,
            "audience": ["general"] * 100,
            "format": [topic for _, topic in part],
            "seed_data": ["web"] * 100,
        }
        pyarrow.parquet.write_table(pa.table(columns), folder / smollm.SUBSET / f"train-{shard:05}-of-00002.parquet")

    card = "configs:\n- config_name: cosmopedia-v2\n  data_files:\n  - split: train\n    path: cosmopedia-v2/train-*\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return folder


@pytest.fixture
def local(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, opened from the disk: the library's streaming without its download."""
    monkeypatch.setattr(smollm, "DATASET", str(dataset))
    return dataset


@dataclass
class Hub:
    """A local hub with one data set. It answers as far as its client asks, and notes the paths."""

    folder: Path
    broken: str = ""  # the file whose download fails
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, bytes]:
        self.asked.append(path)
        if path == f"/{smollm.MODEL}/resolve/{smollm.MODEL_REVISION}/tokenizer.json":
            return 200, b"another tokenizer"

        kind, _, rest = path.partition(smollm.DATASET + "/")
        what, _, rest = rest.partition("/")
        file = self.folder / rest.partition("/")[2]
        if what == "resolve" and file.is_file():
            return (500, b"") if file.name == self.broken else (200, file.read_bytes())

        if kind == "/api/datasets/" and what == "tree" and file.is_dir():
            return 200, json.dumps([self._describe(item) for item in sorted(file.iterdir())]).encode()

        if kind == "/api/datasets/" and what == "revision":
            files = [item for item in self.folder.rglob("*") if item.is_file()]
            siblings = [{"rfilename": item.relative_to(self.folder).as_posix()} for item in files]
            return 200, json.dumps({"id": smollm.DATASET, "sha": smollm.REVISION, "siblings": siblings}).encode()

        return 404, b""

    def _describe(self, item: Path) -> dict[str, Any]:
        name = item.relative_to(self.folder).as_posix()
        identity = {"path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
        return identity | {"type": "directory" if item.is_dir() else "file", "size": item.stat().st_size}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def do_GET(self) -> None:
        status, content = self.hub.answer(self.path.partition("?")[0])
        whole = len(content)
        if status == 404:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        elif asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last or whole) + 1]
            self.send_response(206 if status == 200 else status)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{whole}")
        else:
            self.send_response(status)

        self.send_header("ETag", f'"{hashlib.sha1(self.path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", smollm.REVISION)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(dataset: Path) -> Iterator[Hub]:
    """The data set behind HTTP."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    served = Hub(dataset, url=f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": served})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def prepare_from(hub: Hub, config: Config, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Prepares in a process of its own, since the client reads the hub's address when it is imported."""
    code = (
        "import sys; from pathlib import Path; from moe.config import Config; from moe.data import prepare\n"
        "print(prepare(Config.model_validate_json(sys.argv[1]), Path(sys.argv[2])).corpus_sha256)"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, config.model_dump_json(), str(tmp_path / "data")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_the_recipe_comes_from_its_revision_on_the_hub_as_far_as_it_is_needed(hub: Hub, tmp_path: Path) -> None:
    hub.broken = "train-00001-of-00002.parquet"  # more than is needed, so never opened
    done = prepare_from(hub, apply(RECIPE, {"corpus_documents": 100}), tmp_path)
    digest = hashlib.sha256("".join(f"{topic}\0{text}" for text, topic in DOCUMENTS[:100]).encode()).hexdigest()
    assert (done.stdout, done.returncode) == (digest + "\n", 0), done.stderr
    assert f"/datasets/{smollm.DATASET}/resolve/{smollm.REVISION}/README.md" in hub.asked
    assert not any(path.endswith(hub.broken) for path in hub.asked)


def test_a_tokenizer_from_the_hub_is_checked(hub: Hub, tmp_path: Path) -> None:
    done = prepare_from(hub, apply(RECIPE, SMOLLM | {"corpus_documents": 100}), tmp_path)
    digest = hashlib.sha256(b"another tokenizer").hexdigest()
    assert done.returncode == 1
    assert f"tokenizer.json has SHA-256 {digest}, the tokenizer of SmolLM-135M has 9ca9acdd" in done.stderr


def test_the_recipe_is_split_and_known_by_its_number_of_documents(local: Path, tmp_path: Path) -> None:
    assert load_corpus(RECIPE, tmp_path).documents == DOCUMENTS[:150]
    data = prepare(RECIPE, tmp_path)
    assert data.topic_names == FORMATS
    parts = split_documents(DOCUMENTS[:150])
    assert {split: len(starts) for split, starts in data.starts.items()} == {
        split: len(parts[split]) for split in parts
    }
    assert data.corpus_sha256 == load_corpus(RECIPE, tmp_path).sha256

    longer = apply(RECIPE, {"corpus_documents": 160})
    assert fingerprint("train", longer, "cpu") != fingerprint("train", RECIPE, "cpu")
    assert load_corpus(longer, tmp_path).sha256 != data.corpus_sha256
    (local / "README.md").unlink()
    assert prepare(RECIPE, tmp_path).tokens_sha256 == data.tokens_sha256  # the source is read once


def test_what_cannot_be_streamed_is_said(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match="has 200 documents, fewer than corpus_documents=201"):
        prepare(apply(RECIPE, {"corpus_documents": 201}), tmp_path)

    with pytest.raises(ConfigError, match="say with corpus_documents how much of it"):
        apply(RECIPE, {"corpus_documents": None})

    monkeypatch.setattr(smollm, "DATASET", str(local / "nowhere"))
    with pytest.raises(CorpusError, match="broke off after 0 documents"):
        prepare(RECIPE, tmp_path)


@pytest.fixture
def tokenizer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tokenizer.json built like SmolLM's: special tokens first, single digits, then bytes."""
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    small.train_from_iterator(TEXTS, trainer)
    path = tmp_path / "tokenizers" / "smollm.json"
    path.parent.mkdir()
    small.save(str(path))
    monkeypatch.setattr(tokenizer, "TOKENIZER_SHA256", hash_file(path))
    return path


def test_its_tokenizer_spells_every_byte(tokenizer_file: Path, local: Path, tmp_path: Path) -> None:
    data = prepare(apply(RECIPE, SMOLLM), tmp_path)
    for split, part in split_documents(DOCUMENTS[:150]).items():
        ids = data.tokens[split]
        assert (ids == 0).sum() == len(part)  # what only looks like an end, in the text, is none
        sizes = np.add.reduceat(data.id_bytes[ids].astype(int), data.starts[split])
        assert sizes.tolist() == [len(document.text.encode()) for document in part]


def test_another_tokenizer_is_refused(tokenizer_file: Path, local: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"tokenizer=smollm has \d+ ids, more than vocab_size=256"):
        prepare(apply(RECIPE, SMOLLM | {"vocab_size": 256}), tmp_path)

    tokenizer_file.write_text(tokenizer_file.read_text() + "\n")
    with pytest.raises(CorpusError, match=r"has SHA-256 .*, the tokenizer of SmolLM-135M has"):
        prepare(apply(RECIPE, SMOLLM), tmp_path)


def test_a_tokenizer_that_loses_bytes_is_refused(
    tokenizer_file: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(tokenizer_file.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "fox"}, "content": ""}
    tokenizer_file.write_text(json.dumps(content))
    monkeypatch.setattr(tokenizer, "TOKENIZER_SHA256", hash_file(tokenizer_file))
    with pytest.raises(CorpusError, match="it loses some"):
        prepare(apply(RECIPE, SMOLLM), tmp_path)
