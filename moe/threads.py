"""Work on several CPU threads that do not wait for each other, for operations that are too small to be split.

torch splits an operation over its threads, which meet at its end: of the products of many small experts that wastes a
good part, and most where another process wants one of the processors. Here each thread takes the next piece of work and
computes it alone. A piece gives the same bits whoever computes it, and in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Piece = TypeVar("Piece")


def for_each(work: Callable[[Piece], None], pieces: Iterable[Piece]) -> None:
    """work(piece) for each, without a graph, begun in their order; as many at once as torch has threads.

    Raises what the first of them raises, in their order.
    """
    for _ in _pool(torch.get_num_threads()).map(work, pieces):
        pass


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="experts", initializer=_work_alone)
    started = Barrier(n_threads)
    for _ in pool.map(lambda _: started.wait(), range(n_threads)):
        pass

    torch.set_num_threads(n_threads)  # for threads to come: those of the pool have said 1
    return pool


def _work_alone() -> None:
    torch.get_num_threads()  # a thread takes over the common number when it first looks, and would then forget its own
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
