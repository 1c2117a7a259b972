"""The SmolLM recipe: Cosmopedia v2 streamed from the hub, and the tokenizer of SmolLM-135M. Torch-free.

39 million textbooks, blog posts and stories that Mixtral wrote (Ben Allal et al. 2024, SmolLM-Corpus, ODC-By 1.0), in
the order in which they are stored. Only as much is fetched as is read. Needs the extra `smollm` and, the first time,
the network. A downloaded copy of the Parquet files can be used as a text set of one's own instead (moe/texts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe.texts import NO_TOPIC, CorpusError, Document, check_document

DATASET = "HuggingFaceTB/smollm-corpus"
SUBSET = "cosmopedia-v2"
REVISION = "3ba9d605774198c5868892d7a8deda78031a781f"

MODEL = "HuggingFaceTB/SmolLM-135M"
MODEL_REVISION = "1d461723eec654e65efdc40cf49301c89c0c92f4"
TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
"""Of its tokenizer.json: a byte-level BPE of 49,152 ids, whose documents end with <|endoftext|>."""

INSTALL = "pip install 'blueberry-lab[smollm]'"


def stream_documents() -> Iterator[Document]:
    """All documents; the topic is the format they are written in, such as "textbook" or "story".

    Raises:
        CorpusError: `datasets` is not installed, or the hub cannot be reached.
    """
    try:
        from datasets import load_dataset  # an extra, and a second to load: only where it is asked for
    except ModuleNotFoundError:
        raise CorpusError(f"corpus=smollm needs the library datasets; {INSTALL}") from None

    done = 0
    try:
        stream = load_dataset(DATASET, SUBSET, split="train", streaming=True, revision=REVISION)
        for record in stream.select_columns(["text", "format"]):
            done += 1
            yield check_document(record["text"], record["format"] or NO_TOPIC, f"{DATASET}, document {done}")
    except OSError as error:
        raise CorpusError(f"{DATASET} broke off after {done} documents: {error}") from error


def fetch_tokenizer() -> Path:
    """A copy of tokenizer.json from the hub, in the hub's own cache.

    Raises:
        CorpusError: the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download  # comes with tokenizers

    try:
        return Path(hf_hub_download(MODEL, "tokenizer.json", revision=MODEL_REVISION))
    except OSError as error:
        raise CorpusError(f"the tokenizer of {MODEL} cannot be fetched: {error}") from error
