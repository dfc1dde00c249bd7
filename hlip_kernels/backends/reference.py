"""The oracle: softmax(q k^T * scale) v, group by group, in the dtype it is given."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .groups import Groups, wide_dtype


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    return []


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
    lse = qkv.new_empty(qkv.shape[2], qkv.shape[0], dtype=wide_dtype(qkv.dtype))
    for rows in _rows(groups.cu_seqlens, groups.num_prefix):
        q, k, v = qkv[rows].permute(1, 2, 0, 3)  # each (H, L, D)
        scores = q @ k.transpose(-1, -2) * softmax_scale
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1)
        lse[:, rows] = scores.to(lse.dtype).logsumexp(-1)
    return out, lse


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
    grad_qkv = qkv.new_empty(qkv.shape)
    for rows in _rows(groups.cu_seqlens, groups.num_prefix):
        q, k, v = qkv[rows].permute(1, 2, 0, 3)
        do = grad_out[rows].transpose(0, 1)
        p = (q @ k.transpose(-1, -2) * softmax_scale).softmax(-1)
        ds = torch.ops.aten._softmax_backward_data(do @ v.transpose(-1, -2), p, -1, p.dtype) * softmax_scale
        grads = torch.stack([ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do])  # (3, H, L, D)
        grad_qkv[rows] = grads.permute(2, 0, 1, 3)
    return grad_qkv


def _rows(cu_seqlens: Tensor, num_prefix: int) -> Iterator[Tensor]:
    """The rows of each group: its prefix rows, then its patches."""
    bounds = cu_seqlens.tolist()
    patches = (len(bounds) - 1) * num_prefix
    for g, (start, end) in enumerate(pairwise(bounds)):
        prefix = torch.arange(g * num_prefix, (g + 1) * num_prefix)
        yield torch.cat([prefix, patches + torch.arange(start, end)]).to(cu_seqlens.device)
