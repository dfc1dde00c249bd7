"""PyTorch's flash attention for CPUs, one batched call for all groups of equal length.

No mask and no padding: the rows of equally long groups are gathered into (groups, L, H, D).
The calls are the two halves of `torch.nn.functional.scaled_dot_product_attention` on a CPU; taking them
one by one keeps the log-sum-exp, so that backward does not run the forward again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .groups import Groups, check_attention, wide_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    return [] if device == "cpu" else [f"needs CPU tensors, got {device}"]


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    check_attention(qkv, groups, softmax_scale)
    out = qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
    lse = qkv.new_empty(qkv.shape[2], qkv.shape[0], dtype=wide_dtype(qkv.dtype))
    for rows, shape in _equal_groups(groups.cu_seqlens, groups.num_prefix):
        q, k, v = _gather(qkv, rows, shape).unbind(2)
        o, lse_nHL = _flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, False, scale=softmax_scale)
        out.index_copy_(0, rows, o.transpose(1, 2).flatten(0, 1))
        lse.index_copy_(1, rows, lse_nHL.transpose(0, 1).flatten(1))
    return out, lse


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
    check_attention(qkv, groups, softmax_scale, out, lse, grad_out)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    for rows, shape in _equal_groups(groups.cu_seqlens, groups.num_prefix):
        q, k, v = _gather(qkv, rows, shape).unbind(2)
        o, g = (_gather(x, rows, shape) for x in (out, grad_out))
        lse_nHL = lse.index_select(1, rows).unflatten(1, shape).transpose(0, 1)
        grads = _flash_backward(
            g.transpose(1, 2),
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            o.transpose(1, 2),
            lse_nHL,
            0.0,
            False,
            scale=softmax_scale,
        )
        for i, grad in enumerate(grads):  # (n, H, L, D)
            grad_qkv[:, i].index_copy_(0, rows, grad.transpose(1, 2).flatten(0, 1))
    return grad_qkv


def _gather(x: Tensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    gathered: Tensor = x.index_select(0, rows).unflatten(0, shape)
    return gathered


def _equal_groups(cu_seqlens: Tensor, num_prefix: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """For each length that occurs: the rows of its groups, (n * L) int64, and (n, L), L with prefix rows."""
    bounds = cu_seqlens.numpy().astype(np.int64)
    num_groups = len(bounds) - 1
    lengths = np.diff(bounds)
    if (lengths < 0).any():
        raise ValueError(f"cu_seqlens: expected bounds that rise, got {cu_seqlens}")
    for length in np.unique(lengths):
        if num_prefix + length == 0:
            continue
        groups = np.flatnonzero(lengths == length)
        prefix = groups[:, None] * num_prefix + np.arange(num_prefix)
        patches = num_groups * num_prefix + bounds[groups, None] + np.arange(length)
        rows = np.concatenate([prefix, patches], axis=1)
        yield torch.from_numpy(rows.ravel()), (rows.shape[0], rows.shape[1])
