"""Real training that the allocator refuses memory goes on with smaller micro-batches, in a process that fits."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest

from moe.accounting import peak_memory_bytes
from moe.config import apply
from moe.presets import PRESETS

if TYPE_CHECKING:
    from tests.gpu_runner.conftest import Bench

CONFIG = apply(
    PRESETS["nano"],
    {"batch_size": 256, "micro_batch_size": 256, "seq_len": 256, "budget_tokens": 2 * 256 * 256, "progress_evals": 0},
)
LIMIT = peak_memory_bytes(apply(CONFIG, {"micro_batch_size": 128}), "fp32")  # too little for 256 of them


@pytest.mark.slow
def test_real_training_steps_down_until_it_fits(bench: Bench) -> None:
    key = bench.enqueue(steps=CONFIG.steps, config=CONFIG.model_dump())
    daemon = bench.start(standin=False)
    resource.prlimit(daemon.pid, resource.RLIMIT_DATA, (LIMIT, LIMIT))  # its children inherit it
    bench.until_status(key, "completed")
    attempts = bench.attempts(key)
    statuses = [attempt.status for attempt in attempts]
    sizes = [attempt.micro_batch_size for attempt in attempts]
    assert statuses == ["failed"] * (len(attempts) - 1) + ["completed"]
    assert sizes == [256, 128, 64, 32, 16, 8][: len(sizes)]
    assert len(sizes) >= 2
    assert "can't allocate memory" in (attempts[0].error or "")
    run = bench.run(key)
    assert (run.failures, run.lost, run.step) == (0, 0, 2)
    assert run.score is not None
    assert run.score["val_bpb"] > 0.0
