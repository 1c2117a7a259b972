"""What no config can be is refused before anything is computed, by the names of the fields at fault."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe.config import KNOBS, ConfigError, apply, apply_treatment
from moe.presets import PRESETS

NANO = PRESETS["nano"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "n_heads=3 must divide d_model=32 into an even head width"),
        ({"d_model": 36, "n_heads": 4}, "n_heads=4 must divide d_model=36 into an even head width"),
        ({"gqa_group_size": 4}, "gqa_group_size=4 must divide n_heads=2"),
        ({"top_k": 5}, "top_k=5 is more than num_experts=4"),
        ({"first_k_dense": 2}, "first_k_dense=2 and moe_every=1 leave no layer with experts"),
        ({"moe_every": 3}, "first_k_dense=0 and moe_every=3 leave no layer with experts"),
        ({"micro_batch_size": 3}, "micro_batch_size=3 must divide batch_size=8"),
        ({"routing_group": 3}, "routing_group=3 must divide micro_batch_size=8"),
        ({"batch_doublings": 4}, "batch_doublings=4 must leave a whole number of routing groups of 1 at first"),
        ({"routing_group": 4, "batch_doublings": 2}, "whole number of routing groups of 4 at first: batch_size=8 / 4"),
        ({"length_doublings": 4}, "length_doublings=4 must cut seq_len=64 into equal pieces of at least 8 tokens"),
        ({"seq_len": 62, "length_doublings": 2}, "length_doublings=2 must cut seq_len=62 into equal pieces"),
        ({"corpus": "smollm"}, "say with corpus_documents how much of it"),
        ({"vocab_size": 300}, "vocab_size=300 must be 256 with the byte tokenizer"),
        ({"tokenizer": "bpe"}, "vocab_size=256 must be more than 256 with tokenizer=bpe"),
        ({"budget_seconds": 1.0}, "exactly one of budget_tokens and budget_seconds must be set"),
        ({"budget_tokens": None}, "exactly one of budget_tokens and budget_seconds must be set"),
        ({"budget_tokens": 511}, "budget_tokens=511 is less than one batch of batch_size * seq_len = 512 tokens"),
        ({"prune_experts": 2, "merge_experts": 1}, "prune_experts=2 and merge_experts=1 must leave top_k=2 of"),
        ({"routing": "hash", "prune_experts": 1}, "need tokens that choose their experts; routing=hash"),
        ({"routing": "expert_choice", "merge_experts": 1}, "need tokens that choose their experts; routing=expert_ch"),
    ],
    ids=lambda part: "+".join(part) if isinstance(part, dict) else "",
)
def test_fields_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply(NANO, changes)


@pytest.mark.parametrize("name", [name for name, knob in KNOBS.items() if knob.high is not None])
def test_every_number_has_bounds_and_keeps_to_them(name: str) -> None:
    knob = KNOBS[name]
    assert knob.low is not None
    assert knob.high is not None
    for beyond in (knob.low - 2, knob.high + 2):
        with pytest.raises(ConfigError, match=f"{name}=.*: Input should be (greater|less) than"):
            apply(NANO, {name: beyond})

    if knob.search is not None and not knob.search.choices:
        assert knob.search.low is not None
        assert knob.search.high is not None
        assert knob.low <= knob.search.low < knob.search.high <= knob.high


def test_a_knob_is_never_what_it_is_not() -> None:
    for value in (float("nan"), float("inf"), 10**400, "8", None, [8], True):
        for name in ("num_experts", "lr"):
            with pytest.raises(ConfigError, match=f"{name}="):
                apply(NANO, {name: value})

    with pytest.raises(ConfigError, match=r"num_experts=8\.5"):
        apply(NANO, {"num_experts": 8.5})

    assert apply(NANO, {"num_experts": 8.0, "lr": 1}).num_experts == 8  # JSON has one kind of number


@pytest.mark.parametrize(
    ("treatment", "message"),
    [
        ({}, "changes nothing; name at least one knob"),
        ({"top_k": 2}, "top_k=2 is the baseline's own value"),
        ({"seq_len": 32, "budget_tokens": 1024}, "budget_tokens is budget, equal on both sides"),
        ({"micro_batch_size": 4}, "micro_batch_size is machine, equal on both sides"),
        ({"decay_fraction": 0.5}, "decay_fraction acts only with schedule='wsd'; set that as well"),
        ({"quantize": "int8", "quantize_group": 32}, "quantize_group acts only with quantize='int4'"),
    ],
    ids=["nothing", "the same", "budget", "machine", "needs another", "of another"],
)
def test_what_is_no_treatment_is_refused(treatment: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply_treatment(NANO, treatment)
