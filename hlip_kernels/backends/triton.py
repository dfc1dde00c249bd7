"""The Triton kernels as a backend. Triton is imported when a kernel first runs."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..configs import BLOCK_D
from .groups import Groups, gpu_capability_reasons

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = norm_not_supported_reasons(device, dtype)
    if head_dim not in BLOCK_D:
        reasons.append(f"needs a head dim of {', '.join(map(str, BLOCK_D))}, got {head_dim}")
    return reasons


def norm_not_supported_reasons(device: str, dtype: torch.dtype) -> list[str]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed (pip install triton)")
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        reasons.append(f"needs CUDA or ROCm tensors, or TRITON_INTERPRET=1 for CPU tensors; got {device}")
    reasons += gpu_capability_reasons(device)
    if dtype not in DTYPES:
        reasons.append(f"needs float16, bfloat16 or float32, got {str(dtype).removeprefix('torch.')}")
    return reasons


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    from . import triton_attention

    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        return triton_attention.forward(qkv, groups, softmax_scale)


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
    from . import triton_attention

    with torch.cuda.device_of(qkv):
        return triton_attention.backward(grad_out, qkv, out, lse, groups, softmax_scale)


def norm_forward(residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import triton_norm

    with torch.cuda.device_of(residual):
        return triton_norm.forward(residual, *rest)


def norm_backward(grad_x: Tensor | None, grad_y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import triton_norm

    with torch.cuda.device_of(grad_y):
        return triton_norm.backward(grad_x, grad_y, *rest)
