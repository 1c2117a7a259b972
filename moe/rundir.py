"""The run directory (docs/run-directory.md): read the request, write results, record failure.

Every `python -m moe.<kind> DIR` is one call of `run_in`: a failure of any sort becomes error.json, a traceback on
stderr and exit code 1. A file that stands under its final name is whole, also after a power cut.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe.config import Config, ConfigError
from moe.health import TrainingError
from moe.precision import Precision, precision_on

Split = Literal["train", "val", "test"]

NO_DISK = 75
"""Exit code of a process that could not write because its disk is full or read-only: EX_TEMPFAIL of sysexits.h. There
may be no room for any other word."""

CHECKPOINT_SECONDS = 30.0
"""Of training between two resumable checkpoints: what a kill may cost. At `micro` writing one takes 0.05 % of it."""

NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
"""In torch's messages: of its CPU allocator, of C++, of the CUDA runtime, of cuBLAS and cuDNN."""


class Request(BaseModel):
    """config.json: what to do, on what, with which seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    config: Config
    baseline: Config | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: Literal["cpu", "cuda"]
    threads: Annotated[int, Field(ge=1)] | None = None
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    data_dir: Path
    split: Split = "val"
    resume: Path | None = None
    checkpoint: Path | None = None
    checkpoint_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = CHECKPOINT_SECONDS


def run_in(work: Callable[[Path], None], arguments: list[str]) -> int:
    """Do `work` in the directory named by `arguments`; returns the exit code."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write("one argument is needed: a run directory with a config.json (docs/run-directory.md)\n")
        return 2

    directory = Path(arguments[0])
    for result in ("error.json", "score.json"):  # of an earlier call: never to be taken for this one's
        (directory / result).unlink(missing_ok=True)

    try:
        work(directory)
    except Exception as error:
        return _fail(directory, error)

    return 0


def read_request(directory: Path) -> Request:
    """Read config.json.

    Raises:
        ConfigError: it is missing, is not JSON, or has a field that is unknown, missing or out of bounds.
    """
    path = directory / "config.json"
    try:
        return Request.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors(include_url=False)
        ]
        raise ConfigError(f"{path}: {'; '.join(problems)}") from None


def device_of(request: Request) -> torch.device:
    """The device asked for, with the thread count and the choice of kernels set.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if request.threads is not None:
        torch.set_num_threads(request.threads)

    if request.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device here")

    if request.device == "cuda" and request.config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first product
        torch.use_deterministic_algorithms(True)

    return torch.device(request.device)


def resolve_precision(config: Config, device: torch.device) -> Precision:
    """The precision of the matrix products on this device.

    Raises:
        ConfigError: fp16 on a CPU, which would be about a hundred times slower than fp32.
    """
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision=fp16 needs CUDA; on a CPU use auto, bf16 or fp32")

    return precision_on("cuda" if device.type == "cuda" else "cpu", config.precision)


def describe_failure(error: Exception) -> dict[str, Any]:
    """error.json for `error`. On a CPU, and from CUDA's libraries, a failed allocation is a bare RuntimeError."""
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in NO_MEMORY)
    name = "out_of_memory" if memory else type(error).__name__
    if isinstance(error, TrainingError):
        name = error.code

    return {"error": name, "message": str(error), "step": getattr(error, "step", None)}


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far: allocated on the card; on a CPU resident, without the pages of files.

    Libraries and corpora are shared with other processes and dropped when memory gets short, and how much of them is
    resident depends on how the process was started.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)

    status = Path("/proc/self/status")
    peak = _kilobytes(status, "VmHWM") or 0  # not ru_maxrss: on Linux it starts at the parent's
    return peak - (_kilobytes(status, "RssFile") or 0)


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process could have: of the whole card, or of what a Linux host has to spare; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory

    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _fail(directory: Path, error: Exception) -> int:
    """Leave a traceback and error.json, as far as the disk has room for them; returns the exit code."""
    with suppress(OSError):
        traceback.print_exception(error)

    try:
        write_json(directory / "error.json", describe_failure(error))
    except OSError as unwritten:
        return NO_DISK if _is_for_want_of_disk(unwritten) else 1

    return NO_DISK if _is_for_want_of_disk(error) else 1


def _is_for_want_of_disk(error: BaseException | None) -> bool:
    # torch turns the OSError of a failed write into a RuntimeError, and leaves it as the context.
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return True

        error = error.__cause__ or error.__context__

    return False


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())

        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _kilobytes(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None

    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
