"""Which devices train here: the NVIDIA cards where there are any that torch can use, otherwise the CPU, saying so.

torch is never imported, only its version looked up: registering must take about a second.
"""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from db.errors import LabError
from db.settings import Runner as RunnerSettings
from gpu_runner.nvml import Gpu, Nvml, NvmlError
from moe.precision import Precision, precision_on

SHARE = 2
"""Cores for each thread of a training process. OpenMP's threads spin at every barrier, so a second one on a core that
somebody else needs (this lab's own processes, the other half of a hyperthreaded core) costs more than it brings: micro
on 2 cores trained 30 thousand tokens/s with 1 thread; with 2, 39 thousand alone and 9 thousand beside a busy process
(benchmarks/threads.py)."""

_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of the control group that a container sees as its own: version 2, version 1."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What one runner trains on: the CPU, a card, or the cards that train a run together, a process on each.

    `key` names it among the devices of its host, `uuids` are the cards in it (none: the CPU). Memory is that of each
    card, or of the host; threads are those of each process. `message` says how it was chosen.
    """

    device: Literal["cpu", "cuda"]
    name: str
    key: str
    uuids: tuple[str, ...] = ()
    torch: str
    memory_bytes: int
    threads: int
    processes: int = 1
    message: str

    @property
    def precision(self) -> Precision:
        """What a config with precision auto trains in on this device."""
        return precision_on(self.device, "auto")

    @property
    def hardware_class(self) -> str:
        """Runs are compared only within one class: device, precision, torch version, and processes if several."""
        kind = self.name if self.device == "cuda" else f"cpu {self.name}"
        together = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{kind} {self.precision} torch {self.torch}{together}"

    @property
    def slots(self) -> tuple[str, ...]:
        """What a run must have for itself: each of the cards, or the CPU."""
        return self.uuids or (self.key,)

    def columns(self) -> dict[str, Any]:
        """The card as db.runners.register_runner takes it."""
        return {
            "hostname": socket.gethostname(),
            "device": self.device,
            "device_name": self.name,
            "device_key": self.key,
            "precision": self.precision,
            "torch": self.torch,
            "hardware_class": self.hardware_class,
            "memory_bytes": self.memory_bytes,
            "threads": self.threads,
            "cards": len(self.slots),
            "processes": self.processes,
            "message": self.message,
        }


def detect_cards(settings: RunnerSettings, nvml: Nvml) -> list[Card]:
    """The devices to train on: all NVIDIA cards that CUDA_VISIBLE_DEVICES shows, or the CPU. Never none.

    With several processes, as many cards of one kind are one device; those that are left over are not used.

    Raises:
        LabError: torch is not installed, runner.device is cuda and no card can be used, or there are cards, but of no
            kind as many as runner.processes.
    """
    try:
        torch = version("torch")
    except PackageNotFoundError:
        raise LabError("torch is not installed here; run: pip install 'blueberry-lab[runner]'") from None

    if settings.device == "cpu":
        return [_cpu(torch, settings, "runner.device is cpu in the configuration")]

    try:
        gpus = _visible(nvml.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        if torch.endswith("+cpu"):
            raise NvmlError(f"{gpus[0].name} is there, but this torch {torch} is built without CUDA")
    except NvmlError as error:
        if settings.device == "cuda":
            raise LabError(
                f"runner.device is cuda, but no NVIDIA card can be used ({error}); "
                "check nvidia-smi, or set device = 'auto' under [runner] in blueberry.toml"
            ) from None

        return [_cpu(torch, settings, f"no NVIDIA card found ({error})")]

    threads = settings.threads or _share_of_cores(len(gpus))
    groups = _groups(gpus, settings.processes)
    left = len(gpus) - len(groups) * settings.processes
    return [_cards(torch, threads, group, left) for group in groups]


def _groups(gpus: Sequence[Gpu], size: int) -> list[list[Gpu]]:
    """The cards in groups of so many of one kind, in their order."""
    if size == 1:
        return [[gpu] for gpu in gpus]

    kinds: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        if not gpu.uuid.startswith("MIG-"):  # CUDA shows a process no more than one slice
            kinds.setdefault(gpu.name, []).append(gpu)

    found = [alike[i : i + size] for alike in kinds.values() for i in range(0, len(alike) - size + 1, size)]
    if not found:
        there = ", ".join(f"{len(alike)} x {name}" for name, alike in kinds.items()) or "slices of cards (MIG)"
        raise LabError(
            f"runner.processes is {size}, which needs {size} whole cards of one kind, and here are: {there}; "
            "set processes under [runner] in blueberry.toml to no more than that"
        )

    return found


def _cards(torch: str, threads: int, gpus: Sequence[Gpu], left: int) -> Card:
    first, count = gpus[0], len(gpus)
    memory = min(gpu.memory_bytes for gpu in gpus)
    one = f"{first.name} ({memory / 2**30:.1f} GiB)"
    together = f"training on {count} cards together, each {one}" + (f"; {left} left over" if left else "")
    return Card(
        device="cuda",
        name=first.name,
        key=first.uuid if count == 1 else f"{first.uuid}+{count - 1}",
        uuids=tuple(gpu.uuid for gpu in gpus),
        torch=_public(torch),
        memory_bytes=memory,
        threads=threads,
        processes=count,
        message=f"training on {one}" if count == 1 else together,
    )


def _visible(gpus: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """The cards that CUDA_VISIBLE_DEVICES shows, by number or UUID; like CUDA it reads up to the first unknown one."""
    if not gpus:
        raise NvmlError("NVML lists no card")

    if visible is None:
        return list(gpus)

    chosen: list[Gpu] = []
    for wanted in visible.split(","):
        gpu = _find(gpus, wanted.strip())
        if gpu is None or gpu in chosen:
            break

        chosen.append(gpu)

    if not chosen:
        raise NvmlError(f"CUDA_VISIBLE_DEVICES={visible!r} hides all of them")

    return chosen


def _find(gpus: Sequence[Gpu], wanted: str) -> Gpu | None:
    if wanted.isdecimal():
        return next((gpu for gpu in gpus if gpu.index == int(wanted)), None)

    named = wanted.startswith(("GPU-", "MIG-"))
    return next((gpu for gpu in gpus if named and gpu.uuid.startswith(wanted)), None)


def _share_of_cores(processes: int) -> int:
    """Threads of each of so many processes that train at once."""
    return max(1, len(os.sched_getaffinity(0)) // SHARE // processes)


def _cpu(torch: str, settings: RunnerSettings, reason: str) -> Card:
    processes = settings.processes
    threads = settings.threads or _share_of_cores(processes)
    each = f"{threads} thread{'s' * (threads > 1)}"
    return Card(
        device="cpu",
        name=_cpu_name(),
        key="cpu",
        torch=_public(torch),
        memory_bytes=host_memory(),
        threads=threads,
        processes=processes,
        message=f"{reason}: training on the CPU, {each if processes == 1 else f'{processes} processes of {each}'}",
    )


def host_memory(limits: tuple[Path, ...] = _MEMORY_LIMITS) -> int:
    """Bytes of the machine's memory, or of the container's share in it."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in limits:
        with suppress(OSError, ValueError):  # "max" is no limit
            sizes.append(int(path.read_text(encoding="ascii")))

    return min(sizes)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []

    model = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    model = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*", " ", model)
    return " ".join(model.split()) or "unknown"


def _public(torch: str) -> str:
    return torch.split("+")[0]
