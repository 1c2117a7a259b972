"""metrics.jsonl, read while it is written: nothing twice, nothing left out, whatever else is in it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from db.queue import Point
from gpu_runner.metrics import CHUNK, read_new_lines
from gpu_runner.outcome import log_tail


def line(step: int) -> bytes:
    return json.dumps({"step": step, "tokens": step, "seconds": 0.5, "values": {"loss": 1.0}}).encode() + b"\n"


def test_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_new_lines(path, 0).points == []
    whole = line(1) + line(2)
    path.write_bytes(whole[:-1])
    first = read_new_lines(path, 0)
    assert first.points == [Point(step=1, tokens=1, seconds=0.5, values={"loss": 1.0})]
    path.write_bytes(whole)
    second = read_new_lines(path, first.offset)
    assert [point.step for point in second.points] == [2]
    assert second.offset == len(whole)
    assert not read_new_lines(path, second.offset).more


def test_every_split_gives_the_same_points(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(line(step) for step in range(30))
    random.seed(1)
    for _ in range(50):
        cuts = sorted(random.sample(range(len(whole)), 5))
        steps, offset = [], 0
        for cut in [*cuts, len(whole)]:
            path.write_bytes(whole[:cut])
            new = read_new_lines(path, offset)
            steps += [point.step for point in new.points]
            offset = new.offset

        assert steps == list(range(30))


def test_garbage_is_counted_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    bad = [
        b"",
        b"null",
        b'{"step": 1}',
        b'{"step": -1, "tokens": 1, "seconds": 1, "values": {}}',
        b'{"step": 9223372036854775808, "tokens": 1, "seconds": 1, "values": {}}',
        b'{"step": true, "tokens": 1, "seconds": 1, "values": {}}',
        b'{"step": 1, "tokens": 1, "seconds": NaN, "values": {}}',
        b'{"step": 1, "tokens": 1, "seconds": 1, "values": {"": 1}}',
        b'{"step": 1, "tokens": 1, "seconds": 1, "values": {"a": "1"}}',
        b"[" * 100_000,
        b"\xff\x00",
    ]
    path.write_bytes(b"\n".join(bad) + b"\n" + line(7))
    new = read_new_lines(path, 0)
    assert [point.step for point in new.points] == [7]
    assert new.garbage == len(bad)


def test_values_that_are_not_finite_become_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "tokens": 1, "seconds": 1, "values": {"a": NaN, "b": -Infinity, "c": 1e999, "d": null}}\n'
    )
    assert read_new_lines(path, 0).points[0].values == {"a": None, "b": None, "c": None, "d": None}


def test_endless_line_does_not_stop_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * (2 * CHUNK + 5) + b"\n" + line(3))
    offset, steps = 0, []
    while (new := read_new_lines(path, offset)).more:
        offset = new.offset
        steps += [point.step for point in new.points]

    assert (steps, offset) == ([3], path.stat().st_size)


def test_log_tail_of_anything(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert log_tail(path) == ""
    path.write_bytes(b"\xff\x00" * 1_000_000 + b"\n" + b"\n".join(b"%d" % n for n in range(100)))
    assert log_tail(path) == "\n".join(str(n) for n in range(70, 100))
