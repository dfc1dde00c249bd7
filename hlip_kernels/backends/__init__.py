"""Implementations of one op.

Each module has `not_supported_reasons`, `tile_rows` (query and key rows of its tile maps; 0 for none), `forward` and
`backward`.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import cpu, reference, triton

BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "triton": triton,
    "reference": reference,
}  # in the order `auto` prefers them


def not_supported_reasons(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why `backend` cannot run on tensors of this device type, dtype and head dim; empty if it can.

    Raises:
        ValueError: no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[backend].not_supported_reasons(device, dtype, head_dim)


def choose_backend(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Resolve `auto`, or confirm the backend asked for; one asked for by name never falls back.

    Raises:
        ValueError: no such backend, or it cannot run, with all reasons.
    """
    if backend == "auto":
        return next(name for name in BACKENDS if not not_supported_reasons(name, device, dtype, head_dim))
    reasons = not_supported_reasons(backend, device, dtype, head_dim)
    if reasons:
        raise ValueError(f"backend {backend!r} cannot run here: " + "; ".join(reasons))
    return backend


def available_backends(device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64) -> list[str]:
    """The backends that can run on tensors of this device type, dtype and head dim, preferred first."""
    return [name for name in BACKENDS if not not_supported_reasons(name, device, dtype, head_dim)]
