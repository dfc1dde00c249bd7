"""Attention on CPUs by the native library (`hlip_kernels.native`): rows are read and written where they lie."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native as library
from ..native.interface import ISAS, Attention
from .base import QKV, AttentionBackend, Spans, bounds_on_host, check_attention

MAX_HEAD_DIM = 128


def portable() -> bool:
    """Whether there is nothing but code for any processor."""
    return library.native().isa == ISAS[0]


class Native(AttentionBackend):
    name = "native"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        reasons = library.not_supported_reasons(device, dtype)
        if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
            reasons.append(f"needs a head dim that is a multiple of 16 and at most {MAX_HEAD_DIM}, got {head_dim}")
        return reasons

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        check_attention(q, k, v, queries, keys, softmax_scale)
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        self._run(q, k, v, queries, keys, softmax_scale, out, lse)
        return out, lse

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
        check_attention(q, k, v, queries, keys, softmax_scale, out, lse, grad_out, grads)
        written = (*_of_one_stride(grads[0]), *_of_one_stride(*grads[1:]))
        results = out.contiguous(), lse.contiguous(), grad_out.contiguous()
        self._run(q, k, v, queries, keys, softmax_scale, *results, written)
        for grad, x in zip(grads, written, strict=True):
            if grad is not x:
                grad.copy_(x)

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Spans,
        keys: Spans,
        softmax_scale: float,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor | None = None,
        grads: tuple[Tensor, ...] = (),
    ) -> None:
        if reasons := self.not_supported_reasons(q.device.type, q.dtype, q.shape[2]):
            raise ValueError("the native library cannot run here: " + "; ".join(reasons))
        functions, isa, _ = library.native()
        assert functions is not None
        (q,), (k, v) = _of_one_stride(q), _of_one_stride(k, v)
        tensors = {
            "q": q,
            "k": k,
            "v": v,
            "out": out,
            "lse": lse,
            "grad_out": grad_out,
            **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=False)),
            "q_bounds": queries.cu_seqlens.contiguous(),
            "k_bounds": keys.cu_seqlens.contiguous(),
            "q_used": _contiguous(queries.seqused),
            "k_used": _contiguous(keys.seqused),
        }
        call = Attention(
            **{name: x.data_ptr() for name, x in tensors.items() if x is not None},
            q_rows=q.shape[0],
            k_rows=k.shape[0],
            q_stride=_stride(q),
            k_stride=_stride(k),
            grad_q_stride=_stride(grads[0]) if grads else 0,
            grad_k_stride=_stride(grads[1]) if grads else 0,
            groups=queries.cu_seqlens.shape[0] - 1,
            heads=q.shape[1],
            head_dim=q.shape[2],
            bfloat16=q.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            softmax_scale=softmax_scale,
        )
        settings = ctypes.byref(call), ISAS.index(isa), int(bool(grads))
        size = functions.hlip_attention_scratch(*settings)
        if size < 0:
            for name, spans, x in (("queries", queries, q), ("keys", keys, k)):
                bounds_on_host(name, spans, x.shape[0])  # says what is wrong
        assert size >= 0
        call.scratch, memory = library.scratch(size)
        functions.hlip_attention(*settings)
        del memory  # not before


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _stride(x: Tensor) -> int | None:
    """Elements from a row to the next, if rows lie apart and the heads of a row side by side; None otherwise."""
    rows, heads, head_dim = x.shape
    if rows == 0:
        return heads * head_dim
    side_by_side = x.stride(2) == 1 and (heads == 1 or x.stride(1) == head_dim)
    stride = x.stride(0) if rows > 1 else heads * head_dim
    return stride if side_by_side and stride >= heads * head_dim else None


def _of_one_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors where they lie, if the library can work there; copies of those that must move otherwise."""
    strides = {_stride(x) for x in tensors}
    if len(strides) == 1 and None not in strides:
        return tensors
    return tuple(x.contiguous() for x in tensors)
