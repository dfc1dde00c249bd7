"""The oracle: softmax(q k^T * scale) v, group by group, in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    return []


def forward(
    qkv: Tensor, cu_seqlens: Tensor, num_prefix: int, max_seqlen: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    num_groups = cu_seqlens.shape[0] - 1
    bounds = cu_seqlens.tolist()
    out = torch.empty_like(qkv[:, 0])
    lse = torch.empty(out.shape[:2], device=qkv.device, dtype=lse_dtype(qkv.dtype))
    for g in range(num_groups):
        rows = torch.cat(
            [
                torch.arange(g * num_prefix, (g + 1) * num_prefix),
                num_groups * num_prefix + torch.arange(bounds[g], bounds[g + 1]),
            ]
        ).to(qkv.device)
        q, k, v = qkv[rows].permute(1, 2, 0, 3)  # each (H, L, D)
        scores = q @ k.transpose(-1, -2) * softmax_scale
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1)
        lse[rows] = scores.to(lse.dtype).logsumexp(-1).transpose(0, 1)
    return out, lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    num_prefix: int,
    max_seqlen: int,
    softmax_scale: float,
) -> Tensor:
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        again, _ = forward(leaf, cu_seqlens, num_prefix, max_seqlen, softmax_scale)
    return torch.autograd.grad(again, leaf, grad_out)[0]


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
