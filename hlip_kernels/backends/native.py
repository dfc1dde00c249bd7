"""Attention on CPUs by the native library (`hlip_kernels.native`): prefix rows and patches are read where they lie."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native as library
from .groups import Groups

MAX_HEAD_DIM = 128


class _Attention(ctypes.Structure):
    """`struct Attention` of attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "cu_seqlens", "out", "lse", "grad_out", "grad_qkv", "scratch")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("groups", "num_prefix", "heads", "head_dim", "bfloat16", "threads")),
        ("softmax_scale", ctypes.c_float),
    )


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = library.not_supported_reasons(device, dtype)
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        reasons.append(f"needs a head dim that is a multiple of 16 and at most {MAX_HEAD_DIM}, got {head_dim}")
    return reasons


def portable() -> bool:
    """Whether there is nothing but code for any processor."""
    return library.native().isa == library.ISAS[0]


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty((qkv.shape[0], *qkv.shape[2:]), dtype=qkv.dtype)
    lse = torch.empty((qkv.shape[2], qkv.shape[0]), dtype=torch.float32)
    _run(qkv, groups, softmax_scale, out, lse)
    return out, lse


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
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
    functions, isa, _ = library.native()
    assert functions is not None
    qkv, cu_seqlens = qkv.contiguous(), groups.cu_seqlens.contiguous()
    call = _Attention(
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
    settings = ctypes.byref(call), library.ISAS.index(isa), int(grad_qkv is not None)
    call.scratch, memory = library.scratch(functions.hlip_attention_scratch(*settings))
    functions.hlip_attention(*settings)
    del memory  # not before
