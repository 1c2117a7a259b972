"""Text to token ids, and how many bytes of text each id stands for.

byte: the 256 bytes. bpe: a byte-level BPE trained on the training split. Both are lossless and spell a document's end
(moe/corpus.py) as one id, so the ids of a text always stand for exactly its UTF-8 bytes and bits per byte compare
across vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moe.corpus import END

Tokens = NDArray[np.uint16]
"""Ids fit: vocab_size is at most 65,536."""


BATCH = 1000  # texts at once: an Encoding takes about a hundred times the memory of its ids


class Encoded(NamedTuple):
    """Texts one after the other, and the index at which each one starts."""

    tokens: Tokens
    starts: NDArray[np.int64]


def encode_bytes(texts: Sequence[str]) -> Encoded:
    raw = [text.encode() for text in texts]
    tokens = np.frombuffer(b"".join(raw), dtype=np.uint8).astype(np.uint16)
    return Encoded(tokens, _starts(map(len, raw)))


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


def encode_bpe(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    ids: list[Tokens] = []
    for first in range(0, len(texts), BATCH):
        encodings = tokenizer.encode_batch_fast(list(texts[first : first + BATCH]))
        ids += (np.array(encoding.ids, dtype=np.uint16) for encoding in encodings)

    return Encoded(np.concatenate([np.empty(0, dtype=np.uint16), *ids]), _starts(map(len, ids)))


def _starts(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)[:-1]


def bytes_of_ids(tokenizer: Tokenizer | None, vocab_size: int) -> NDArray[np.uint8 | np.uint16]:
    """Bytes of text behind each id: GPT-2's alphabet writes each byte as one character. Ids never used have 0."""
    if tokenizer is None:
        return np.ones(vocab_size, dtype=np.uint16)

    lengths = np.zeros(vocab_size, dtype=np.uint16)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)

    return lengths
