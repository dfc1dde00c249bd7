"""Implementations of the ops, by name; `base` says what one is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TypeVar

import torch

from .base import AttentionBackend, NormBackend
from .cpu import CPU
from .flash import Flash
from .flash3 import Flash3
from .flash4 import Flash4
from .native import Native, portable
from .native_rows import NativeNorm
from .reference import Reference
from .torch_norm import TorchNorm
from .triton import TritonAttention, TritonNorm
from .varlen import Varlen
from .xformers import Xformers

_Backend = TypeVar("_Backend", AttentionBackend, NormBackend)

# In the order in which `auto` prefers them; see `_preferred`.
BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        Native(),
        CPU(),
        TritonAttention(),
        Flash(),
        Varlen(),
        Xformers(),
        Flash4(),
        Flash3(),
        Reference(),
    )
}
NORM_BACKENDS: dict[str, NormBackend] = {backend.name: backend for backend in (NativeNorm(), TritonNorm(), TorchNorm())}


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
def choose_backend(backend: str, device: str, dtype: torch.dtype, head_dim: int, deterministic: bool = False) -> str:
    """Resolve `auto`, or confirm the backend asked for; one asked for by name never falls back.

    Raises:
        ValueError: no such backend, or it cannot run, with all reasons.
    """
    if backend == "auto":
        names = _preferred()
        return next(n for n in names if not not_supported_reasons(n, device, dtype, head_dim, deterministic))
    return _confirm(backend, not_supported_reasons(backend, device, dtype, head_dim, deterministic))


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


def _find(backends: Mapping[str, _Backend], backend: str) -> _Backend:
    if backend not in backends:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(backends)}")
    return backends[backend]


def _confirm(backend: str, reasons: list[str]) -> str:
    if reasons:
        raise ValueError(f"backend {backend!r} cannot run here: " + "; ".join(reasons))
    return backend
