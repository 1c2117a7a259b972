"""Keep memory that was freed: for training on a CPU, where asking the system for it again costs more than the work.

glibc returns every block over 32 MB to the system as it is freed, and the next step pays for its pages anew: 12 ms for
the gradient of 64 experts' stack of 38 MB, against 1 ms to write it.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on for this process. False where the C library is not glibc, and nothing was done."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
