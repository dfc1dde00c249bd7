"""The Triton kernels as a backend. Triton is imported when a kernel first runs."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..configs import BLOCK_D, architecture, attention_config
from .groups import Groups

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed (pip install triton)")
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        reasons.append(f"needs CUDA or ROCm tensors, or TRITON_INTERPRET=1 for CPU tensors; got {device}")
    if dtype not in DTYPES:
        reasons.append(f"needs float16, bfloat16 or float32, got {str(dtype).removeprefix('torch.')}")
    if head_dim not in BLOCK_D:
        reasons.append(f"needs a head dim of {', '.join(map(str, BLOCK_D))}, got {head_dim}")
    return reasons


def tile_rows(device: torch.device, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> tuple[int, int]:
    config = attention_config(architecture(device.index or 0), dtype, head_dim, max_seqlen)
    return config.forward.rows, config.dkdv.rows


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    from . import triton_attention

    if not softmax_scale > 0:
        raise ValueError(f"backend 'triton' needs a softmax_scale above 0, got {softmax_scale}")
    return triton_attention.forward(qkv, groups, softmax_scale)


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
    from . import triton_attention

    return triton_attention.backward(grad_out, qkv, out, lse, groups, softmax_scale)
