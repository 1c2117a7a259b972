"""Work on several CPU threads that do not wait for each other, for operations that are too small to be split.

torch splits an operation over its threads, which meet at its end: of the products of many small experts that wastes a
good part, and most where another process wants one of the processors. Here each thread takes the next piece of work and
computes it alone. A piece gives the same bits whoever computes it, and in whatever order.

They are torch's own threads: OpenMP's team, asked for through GNU OpenMP's entry point for a parallel region. Threads
of another pool would meet them on their processors, where they spin for milliseconds after torch's last operation. In a
parallel region torch, MKL and oneDNN do not split anything.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any, TypeVar

import torch

Piece = TypeVar("Piece")

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def for_each(work: Callable[[Piece], None], pieces: Iterable[Piece]) -> None:
    """work(piece) for each, without a graph, begun in their order; as many at once as torch has threads.

    One after another where torch was not built with GNU OpenMP. Raises what the first to fail has raised; what was not
    begun by then is left out.
    """
    waiting = iter(list(pieces))
    errors: list[BaseException] = []
    began: set[int] = set()

    def body(_: object) -> None:
        try:
            began.add(get_ident())
            with torch.no_grad():
                for piece in waiting:
                    work(piece)
                    if errors:
                        return
        except BaseException as error:  # which must not cross the region's end, KeyboardInterrupt among them
            errors.append(error)

    run = _parallel()
    if run is None:
        body(None)
    else:
        run(_Body(body), None, torch.get_num_threads(), 0)

    if errors:
        raise errors[0]

    if get_ident() not in began:  # a Ctrl-C before `try`, which ctypes has printed and passed over
        raise KeyboardInterrupt


@cache
def _parallel() -> Any:
    """GOMP_parallel(body, data, threads, flags) of the library that torch computes with (libgomp manual, chapter 8)."""
    for path in Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*"):
        try:
            library = ctypes.CDLL(path.name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)  # never a second one
        except OSError:
            continue

        run = library.GOMP_parallel
        run.argtypes = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        run.restype = None
        return run

    return None
