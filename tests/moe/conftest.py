"""Shared by the tests of moe/: one prepared data folder a session, and run directories like the runner's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import Config

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tokenized text is shared; each tokenizer is prepared by the first test that needs it."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine make small models ten times slower


@pytest.fixture
def make_run(tmp_path: Path, data_dir: Path) -> MakeRun:
    """Writes a run directory: make_run(config, seed=1, baseline=..., name="a")."""

    def make(config: Config, *, name: str = "run", baseline: Config | None = None, **more: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        request = {
            "kind": "train" if baseline is None else "probe",
            "config": config.model_dump(),
            "baseline": None if baseline is None else baseline.model_dump(),
            "seed": 0,
            "device": "cpu",
            "threads": 1,
            "data_dir": str(data_dir),
            "split": "val",
        }
        (directory / "config.json").write_text(json.dumps(request | more))
        return directory

    return make
