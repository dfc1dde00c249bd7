"""PyTorch's flash attention for CPUs, one batched call for all groups of equal lengths.

No mask and no padding. Groups that follow one another are read where they lie; those of equal lengths that do not are
gathered into (n, L, H, D). The calls are the two halves of `torch.nn.functional.scaled_dot_product_attention` on a CPU;
taking them one by one keeps the log-sum-exp, so that backward does not run the forward again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import QKV, AttentionBackend, Spans, bounds_on_host, check_attention, wide_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CPU(AttentionBackend):
    name = "cpu"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        return [] if device == "cpu" else [f"needs CPU tensors, got {device}"]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        check_attention(q, k, v, queries, keys, softmax_scale)
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide_dtype(q.dtype))
        for of_q, of_k in _equal_groups(q, k, queries, keys):
            if 0 in (of_q.shape[1], of_k.shape[1]):
                of_q.put(out, torch.zeros(()))
                of_q.put(lse.T, torch.tensor(-torch.inf))
                continue
            o, lse_nHL = _flash(of_q.get(q), of_k.get(k), of_k.get(v), 0.0, False, scale=softmax_scale)
            of_q.put(out, o.transpose(1, 2).flatten(0, 1))
            of_q.put(lse.T, lse_nHL.transpose(1, 2).flatten(0, 1))
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
        for of_q, of_k in _equal_groups(q, k, queries, keys):
            if 0 in (of_q.shape[1], of_k.shape[1]):
                results = (torch.zeros(()),) * 3
            else:
                tensors = of_q.get(grad_out), of_q.get(q), of_k.get(k), of_k.get(v), of_q.get(out)
                lse_nHL = of_q.get(lse.T[..., None])[..., 0]
                results = _flash_backward(*tensors, lse_nHL, 0.0, False, scale=softmax_scale)
                results = tuple(grad.transpose(1, 2).flatten(0, 1) for grad in results)
            for grad, rows, result in zip(grads, (of_q, of_k, of_k), results, strict=True):
                rows.put(grad, result)


class _Rows(NamedTuple):
    """The rows of n groups that have L rows each: (n, L). rows: a run of them, or (n * L) int64."""

    rows: slice | Tensor
    shape: tuple[int, int]

    def get(self, x: Tensor) -> Tensor:
        """(R, H, D) to (n, H, L, D)."""
        gathered: Tensor = x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)
        if gathered.stride(-1) != 1:
            gathered = gathered.contiguous()
        groups: Tensor = gathered.unflatten(0, self.shape)
        return groups.transpose(1, 2)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write (n * L, ...) into the rows of x (R, ...)."""
        x[self.rows] = values.to(x.dtype)


def _equal_groups(q: Tensor, k: Tensor, queries: Spans, keys: Spans) -> Iterator[tuple[_Rows, _Rows]]:
    """For every pair of lengths that occurs: the rows of its groups, of queries and of keys."""
    of_q = bounds_on_host("queries", queries, q.shape[0])
    of_k = bounds_on_host("keys", keys, k.shape[0])
    lengths = np.stack([of_q[1], of_k[1]], axis=1)
    for pair in np.unique(lengths, axis=0):
        if pair.any():
            groups = np.flatnonzero((lengths == pair).all(1))
            yield _rows_of(of_q[0][groups], int(pair[0])), _rows_of(of_k[0][groups], int(pair[1]))


def _rows_of(begin: np.ndarray, length: int) -> _Rows:
    shape = len(begin), length
    if (np.diff(begin) == length).all():
        return _Rows(slice(int(begin[0]), int(begin[0]) + length * len(begin)), shape)
    return _Rows(torch.from_numpy((begin[:, None] + np.arange(length)).ravel()), shape)
