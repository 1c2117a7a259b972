"""Time, in its two meanings: UTC for people, and seconds since boot for leases.

Wall clocks jump, so a lease never depends on one. CLOCK_BOOTTIME counts through suspend; a new boot id means that
every process of an earlier boot is dead.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Instant:
    """One moment on this machine: seconds since boot, and which boot."""

    seconds: float
    boot_id: str


def utc_now() -> str:
    """Now as ISO 8601 in UTC with milliseconds, which sorts as text."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def now() -> Instant:
    """This moment, for leases. Without CLOCK_BOOTTIME (macOS) the monotonic clock serves."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return Instant(seconds=time.clock_gettime(clock), boot_id=_boot_id())


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
