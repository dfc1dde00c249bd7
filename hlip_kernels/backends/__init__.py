"""Implementations of the ops, by name; `base` says what one is."""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.torch_version import TorchVersion

from ..layout import Level
from ..tiles import Measured, architecture, evidence, row_of, user_table
from .base import AttentionBackend, NormBackend
from .external import LibraryBackend, installed
from .native import portable
from .triton import TritonAttention

_Backend = TypeVar("_Backend", AttentionBackend, NormBackend)

log = logging.getLogger(__name__)
_logged: set[str] = set()


def _made(*classes: str) -> dict[str, Any]:
    """Make a backend of each class, MODULE:CLASS in this folder, and return them by name."""
    backends = [pkgutil.resolve_name(f"{__name__}.{name}")() for name in classes]
    return {backend.name: backend for backend in backends}


# A line each, in the order in which `auto` prefers them where nothing was measured; see `_preferred`.
BACKENDS: dict[str, AttentionBackend] = _made(
    "native:Native",
    "cpu:CPU",
    "triton:TritonAttention",
    "flash:Flash",
    "varlen:Varlen",
    "xformers:Xformers",
    "flash4:Flash4",
    "flash3:Flash3",
    "reference:Reference",
)
NORM_BACKENDS: dict[str, NormBackend] = _made(
    "native_norm_gelu:NativeNorm",
    "triton:TritonNorm",
    "torch_norm:TorchNorm",
)


def not_supported_reasons(
    backend: str, device: str, dtype: torch.dtype, head_dim: int, deterministic: bool = False
) -> list[str]:
    """Why `backend` cannot run attention on tensors of this device type, dtype and head dim; empty if it can.

    Raises:
        ValueError: no such backend.
    """
    chosen = _find(BACKENDS, backend)
    reasons = chosen.not_supported_reasons(device, dtype, head_dim)
    if deterministic:
        reasons = [*reasons, *chosen.not_repeating_reasons(device, dtype, head_dim)]
    return reasons


def available_backends(device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64) -> list[str]:
    """The backends that can run on tensors of this device type, dtype and head dim, preferred first."""
    return [name for name in _preferred() if not not_supported_reasons(name, device, dtype, head_dim)]


@functools.cache
def choose_backend(
    backend: str,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    deterministic: bool = False,
    level: Level | None = None,
) -> str:
    """Resolve `auto`, or confirm the backend asked for; one asked for by name never falls back.

    On a GPU, `auto` takes another library in place of our kernels where `measured_of` says that it is faster at
    `level`; with None it does not look. Lengths do not count: a study's bits must not depend on its batch.

    Raises:
        ValueError: no such backend, or it cannot run, with all reasons; or a measured table cannot be read.
    """
    if backend != "auto":
        return _confirm(backend, not_supported_reasons(backend, device, dtype, head_dim, deterministic))
    names = _preferred()
    usual = next(n for n in names if not not_supported_reasons(n, device, dtype, head_dim, deterministic))
    if usual != TritonAttention.name or device != "cuda" or level is None:
        return usual
    return _faster(level, dtype, head_dim, deterministic) or usual


def measured_of(dtype: torch.dtype, head_dim: int) -> list[Measured]:
    """The rows of measured tables for GPUs like the current one: the user's, then that of this library's evidence.

    Empty for float32 and float64, where `auto` stays with our kernels: of the libraries, xformers alone takes float32.
    """
    if dtype.itemsize != 2 or not torch.cuda.is_available():
        return []
    arch = architecture(torch.cuda.current_device())
    row = row_of(arch, dtype, head_dim)
    return [table[row] for table in (user_table(), evidence(arch)) if row in table]


def unmeasured_libraries(dtype: torch.dtype, head_dim: int) -> list[str]:
    """Other libraries that are installed, and of which no table says whether they are faster on this GPU.

    Whether they can run is not asked: for that they would be imported, which takes some of them seconds.
    """
    if dtype.itemsize != 2 or not torch.cuda.is_available():
        return []
    timed = {
        name
        for measured in measured_of(dtype, head_dim)
        for name in chain(measured.refused, *(choice.ms["training"] for choice in measured.levels.values()))
    }
    libraries = {name: backend for name, backend in BACKENDS.items() if isinstance(backend, LibraryBackend)}
    return [name for name, library in libraries.items() if name not in timed and library.is_installed()]


@functools.cache
def choose_norm_backend(backend: str, device: str, dtype: torch.dtype, update_dtype: torch.dtype) -> str:
    """The same for the backends of `add_regroup_norm`. On the CPU, `auto` is never Triton's interpreter."""
    if backend == "auto":
        backend = "native" if device == "cpu" else "triton"
        if _find(NORM_BACKENDS, backend).not_supported_reasons(device, dtype, update_dtype):
            backend = "torch"
    return _confirm(backend, _find(NORM_BACKENDS, backend).not_supported_reasons(device, dtype, update_dtype))


def _preferred() -> list[str]:
    """All backends in the order of `auto`. Native code for any processor is slower than PyTorch's for this one."""
    return sorted(BACKENDS, key=lambda name: name == "native") if portable() else list(BACKENDS)


def _faster(level: Level, dtype: torch.dtype, head_dim: int, deterministic: bool) -> str | None:
    """The library that was measured faster than our kernels; None if none was, or it cannot run any more."""
    if names := unmeasured_libraries(dtype, head_dim):
        _log_once(
            "unmeasured",
            logging.INFO,
            f"installed, but not measured on this GPU: {', '.join(names)}. Attention takes our kernels unless "
            "`python bench/attention.py --tune` measures that another library is faster",
        )
    for measured in measured_of(dtype, head_dim):
        if level in measured.levels:
            choice = measured.levels[level]
            name = choice.deterministic if deterministic else choice.backend
            if name == TritonAttention.name:
                return None
            if not (reasons := _not_as_measured(name, measured, dtype, head_dim, deterministic)):
                return name
            message = f"attention takes our kernels in place of {name}, which was measured faster: {'; '.join(reasons)}"
            _log_once(name, logging.WARNING, message)
            return None
    return None


def _not_as_measured(
    name: str, measured: Measured, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> list[str]:
    """List reasons against a library that was measured: it must be able to run, and as new as it was then."""
    library = BACKENDS.get(name)
    if not isinstance(library, LibraryBackend):
        return ["there is no such backend"]
    if reasons := not_supported_reasons(name, "cuda", dtype, head_dim, deterministic):
        return reasons
    now, then = installed(library.package), measured.versions.get(library.package)
    if now and then and _release(now) < _release(then):
        return [f"{library.package} {now} is older than {then}, which was measured"]
    return []


def _release(version: str) -> TorchVersion:
    """A version that compares as releases follow one another, without the name of a local build behind a +."""
    return TorchVersion(version.partition("+")[0])


def _log_once(topic: str, level: int, message: str) -> None:
    """One line a process and topic."""
    if topic not in _logged:
        _logged.add(topic)
        log.log(level, message)


def _find(backends: Mapping[str, _Backend], backend: str) -> _Backend:
    if backend not in backends:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(backends)}")
    return backends[backend]


def _confirm(backend: str, reasons: list[str]) -> str:
    if reasons:
        raise ValueError(f"backend {backend!r} cannot run here: " + "; ".join(reasons))
    return backend
