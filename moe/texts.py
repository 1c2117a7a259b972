"""A user's own text: the documents of files in the lab, as plain text, JSON lines or Parquet. Torch-free.

A text set is a name: `FOLDER/NAME.txt`, `.jsonl` or `.parquet`, or a folder `FOLDER/NAME/` of such files.

- .jsonl: one object a line, with "text" and, if it has one, "topic"
- .parquet: the columns text and, if there is one, topic; needs pyarrow, the extra `parquet`
- .txt in a folder: one document
- .txt by itself: cut at the first blank line after each BLOCK characters, so that a book has parts to hold out

Where a document names no topic, it is that of the subfolder it lies in, otherwise NO_TOPIC. Nothing is skipped or
repaired: what is not text is an error that names file and line.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

END = "\0"
"""Ends every document. It counts as one byte of text, whatever the tokenizer."""

TEXTS = "texts"
"""The folder, in a lab's data folder, of the text sets that can be a corpus."""

BENCHMARKS = "benchmarks"
"""The folder of those that are scored beside the corpus's own held-out text."""

NO_TOPIC = "text"
MARK = "\ufeff"  # that some editors begin a file with
BLOCK = 2000  # characters, some 400 words: long enough to be a document, short enough to make many of one book
SUFFIXES = (".txt", ".jsonl", ".parquet")


class CorpusError(RuntimeError):
    """A text is not there, not the one that it should be, or not text. The message says what to do."""


class Document(NamedTuple):
    """One text, closed by END, and what it is about."""

    text: str
    topic: str


def known_sets(folder: Path) -> list[str]:
    """The names of the text sets in `folder`."""
    if not folder.is_dir():
        return []

    found = (path for path in folder.iterdir() if path.is_dir() or path.suffix in SUFFIXES)
    return sorted({path.stem for path in found if not path.name.startswith(".")})


def read_set(folder: Path, name: str) -> Iterator[Document]:
    """The documents of a text set, file by file in the order of their paths.

    Raises:
        CorpusError: there is no such set or more than one, or a file is not what its suffix says.
    """
    root = _root(folder, name)
    for path in _files(root):
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, _topic(path, root))
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, _topic(path, root))
        else:
            yield from _read_plain(path, _topic(path, root), whole=root.is_dir())


def hash_set(folder: Path, name: str) -> str:
    """SHA-256 over the contents of a text set's files and, in a folder, their relative paths.

    Raises:
        CorpusError: there is no such set or more than one, or a file cannot be read.
    """
    root = _root(folder, name)
    digest = hashlib.sha256()
    for path in _files(root):
        relative = path.relative_to(root).as_posix() if path != root else path.suffix
        try:
            state = path.stat()
            content = _hash_state(path, state.st_size, state.st_mtime_ns)
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}") from None

        digest.update(f"{relative}\0{content}\0".encode())

    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _hash_state(path: Path, size: int, modified: int) -> str:
    return hash_file(path)  # a server that is asked often reads a large text once


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _root(folder: Path, name: str) -> Path:
    candidates = [folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)]
    found = [path for path in candidates if path.exists()]
    if not found:
        known = ", ".join(known_sets(folder)) or "none yet"
        raise CorpusError(
            f"there is no text set {name!r} in {folder} (known: {known}); put {name}.txt, {name}.jsonl, "
            f"{name}.parquet or a folder {name}/ of such files there"
        )

    if len(found) > 1:
        raise CorpusError(f"{' and '.join(map(str, found))} have the same name; rename all but one")

    return found[0]


def _files(root: Path) -> list[Path]:
    if not root.is_dir():
        return [root]

    # A link to a folder, which rglob() does not enter, is in the way like any other file that is no text.
    below = (path.relative_to(root) for path in root.rglob("*") if path.is_symlink() or not path.is_dir())
    visible = sorted(path for path in below if not any(part.startswith(".") for part in path.parts))
    other = next((path for path in visible if path.suffix not in SUFFIXES), None)
    if other is not None:
        raise CorpusError(f"{root / other} is none of {', '.join(SUFFIXES)}; convert it or take it out of the folder")

    if not visible:
        raise CorpusError(f"{root} has no text in it; put files of {', '.join(SUFFIXES)} there")

    return [root / path for path in visible]


def _topic(path: Path, root: Path) -> str:
    return NO_TOPIC if path == root or path.parent == root else path.parent.relative_to(root).as_posix()


def _read_plain(path: Path, topic: str, *, whole: bool) -> Iterator[Document]:
    text = _decode(path, path.read_bytes(), line=1).removeprefix(MARK)
    if whole or not text.strip():
        yield check_document(text, topic, str(path))
        return

    start = 0
    for blank in re.finditer(r"\n(?:[ \t]*\r?\n)+", text):
        if blank.end() - start >= BLOCK and text[blank.end() :].strip():
            yield check_document(text[start : blank.end()], topic, _line(path, text.count("\n", 0, start) + 1))
            start = blank.end()

    yield check_document(text[start:], topic, _line(path, text.count("\n", 0, start) + 1))


def _read_jsonl(path: Path, topic: str) -> Iterator[Document]:
    empty = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue  # as JSON lines allows, mostly at the end

            where, empty = _line(path, number), False
            try:
                record = json.loads(_decode(path, raw, line=number).removeprefix(MARK))
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{where} is not JSON: {error}") from None

            if not isinstance(record, dict):
                raise CorpusError(f'{where} is not an object such as {{"text": "...", "topic": "..."}}')

            yield _record(record, topic, where)

    if empty:
        raise CorpusError(f"{path} is empty")


def _read_parquet(path: Path, topic: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise CorpusError(f"{path} needs pyarrow; pip install 'blueberry-lab[parquet]'") from None

    try:
        with ParquetFile(path) as file:
            columns = [name for name in ("text", "topic") if name in file.schema_arrow.names]
            if "text" not in columns:
                raise CorpusError(f"{path} has no column text; it has {', '.join(file.schema_arrow.names)}")

            if not file.metadata.num_rows:
                raise CorpusError(f"{path} is empty")

            records = (record for batch in file.iter_batches(columns=columns) for record in batch.to_pylist())
            for row, record in enumerate(records, start=1):
                yield _record(record, topic, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:  # of damaged pages it says OSError
        raise CorpusError(f"{path} is not a whole Parquet file: {error}") from None


def _record(record: dict[str, Any], topic: str, where: str) -> Document:
    text, own = record.get("text"), record.get("topic")
    if not isinstance(text, str):
        fields = ", ".join(record) or "nothing"
        raise CorpusError(f'{where} has no "text" that is a string (it has {fields}); rename that field')

    if not isinstance(own, str | None):
        raise CorpusError(f'{where} has a "topic" that is no string')

    return check_document(text, own or topic, where)


def check_document(text: str, topic: str, where: str) -> Document:
    """A document of `text`, which must be text; `where` it is from goes into the error.

    Raises:
        CorpusError: it is empty, has a NUL character or cannot be written as UTF-8.
    """
    if not text.strip():
        raise CorpusError(f"{where} has no text in it")

    if END in text:
        raise CorpusError(f"{where} has a NUL character in it, so it is no text")

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where} has half a character in it (a surrogate): {error}") from None

    return Document(text + END, topic)


def _decode(path: Path, raw: bytes, *, line: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        where = _line(path, line + raw.count(b"\n", 0, error.start))
        raise CorpusError(f"{where} is not UTF-8 (byte 0x{raw[error.start]:02x}); convert it, as iconv does") from None


def _line(path: Path, number: int) -> str:
    return f"{path}, line {number}"
