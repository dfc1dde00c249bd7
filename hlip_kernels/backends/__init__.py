"""Implementations of the ops.

A module for attention has `not_supported_reasons`, `forward` and `backward`; one for the norm has
`norm_not_supported_reasons`, `norm_forward` and `norm_backward`.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from . import cpu, flash, native, native_rows, reference, torch_norm, triton, varlen, xformers

# In the order in which `auto` prefers them; see `_preferred`.
BACKENDS: dict[str, ModuleType] = {
    "native": native,
    "cpu": cpu,
    "triton": triton,
    "flash": flash,
    "varlen": varlen,
    "xformers": xformers,
    "reference": reference,
}
NORM_BACKENDS: dict[str, ModuleType] = {"native": native_rows, "triton": triton, "torch": torch_norm}


def not_supported_reasons(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why `backend` cannot run attention on tensors of this device type, dtype and head dim; empty if it can.

    Raises:
        ValueError: no such backend.
    """
    reasons: list[str] = _find(BACKENDS, backend).not_supported_reasons(device, dtype, head_dim)
    return reasons


def available_backends(device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64) -> list[str]:
    """The backends that can run on tensors of this device type, dtype and head dim, preferred first."""
    return [name for name in _preferred() if not not_supported_reasons(name, device, dtype, head_dim)]


@functools.cache
def choose_backend(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Resolve `auto`, or confirm the backend asked for; one asked for by name never falls back.

    Raises:
        ValueError: no such backend, or it cannot run, with all reasons.
    """
    if backend == "auto":
        return available_backends(device, dtype, head_dim)[0]
    return _confirm(backend, not_supported_reasons(backend, device, dtype, head_dim))


@functools.cache
def choose_norm_backend(backend: str, device: str, dtype: torch.dtype, update_dtype: torch.dtype) -> str:
    """The same for the backends of `add_regroup_norm`. On the CPU, `auto` is never Triton's interpreter."""
    if backend == "auto":
        backend = "native" if device == "cpu" else "triton"
        if _find(NORM_BACKENDS, backend).norm_not_supported_reasons(device, dtype, update_dtype):
            backend = "torch"
    return _confirm(backend, _find(NORM_BACKENDS, backend).norm_not_supported_reasons(device, dtype, update_dtype))


def _preferred() -> list[str]:
    """All backends in the order of `auto`. Native code for any processor is slower than PyTorch's for this one."""
    return sorted(BACKENDS, key=lambda name: name == "native") if native.portable() else list(BACKENDS)


def _find(backends: dict[str, ModuleType], backend: str) -> ModuleType:
    if backend not in backends:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(backends)}")
    return backends[backend]


def _confirm(backend: str, reasons: list[str]) -> str:
    if reasons:
        raise ValueError(f"backend {backend!r} cannot run here: " + "; ".join(reasons))
    return backend
