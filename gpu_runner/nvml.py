"""NVIDIA's management library, asked in a thread with a time-out, because a sick driver can hang a call for ever.

Cards are known by their UUID. After any failure the library is initialised anew, so that a card that comes back is
seen. What this does not do: import torch, or decide which card is used (card.py does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

try:
    import pynvml
except ImportError:  # nvidia-ml-py is part of the runner extra
    pynvml = None

_T = TypeVar("_T")

SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of nvmlClocksEventReason that make a card slower than it is meant to be. The software power cap (0x04) is none
of them: a T4 at work is always at its 70 W."""

_ADVICE = {
    6: "the card is no longer there; restart the machine",
    9: "load the driver (modprobe nvidia), or restart the machine",
    15: "it has fallen off the bus; restart the machine (dmesg names the Xid)",
    16: "restart the machine, or reset the card with nvidia-smi --gpu-reset",
    18: "the driver was updated under the running kernel module; restart the machine",
    28: "the card is no longer there; restart the machine",
    999: "often a card that was lost; see dmesg, and restart the machine",
}
"""What to do about an NVML error, by its code."""


class NvmlError(Exception):
    """NVML is missing, has failed, or did not answer. Raised by Nvml; never fatal for what trains."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A card, or a MIG slice of one, as NVML describes it; `index` is its place by PCI bus."""

    index: int
    uuid: str
    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at a card; None where the card does not measure it.

    `energy_joules` counts since the driver was loaded, as does `ecc_errors` (uncorrectable ones); `slowdowns` says why
    the clocks are lower than meant; `pids` are the processes that compute on the card, as the host numbers them.
    """

    utilization_percent: float | None
    memory_bytes: int | None
    temperature_celsius: float | None
    power_watts: float | None
    energy_joules: float | None
    slowdowns: tuple[str, ...] | None
    pids: tuple[int, ...] | None
    ecc_errors: int | None


def combine(samples: Sequence[Sample]) -> Sample:
    """One look at cards that train together: what they use in all, and the worst of what each has by itself.

    What one of them does not measure is not known of all. Memory is that of the fullest, since each process needs its
    own; utilization is the mean.
    """
    if len(samples) == 1:
        return samples[0]

    def known(name: str) -> list[Any]:
        values = [getattr(sample, name) for sample in samples]
        return [] if None in values else values

    def total(name: str) -> Any:
        return sum(values) if (values := known(name)) else None

    busy = total("utilization_percent")
    slowdowns = known("slowdowns")
    pids = known("pids")
    return Sample(
        utilization_percent=None if busy is None else busy / len(samples),
        memory_bytes=max(known("memory_bytes"), default=None),
        temperature_celsius=max(known("temperature_celsius"), default=None),
        power_watts=total("power_watts"),
        energy_joules=total("energy_joules"),
        slowdowns=tuple(dict.fromkeys(word for words in slowdowns for word in words)) if slowdowns else None,
        pids=tuple(pid for each in pids for pid in each) if pids else None,
        ecc_errors=total("ecc_errors"),
    )


class Nvml:
    """The library, initialised at the first call. While a call hangs, later ones fail at once."""

    def __init__(self, timeout: float = 3.0) -> None:
        self._timeout = timeout
        self._initialised = False
        self._hanging: threading.Thread | None = None

    def gpus(self) -> list[Gpu]:
        """All cards that answer, in the order of their PCI buses; of one that is cut up by MIG, its slices.

        Raises:
            NvmlError: the binding, the library or the driver is missing or does not answer; or there are cards, and
                none of them answers.
        """
        return self._call(_list_gpus)

    def sample(self, uuid: str) -> Sample:
        """What the card measures now.

        Raises:
            NvmlError: the card is lost, or NVML does not answer.
        """
        return self._call(lambda: _measure(uuid))

    def _call(self, work: Callable[[], _T]) -> _T:
        if pynvml is None:
            raise NvmlError("nvidia-ml-py is not installed")

        if self._hanging is not None and self._hanging.is_alive():
            raise NvmlError("NVML still does not answer")

        results: list[_T] = []
        failures: list[Exception] = []

        def ask() -> None:
            try:
                if not self._initialised:
                    pynvml.nvmlInit()
                    self._initialised = True

                results.append(work())
            except Exception as error:
                failures.append(error)
                if self._initialised:
                    self._initialised = False
                    with suppress(pynvml.NVMLError):
                        pynvml.nvmlShutdown()

        # Not a thread pool: the interpreter waits for a pool's threads when it exits, and so would hang with them.
        thread = threading.Thread(target=ask, name="nvml", daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            self._hanging = thread
            raise NvmlError(f"NVML did not answer within {self._timeout:g} s; if it stays so, restart the machine")

        if failures and isinstance(failures[0], pynvml.NVMLError):
            raise NvmlError(_explain(failures[0])) from failures[0]

        if failures:
            raise failures[0]

        return results[0]


def _list_gpus() -> list[Gpu]:
    gpus: list[Gpu] = []
    failures: list[Exception] = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpus += [_describe(index, part) for part in _slices(handle) or [handle]]
        except pynvml.NVMLError as error:  # a lost card must not hide the others
            failures.append(error)

    if failures and not gpus:
        raise failures[0]

    return gpus


def _slices(handle: Any) -> list[Any]:
    """The MIG slices of a card; none where it is whole."""
    mode = _if_supported(lambda: pynvml.nvmlDeviceGetMigMode(handle))
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return []

    def found() -> Iterator[Any]:
        for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with suppress(pynvml.NVMLError_NotFound):
                yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)

    return list(found())


def _describe(index: int, handle: Any) -> Gpu:
    return Gpu(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _measure(uuid: str) -> Sample:
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    utilization = _if_supported(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    memory = _if_supported(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    temperature = _if_supported(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    milliwatts = _if_supported(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    millijoules = _if_supported(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    reasons = _if_supported(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    if reasons is None:  # drivers before R535 have it by its old name
        reasons = _if_supported(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))

    processes = _if_supported(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle))
    uncorrected, volatile = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    return Sample(
        utilization_percent=None if utilization is None else float(utilization),
        memory_bytes=None if memory is None else int(memory),
        temperature_celsius=None if temperature is None else float(temperature),
        power_watts=None if milliwatts is None else milliwatts / 1000.0,
        energy_joules=None if millijoules is None else millijoules / 1000.0,
        slowdowns=None if reasons is None else tuple(word for bit, word in SLOWDOWNS.items() if reasons & bit),
        pids=None if processes is None else tuple(process.pid for process in processes),
        ecc_errors=_if_supported(lambda: pynvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, volatile)),
    )


def _if_supported(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NoPermission):
        return None


def _explain(error: Any) -> str:
    advice = _ADVICE.get(error.value)
    return f"NVML: {error}; {advice}" if advice else f"NVML: {error}"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
