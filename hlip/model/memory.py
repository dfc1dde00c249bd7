"""Settings of the allocator for memory that tensors on the host leave."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
# How glibc starts, and where its own adjustments of the thresholds end.
DEFAULTS = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65536}


def keep_memory() -> None:
    """Keep what is freed for the next tensor, instead of returning it to the system. For whole programs, on CPUs.

    glibc maps every block of more than 32 MiB anew, and the system clears each of its pages when it is first written:
    a projection of ten thousand rows then takes as long again as its product. The process does not grow beyond what it
    needs at once, but for gaps, nor does it shrink. Elsewhere than with glibc nothing changes.
    """
    _set({TRIM_THRESHOLD: -1, MMAP_MAX: 0})


def release_memory(_: int = 0) -> None:
    """Undo `keep_memory`, and return what is free; a worker of a DataLoader may begin with it."""
    _set(DEFAULTS)
    return_memory()


def return_memory() -> None:
    """Return what is free at the moment to the system."""
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


def _set(values: dict[int, int]) -> None:
    if (mallopt := _libc("mallopt")) is not None:
        for name, value in values.items():
            mallopt(name, value)


def _libc(name: str) -> Any:
    """A function of glibc; None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
