"""Attention on CPUs by the native library (`hlip_kernels.native`): prefix rows and patches are read where they lie."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native as library
from ..native.interface import ISAS, Attention
from .groups import Groups, check_attention

MAX_HEAD_DIM = 128


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = library.not_supported_reasons(device, dtype)
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        reasons.append(f"needs a head dim that is a multiple of 16 and at most {MAX_HEAD_DIM}, got {head_dim}")
    return reasons


def portable() -> bool:
    """Whether there is nothing but code for any processor."""
    return library.native().isa == ISAS[0]


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    check_attention(qkv, groups, softmax_scale)
    out = torch.empty((qkv.shape[0], *qkv.shape[2:]), dtype=qkv.dtype)
    lse = torch.empty((qkv.shape[2], qkv.shape[0]), dtype=torch.float32)
    _run(qkv, groups, softmax_scale, out, lse)
    return out, lse


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
    check_attention(qkv, groups, softmax_scale, out, lse, grad_out)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    _run(qkv, groups, softmax_scale, out.contiguous(), lse.contiguous(), grad_out.contiguous(), grad_qkv)
    return grad_qkv


def _run(
    qkv: Tensor,
    groups: Groups,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None = None,
    grad_qkv: Tensor | None = None,
) -> None:
    if reasons := not_supported_reasons(qkv.device.type, qkv.dtype, qkv.shape[3]):
        raise ValueError("the native library cannot run here: " + "; ".join(reasons))
    functions, isa, _ = library.native()
    assert functions is not None
    qkv, cu_seqlens = qkv.contiguous(), groups.cu_seqlens.contiguous()
    call = Attention(
        *(None if x is None else x.data_ptr() for x in (qkv, cu_seqlens, out, lse, grad_out, grad_qkv)),
        None,
        rows=qkv.shape[0],
        groups=cu_seqlens.shape[0] - 1,
        num_prefix=groups.num_prefix,
        heads=qkv.shape[2],
        head_dim=qkv.shape[3],
        bfloat16=qkv.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        softmax_scale=softmax_scale,
    )
    settings = ctypes.byref(call), ISAS.index(isa), int(grad_qkv is not None)
    size = functions.hlip_attention_scratch(*settings)
    if size < 0:
        raise ValueError(f"cu_seqlens: expected bounds that rise from 0 to the last patch, got {cu_seqlens}")
    call.scratch, memory = library.scratch(size)
    functions.hlip_attention(*settings)
    del memory  # not before
