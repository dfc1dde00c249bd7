"""The oracle: softmax(q k^T * scale) v, group by group, in the dtype it is given."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import QKV, AttentionBackend, Spans, check_attention, wide_dtype


class Reference(AttentionBackend):
    name = "reference"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        return []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        check_attention(q, k, v, queries, keys, softmax_scale)
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide_dtype(q.dtype))
        for of_q, of_k in zip(_slices(queries), _slices(keys), strict=True):
            scores = _by_head(q[of_q]) @ _by_head(k[of_k]).transpose(-1, -2) * softmax_scale
            out[of_q] = (scores.softmax(-1) @ _by_head(v[of_k])).transpose(0, 1)
            lse[:, of_q] = scores.to(lse.dtype).logsumexp(-1)
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
        grad_q, grad_k, grad_v = grads
        for of_q, of_k in zip(_slices(queries), _slices(keys), strict=True):
            b_q, b_k, b_v, b_do = _by_head(q[of_q]), _by_head(k[of_k]), _by_head(v[of_k]), _by_head(grad_out[of_q])
            p = (b_q @ b_k.transpose(-1, -2) * softmax_scale).softmax(-1)
            ds = torch.ops.aten._softmax_backward_data(b_do @ b_v.transpose(-1, -2), p, -1, p.dtype) * softmax_scale
            grad_q[of_q] = (ds @ b_k).transpose(0, 1)
            grad_k[of_k] = (ds.transpose(-1, -2) @ b_q).transpose(0, 1)
            grad_v[of_k] = (p.transpose(-1, -2) @ b_do).transpose(0, 1)


def _by_head(rows: Tensor) -> Tensor:
    """(L, H, D) to (H, L, D)."""
    return rows.transpose(0, 1)


def _slices(spans: Spans) -> Iterator[slice]:
    begin, end = spans.cu_seqlens[:-1], spans.cu_seqlens[1:]
    if spans.seqused is not None:
        end = begin + spans.seqused
    return map(slice, begin.tolist(), end.tolist())
