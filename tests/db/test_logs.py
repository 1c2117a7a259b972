"""Logs stay small and lose no line, however many processes write to them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from db.logs import KEPT, LOG_BYTES, RUN_LOG_BYTES, list_logs, rotate, shorten
from db.processes import spawn_module

WRITER = """
import sys
from pathlib import Path
from db.logs import OwnLog
log = OwnLog(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    sys.stderr.write(f"{sys.argv[2]} {number:06d}\\n")
    log.step(4000)
"""


def lines(path: Path) -> list[str]:
    files = [*reversed(list_logs(path.parent)), path]
    return [line for file in files for line in file.read_text().splitlines()]


def write_to(path: Path, name: str, count: int) -> subprocess.Popen[bytes]:
    """A process that writes so many lines and turns its log over at 4,000 bytes."""
    with path.open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(count)], stdout=log, stderr=log)


def test_a_full_log_is_set_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    log = tmp_path / "runner.log"
    for number in range(KEPT + 3):
        log.write_text(f"{number}\n" * 50)
        rotate(log, most=101)
        assert log.exists()  # not full yet
        rotate(log, most=100)
        assert not log.exists()

    assert [path.read_text()[0] for path in list_logs(tmp_path)] == ["5", "4", "3"]
    rotate(tmp_path / "there is none", most=100)


def test_a_process_follows_its_own_log(tmp_path: Path) -> None:
    log = tmp_path / "runner.log"
    assert write_to(log, "a", 3000).wait(60) == 0
    assert len(list_logs(tmp_path)) == KEPT
    left = lines(log)
    assert left == [f"a {number:06d}" for number in range(3000 - len(left), 3000)]
    assert all(path.stat().st_size < 4100 for path in [log, *list_logs(tmp_path)])


def test_two_that_share_a_log_lose_no_line(tmp_path: Path) -> None:
    log = tmp_path / "runner.log"
    writers = [write_to(log, name, 600) for name in "ab"]  # 10,800 bytes: less than is kept
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert sorted(lines(log)) == [f"{name} {number:06d}" for name in "ab" for number in range(600)]


def test_starting_a_process_sets_its_full_log_aside(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "mind.log"
    log.parent.mkdir()
    log.write_bytes(b"x" * LOG_BYTES)
    assert spawn_module("platform", [], log=log).wait(60) == 0
    assert [path.name for path in list_logs(log.parent)] == ["mind.log.1"]
    assert "Linux" in log.read_text()


def test_a_long_run_log_keeps_its_beginning_and_its_end_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    count, stop = 0, threading.Event()

    def write() -> None:
        nonlocal count
        with log.open("ab", buffering=0) as out:
            while not stop.is_set():
                out.write(b"".join(b"line %09d\n" % number for number in range(count, count + 1000)))
                count += 1000

    writer = threading.Thread(target=write)
    writer.start()
    while count < 400_000:
        shorten(log, most=2**21)

    stop.set()
    writer.join()
    shorten(log, most=2**21)
    assert log.stat().st_size <= 2**21
    found = log.read_text().splitlines()
    assert found[:100] == [f"line {number:09d}" for number in range(100)]
    assert found[-1] == f"line {count - 1:09d}"
    assert any("bytes were left out here" in line for line in found)
    torn = [line for line in found if len(line) != 14 and "left out" not in line]
    assert len(torn) <= 3  # one a cut at most, and the end that is kept has seen one or two


def test_a_short_run_log_is_left_as_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("one\n")
    shorten(log, most=RUN_LOG_BYTES)
    assert log.read_text() == "one\n"
    shorten(tmp_path / "there is none")
