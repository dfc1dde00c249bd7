"""The native library: C++ kernels for CPUs behind a plain C interface, loaded by ctypes.

It knows nothing of Python or PyTorch, so one build serves all versions of both. It is not linked to an OpenMP runtime
either: importing torch has loaded one into the process, whose functions the library finds, so that both work with the
same threads.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
from pathlib import Path
from typing import NamedTuple

import torch  # also loads the OpenMP runtime

from .interface import ISAS as ISAS
from .interface import load

DTYPES = (torch.float32, torch.bfloat16)
PATH = Path(__file__).parent / "libhlip_native.so"
HUGE_PAGE = 2 << 20
KEPT = 256 << 20  # bytes of scratch that a thread keeps between calls
BUILD = "pip install -e . in a clone, else pip install --force-reinstall --no-deps --no-cache-dir hlip-kernels"


class Native(NamedTuple):
    """library: the functions, None if there are none, and reason why not.
    isa: the best that this processor has, of `ISAS`."""

    library: ctypes.CDLL | None
    isa: str
    reason: str


@functools.cache
def native() -> Native:
    """The library and what it can use here.

    Raises:
        ValueError: HLIP_NATIVE_ISA, which the tests set, names something that is not here.
    """
    if not PATH.exists():
        return Native(None, "", f"the native library is not built (install g++, then: {BUILD})")
    try:
        library = load(PATH)
    except (OSError, ValueError) as error:
        return Native(None, "", f"the native library cannot be loaded: {error}. Build it again (with g++: {BUILD})")
    best = library.hlip_isa()
    asked = os.environ.get("HLIP_NATIVE_ISA", ISAS[best])
    if asked not in ISAS[: best + 1]:
        raise ValueError(f"HLIP_NATIVE_ISA: this processor has {', '.join(ISAS[: best + 1])}; got {asked!r}")
    return Native(library, asked, "")


def not_supported_reasons(device: str, dtype: torch.dtype) -> list[str]:
    """Why no kernel of the library can run on tensors of this device type and dtype; empty if they can."""
    reasons = []
    if device != "cpu":
        reasons.append(f"needs CPU tensors, got {device}")
    if reason := native().reason:
        reasons.append(reason)
    if dtype not in DTYPES:
        reasons.append(f"needs bfloat16 or float32, got {str(dtype).removeprefix('torch.')}")
    return reasons


class _Scratch(threading.local):
    memory: mmap.mmap | None = None


_scratch = _Scratch()


def scratch(size: int) -> tuple[int, mmap.mmap]:
    """The address of `size` bytes on huge pages, aligned to one, and what keeps them alive.

    A thread is given the same memory again: fresh pages would be cleared at every call.
    """
    size += HUGE_PAGE
    memory = _scratch.memory
    if memory is None or len(memory) < size:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        if size <= KEPT:
            _scratch.memory = memory
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return -(-address // HUGE_PAGE) * HUGE_PAGE, memory


def release_scratch() -> None:
    """Give back what `scratch` keeps for the calling thread."""
    _scratch.memory = None
