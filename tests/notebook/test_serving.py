"""Starting the notebook where it cannot be started: one clear sentence, and exit code 2."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from db.notebook import __main__ as notebook
from db.store import Store


def test_no_lab(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "none") == (
        f"there is no lab in {tmp_path}/none; name one with `blueberry --lab FOLDER browse`, "
        "or begin one with `blueberry suggest` or `make demo`\n"
    )
    assert not (tmp_path / "none").exists()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "lab.db").write_text("not a database, but long enough to be taken for one" * 100)
    assert "is not a database" in _refusal(tmp_path)


def test_port_taken(tmp_path: Path) -> None:
    Store(tmp_path / "lab.db").close()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert _refusal(tmp_path, "--port", str(port)) == (
            f"port {port} is taken; choose another with --port (0 takes any free one)\n"
        )


@pytest.mark.parametrize("arguments", [("--port", "99999"), ("--host", "203.0.113.7")], ids=["port", "host"])
def test_address_that_cannot_be_listened_on(tmp_path: Path, arguments: tuple[str, str]) -> None:
    Store(tmp_path / "lab.db").close()
    assert _refusal(tmp_path, *arguments).startswith("cannot listen on ")


def test_datasette_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["notebook", str(tmp_path)])
    assert notebook.main() == 2
    assert "datasette is not installed; run: pip install" in capsys.readouterr().err


def _refusal(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "db.notebook", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    return done.stderr
