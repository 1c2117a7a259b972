"""Finding the commit whose moe/ made a run, in a real repository."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import moe
from agents import checkout
from agents.checkout import commit_with
from moe.fingerprint import code_hash


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This moe/, committed to a repository of its own in which other commits follow."""
    folder = tmp_path / "moe"
    shutil.copytree(Path(moe.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    (tmp_path / "README.md").write_text("what moe/ does not see\n")
    commit(tmp_path)
    (folder / "config.py").write_text("# another one\n")
    commit(tmp_path)
    monkeypatch.setattr(checkout, "_FOLDER", folder)
    return folder


def git(where: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=where, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(where: Path) -> None:
    git(where, "add", "-A")
    git(where, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one")


def test_the_newest_commit_with_the_code_of_a_run_is_found_by_its_hash(folder: Path) -> None:
    assert commit_with(code_hash()) == git(folder, "rev-parse", "HEAD~1")


def test_code_that_was_never_committed_is_in_no_commit(folder: Path) -> None:
    assert commit_with("0" * 64) is None


def test_outside_of_a_repository_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "_FOLDER", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_with(code_hash()) is None
