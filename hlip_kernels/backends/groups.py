"""What a backend is told about the groups of a level."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """The groups of one level.

    cu_seqlens: (G + 1) int32 - bounds of the groups in the patch stream.
    q_tiles, k_tiles: (NT, 2) int32 - tile maps for kernels that own query rows, or key rows; empty for backends
        that need none. See `StudyLayout.tiles`.
    num_prefix: P, prefix rows of every group.
    max_seqlen: patch tokens of the longest group.
    """

    cu_seqlens: Tensor
    q_tiles: Tensor
    k_tiles: Tensor
    num_prefix: int
    max_seqlen: int


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
