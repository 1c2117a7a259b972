"""The pages in a real browser, headless Chromium: they render, and keep themselves up to date.

The screenshots are left in pytest's temporary folder; look at them after changing a template or the style sheet.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import db.notebook

if TYPE_CHECKING:
    from tests.notebook.conftest import Sample

CHROMIUM = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
LIVE = Path(db.notebook.__file__).parent / "static" / "live.js"
SIZE = (1280, 1600)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")


def test_front_page_renders(url: str, sample: Sample, tmp_path: Path) -> None:
    dom = _look(url, tmp_path)
    assert "One expert a token" in dom
    assert 'class="badge badge-improved"' in dom


def test_experiment_renders(url: str, sample: Sample, tmp_path: Path) -> None:
    dom = _look(f"{url}lab/experiments/1", tmp_path)
    assert sample.sentence in dom
    assert dom.count('<svg class="curves"') == 6


def test_live_parts_of_a_page_are_replaced(changing_page: str, tmp_path: Path) -> None:
    dom = _chromium(tmp_path, "--virtual-time-budget=10000", "--dump-dom", changing_page)
    assert "newer" in dom
    assert "older" not in dom


@pytest.fixture
def changing_page() -> Iterator[str]:
    """A page that says something else the second time."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, body = "text/javascript", LIVE.read_text()
            if self.path == "/":
                seen.append(self.path)
                word = "older" if len(seen) == 1 else "newer"
                kind = "text/html"
                body = f'<p id="part" data-live>{word}</p><script type="module" src="/live.js"></script>'

            self.send_response(200)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def _look(url: str, folder: Path) -> str:
    picture = folder / "page.png"
    dom = _chromium(folder, f"--screenshot={picture}", "--dump-dom", url)
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:24]) == SIZE
    assert picture.stat().st_size > 50_000  # not an empty page
    return dom


def _chromium(folder: Path, *arguments: str) -> str:
    quiet = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            *(f"--{name}" for name in (*quiet.split(), "disable-sync", "hide-scrollbars")),
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout
