"""What the backends of other libraries share: rows group by group, prefix rows before patches, as packed sequences.

All of it is arithmetic on the tensors' device: nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .groups import Groups, gpu_capability_reasons

FLASH_HEAD_DIM = 256


class GroupOrder(NamedTuple):
    """R rows in the order of their groups.

    rows: (R) int64 - where each row is in the level's tensor.
    group: (R) int64 - the group of each row.
    cu_seqlens: (G + 1) int32 - bounds of the groups, counted with their prefix rows.
    max_seqlen: rows of the longest group.
    """

    rows: Tensor
    group: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def offset(self) -> Tensor:
        """(R) int64 - where each row is in its group."""
        return torch.arange(self.rows.shape[0], device=self.rows.device) - self.cu_seqlens[self.group]

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """From the order of the level's tensor to that of groups."""
        return x.index_select(dim, self.rows)

    def scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """The inverse of `gather`."""
        return torch.empty_like(x).index_copy_(dim, self.rows, x)


def group_order(groups: Groups, num_rows: int) -> GroupOrder:
    num_prefix = groups.num_prefix
    bounds = torch.arange(groups.cu_seqlens.shape[0], dtype=torch.int32, device=groups.cu_seqlens.device)
    cu_seqlens = groups.cu_seqlens + bounds * num_prefix
    position = torch.arange(num_rows, dtype=torch.int32, device=cu_seqlens.device)
    group = torch.searchsorted(cu_seqlens[1:], position, right=True)  # a group without rows is nobody's
    # a patch is preceded by the prefix rows of all groups, not only of its own and those before
    patch = position + (cu_seqlens.shape[0] - 2 - group) * num_prefix
    offset = position - cu_seqlens[group]
    rows = torch.where(offset < num_prefix, group * num_prefix + offset, patch)
    return GroupOrder(rows, group, cu_seqlens, groups.max_seqlen + num_prefix)


def flash_not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """What FlashAttention 2 asks for, whoever built it."""
    reasons = []
    if device != "cuda":
        reasons.append(f"needs CUDA or ROCm tensors, got {device}")
    reasons += gpu_capability_reasons(device)
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"needs float16 or bfloat16, got {str(dtype).removeprefix('torch.')}")
    if head_dim % 8 or head_dim > FLASH_HEAD_DIM:
        reasons.append(f"needs a head dim that is a multiple of 8 and at most {FLASH_HEAD_DIM}, got {head_dim}")
    return reasons
