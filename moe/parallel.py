"""Several processes train one model: data parallel, on one host, with gloo between CPUs and NCCL between cards.

The first process is the one that was asked (`python -m moe.train DIR`). It starts the others (moe/worker.py), and is
the only one that writes to DIR. Each computes every n-th micro-batch of a step; gradients are summed, and since all
apply the same sum to the same weights, these stay equal, bit for bit, and are never sent.

All end together: the others when the first does, however it ends, for their standard input is a pipe from it; the
first with an error that says why, when one of them ends before its time.

What this does not do: span hosts, or share out weights and optimizer states, of which each process has its own. NCCL
has not been tried yet.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moe.config import ConfigError
from moe.rundir import Request, describe_failure, write_json

HOST = "127.0.0.1"
WAIT = timedelta(hours=1)  # for one another: while the first evaluates or writes a checkpoint, the others wait
LARGE = 2**20  # elements of a gradient that is summed in place; smaller ones are joined, as each sum takes half a ms
NOTICE_SECONDS = 10.0  # from another process's end until the first must have said so; in a CUDA kernel it never would
END_SECONDS = 60.0  # for the others to end by themselves after the last step

FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Signals that a process gets from somebody else: the kernel when memory is used up, or who ends a machine."""

LOST = 75
"""Exit code of a process that ended because another one had."""


class LostProcessError(RuntimeError):
    """Another process of the run ended before its time. Raised by Team in any process, by lead() with the reason."""


class KilledProcessError(LostProcessError):
    """It was killed from outside, through no fault of the run's. Raised by lead(); the runner knows it by its name."""


@dataclass(frozen=True)
class Team:
    """This process among those of its run, and what they do together: each method is called by all, in equal order.

    Alone, a process is its own sum. Every method raises LostProcessError when another process is gone.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process: the one that evaluates and writes."""
        return self.rank == 0

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes: the same bits in all, and each time."""
        if self.size > 1:
            with _noticing():
                for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                    work.wait()

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients; a process that had no micro-batch of this step adds zeros."""
        if self.size == 1:
            return

        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

            gradients.append(parameter.grad)

        small = [gradient for gradient in gradients if gradient.numel() < LARGE]
        joined = torch.cat([gradient.flatten() for gradient in small])
        self.add(joined, *(gradient for gradient in gradients if gradient.numel() >= LARGE))
        for gradient, part in zip(small, torch.split(joined, [gradient.numel() for gradient in small]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def from_first(self, content: Any) -> Any:
        """What the first process passes; other processes pass anything."""
        if self.size == 1:
            return content

        contents = [content]
        with _noticing():
            dist.broadcast_object_list(contents, device=torch.device("cpu"))

        return contents[0]


@contextmanager
def lead(directory: Path, request: Request) -> Iterator[Team]:
    """The first process's part: start the others, and be one of them until the run is over.

    Raises:
        ConfigError: more processes than cards.
        LostProcessError, MemoryError: another process ended before its time, and why.
    """
    if request.processes == 1:
        yield Team()
        return

    if request.device == "cuda" and request.processes > torch.cuda.device_count():
        raise ConfigError(f"processes={request.processes} need a card each, but torch sees {torch.cuda.device_count()}")

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: nothing is to listen on a network
    listener = socket.create_server((HOST, 0))  # for the same reason: a TCPStore left to itself listens on all
    port = listener.getsockname()[1]
    store = TCPStore(
        HOST, port, request.processes, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    others = _Others(directory, request.processes, port)
    try:
        with _joined(request, store, rank=0) as team:
            yield team

        others.wait()
    except LostProcessError as error:
        raise others.reason() or error from None
    finally:
        others.end()


@contextmanager
def join(request: Request, rank: int, port: int) -> Iterator[Team]:
    """Another process's part, from moe/worker.py. Ends this process as soon as the first one has ended."""
    threading.Thread(target=_end_with_first, daemon=True).start()
    with _joined(request, TCPStore(HOST, port, request.processes, is_master=False), rank) as team:
        yield team


class _Others:
    """The processes that the first one started, each watched by a thread."""

    def __init__(self, directory: Path, processes: int, port: int) -> None:
        self.directory = directory
        self.lost: list[tuple[int, int, bytes]] = []  # rank, exit code, what it said of itself
        self.noticed, self.over = threading.Event(), threading.Event()
        root = str(Path(__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "moe.worker", str(directory), str(rank), str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                close_fds=False,  # the runner's locks are to be held until all of us are dead
                env=environment,
            )
            for rank in range(1, processes)
        ]
        self.threads = [
            threading.Thread(target=self._watch, args=(rank, process), daemon=True)
            for rank, process in enumerate(self.processes, start=1)
        ]
        for thread in self.threads:
            thread.start()

    def wait(self) -> None:
        """Until they have ended by themselves.

        Raises:
            LostProcessError: one of them did not end well.
        """
        for thread in self.threads:
            thread.join(END_SECONDS)

        if self.lost:
            raise LostProcessError("another process failed at its end")

    def end(self) -> None:
        """Make them end, whatever they do."""
        self.over.set()
        for process, thread in zip(self.processes, self.threads, strict=True):
            assert process.stdin is not None
            process.stdin.close()
            thread.join(NOTICE_SECONDS)
            process.kill()  # nothing, if it has ended
            thread.join()

    def reason(self) -> Exception | None:
        """Why the first of them ended that did so by itself, as far as it is known in time."""
        self.noticed.wait(NOTICE_SECONDS)
        return explain(self.lost)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        said = process.stdout.read()
        process.stdout.close()
        code = process.wait()
        if code == 0 or self.over.is_set():
            return

        self.lost.append((rank, code, said))
        self.noticed.set()
        if not self.over.wait(NOTICE_SECONDS):
            failure = self.reason()
            assert failure is not None
            sys.stderr.write(f"{failure}\n")
            write_json(self.directory / "error.json", describe_failure(failure))
            os._exit(1)


def explain(lost: Sequence[tuple[int, int, bytes]]) -> Exception | None:
    """What to say of processes that ended before their time: of the one that did not just follow another.

    Args:
        lost: of each its rank, its exit code (negative: the signal) and what it wrote on stdout.
    """
    for rank, code, said in sorted(lost, key=lambda process: process[1] == LOST):
        if not said:
            kind = KilledProcessError if -code in FROM_OUTSIDE else LostProcessError
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return kind(f"process {rank} of the run {how}")

        failure = json.loads(said.splitlines()[-1])
        if failure["error"] == "out_of_memory":
            return MemoryError(f"process {rank} of the run: {failure['message']}")

        return LostProcessError(f"process {rank} of the run: {failure['error']}: {failure['message']}")

    return None


@contextmanager
def _joined(request: Request, store: TCPStore, rank: int) -> Iterator[Team]:
    if request.device == "cuda":
        torch.cuda.set_device(rank)

    if request.threads is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // request.processes))

    with _noticing():
        backend = "cpu:gloo,cuda:nccl" if request.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=request.processes, timeout=WAIT)

    try:
        yield Team(rank, request.processes)
    finally:
        dist.destroy_process_group()


@contextmanager
def _noticing() -> Iterator[None]:
    # In the midst of a sum, gloo and NCCL report a lost connection as a RuntimeError.
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(str(error)) from error


def _end_with_first() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock a daemon thread would take into the interpreter's end
    os._exit(LOST)
