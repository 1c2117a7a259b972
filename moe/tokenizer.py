"""Text to token ids, and how many bytes of text each id stands for.

byte: the 256 bytes. bpe: a byte-level BPE trained on the training split. smollm: that of SmolLM-135M. All are lossless
and spell a document's end (moe/texts.py) as one id, so the ids of a text always stand for exactly its UTF-8 bytes and
bits per byte compare across vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moe.smollm import TOKENIZER_SHA256, fetch_tokenizer
from moe.texts import END, CorpusError, hash_file

Tokens = NDArray[np.uint16]
"""Ids fit: vocab_size is at most 65,536."""

ENDS = (END, "<|endoftext|>")  # of our own, of SmolLM's
BATCH = 1000  # texts at once: an Encoding takes about a hundred times the memory of its ids


class Encoded(NamedTuple):
    """Texts one after the other, and the index at which each one starts."""

    tokens: Tokens
    starts: NDArray[np.int64]


def encode(tokenizer: Tokenizer | None, texts: Sequence[str]) -> Encoded:
    """The ids of each text and of its end; without a tokenizer, bytes."""
    if tokenizer is None:
        raw = [text.encode() for text in texts]
        return Encoded(np.frombuffer(b"".join(raw), dtype=np.uint8).astype(np.uint16), _starts(map(len, raw)))

    end = [end_id(tokenizer)]
    ids: list[Tokens] = []
    for first in range(0, len(texts), BATCH):
        part = [text.removesuffix(END) for text in texts[first : first + BATCH]]
        encodings = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        ids += (np.array(encoding.ids + end, dtype=np.uint16) for encoding in encodings)

    return Encoded(np.concatenate([np.empty(0, dtype=np.uint16), *ids]), _starts(map(len, ids)))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids; id 0 ends a document, and no text can spell it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.removesuffix(END) for text in texts), trainer)
    return tokenizer


def open_smollm(folder: Path) -> Tokenizer:
    """The tokenizer of SmolLM-135M: `folder`/smollm.json, or fetched from the hub where there is none.

    Raises:
        CorpusError: it is another file than it should be, or the hub cannot be reached.
    """
    path = folder / "smollm.json"
    if not path.exists():
        path = fetch_tokenizer()

    digest = hash_file(path)
    if digest != TOKENIZER_SHA256:
        raise CorpusError(f"{path} has SHA-256 {digest}, the tokenizer of SmolLM-135M has {TOKENIZER_SHA256}")

    return open_tokenizer(path)


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, for text in which names of special tokens are text like any other."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_id(tokenizer: Tokenizer) -> int:
    """The id that ends a document."""
    vocabulary = tokenizer.get_vocab()
    return int(vocabulary[next(name for name in ENDS if name in vocabulary)])


def _starts(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)[:-1]


def bytes_of_ids(tokenizer: Tokenizer | None, vocab_size: int) -> NDArray[np.uint16]:
    """Bytes of text behind each id: GPT-2's alphabet writes each byte as one character. Ids never used have 0."""
    if tokenizer is None:
        return np.ones(vocab_size, dtype=np.uint16)

    lengths = np.zeros(vocab_size, dtype=np.uint16)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)

    lengths[end_id(tokenizer)] = len(END)
    return lengths
