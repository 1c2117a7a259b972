"""The kernel's out-of-memory killer, whose SIGKILL looks like any other: only its counters tell.

Standard library only, because the shim uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_COUNTERS = (  # of the control group as it sees itself (v2, v1), of the whole machine
    (Path("/sys/fs/cgroup/memory.events"), "oom_kill"),
    (Path("/sys/fs/cgroup/memory/memory.oom_control"), "oom_kill"),
    (Path("/proc/vmstat"), "oom_kill"),
)


def count_oom_kills(counters: tuple[tuple[Path, str], ...] = _COUNTERS) -> int:
    """How many processes the kernel has killed so far for want of memory, as far as it says; only differences count."""
    return sum(sum(_values(path, name)) for path, name in counters)


def _values(path: Path, name: str) -> Iterator[int]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return

    for line in lines:
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            yield int(value)
