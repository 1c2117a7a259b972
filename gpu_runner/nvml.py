"""NVIDIA's management library, asked in a thread with a time-out, because a sick driver can hang a call for ever.

Cards are known by their UUID. What this does not do: import torch, or decide which card is used (card.py does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

try:
    import pynvml
except ImportError:  # nvidia-ml-py is part of the runner extra
    pynvml = None

_T = TypeVar("_T")


class NvmlError(Exception):
    """NVML is missing, has failed, or did not answer. Raised by Nvml; never fatal for training."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A card as NVML describes it."""

    uuid: str
    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at a card; None where the card does not measure it."""

    utilization_percent: float | None
    memory_bytes: int | None
    temperature_celsius: float | None
    power_watts: float | None


class Nvml:
    """The library, initialised at the first call. While a call hangs, later ones fail at once."""

    def __init__(self, timeout: float = 3.0) -> None:
        self._timeout = timeout
        self._initialised = False
        self._hanging: threading.Thread | None = None

    def gpus(self) -> list[Gpu]:
        """All cards, in the order of their PCI buses.

        Raises:
            NvmlError: the binding, the library or the driver is missing or does not answer.
        """
        return self._call(self._list_gpus)

    def sample(self, uuid: str) -> Sample:
        """What the card measures now.

        Raises:
            NvmlError: the card is lost, or NVML does not answer.
        """
        return self._call(lambda: _measure(uuid))

    def _list_gpus(self) -> list[Gpu]:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            Gpu(
                uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
                name=_text(pynvml.nvmlDeviceGetName(handle)),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        ]

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

        # Not a thread pool: the interpreter waits for a pool's threads when it exits, and so would hang with them.
        thread = threading.Thread(target=ask, name="nvml", daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            self._hanging = thread
            raise NvmlError(f"NVML did not answer within {self._timeout:g} s")

        if failures and isinstance(failures[0], pynvml.NVMLError):
            raise NvmlError(f"NVML: {failures[0]}") from failures[0]

        if failures:
            raise failures[0]

        return results[0]


def _measure(uuid: str) -> Sample:
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    utilization = _if_supported(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    memory = _if_supported(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    temperature = _if_supported(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    milliwatts = _if_supported(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    return Sample(
        utilization_percent=None if utilization is None else float(utilization),
        memory_bytes=None if memory is None else int(memory),
        temperature_celsius=None if temperature is None else float(temperature),
        power_watts=None if milliwatts is None else milliwatts / 1000.0,
    )


def _if_supported(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NoPermission):
        return None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
