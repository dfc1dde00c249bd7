"""The Triton kernels as a backend. Triton is imported when a kernel first runs."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..tiles import BLOCK_D
from .base import QKV, AttentionBackend, NormBackend, Spans, gpu_capability_reasons

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Triton's interpreter keeps a bfloat16 as an integer: its products are off by 1e8, its casts truncate.
INTERPRETED = (torch.float16, torch.float32)


def norm_not_supported_reasons(device: str, dtype: torch.dtype, update_dtype: torch.dtype) -> list[str]:
    reasons, interpreted = [], _interpreted()
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed (pip install triton)")
    if device != "cuda" and not (device == "cpu" and interpreted):
        reasons.append(f"needs CUDA or ROCm tensors, got {device}")
    reasons += gpu_capability_reasons(device)
    for given in dict.fromkeys((dtype, update_dtype)):
        name = str(given).removeprefix("torch.")
        if given not in DTYPES:
            reasons.append(f"needs float16, bfloat16 or float32, got {name}")
        elif interpreted and given not in INTERPRETED:
            reasons.append(f"Triton's interpreter gets {name} wrong: unset TRITON_INTERPRET")
    return reasons


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of any device, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class TritonAttention(AttentionBackend):
    name = "triton"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        reasons = norm_not_supported_reasons(device, dtype, dtype)
        if head_dim not in BLOCK_D:
            reasons.append(f"needs a head dim of {', '.join(map(str, BLOCK_D))}, got {head_dim}")
        return reasons

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        from . import triton_attention

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return triton_attention.forward(q, k, v, queries, keys, softmax_scale)

    def backward(
        self,
        grads: QKV,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: Spans,
        keys: Spans,
        softmax_scale: float,
        deterministic: bool,
    ) -> None:
        from . import triton_attention

        with torch.cuda.device_of(q):
            triton_attention.backward(grads, grad_out, q, k, v, out, lse, queries, keys, softmax_scale)


class TritonNorm(NormBackend):
    name = "triton"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, update_dtype: torch.dtype) -> list[str]:
        return norm_not_supported_reasons(device, dtype, update_dtype)

    def forward(self, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from . import triton_norm

        with torch.cuda.device_of(residual):  # Triton launches on the current device
            return triton_norm.forward(residual, *rest)

    def backward(
        self, grad_x: Tensor | None, grad_y: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        from . import triton_norm

        with torch.cuda.device_of(grad_y):
            return triton_norm.backward(grad_x, grad_y, *rest)
