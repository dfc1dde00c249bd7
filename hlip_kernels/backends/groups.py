"""What a backend is told about the groups of a level."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import TILE_ROWS


class Groups(NamedTuple):
    """The groups of one level.

    cu_seqlens: (G + 1) int32 - bounds of the groups in the patch stream.
    tiles: for each of `TILE_ROWS`, (NT, 2) int32 - see `StudyLayout.tiles`.
    num_prefix: P, prefix rows of every group.
    max_seqlen: patch tokens of the longest group.
    """

    cu_seqlens: Tensor
    tiles: list[Tensor]
    num_prefix: int
    max_seqlen: int

    def tile_map(self, rows: int) -> Tensor:
        return self.tiles[TILE_ROWS.index(rows)]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums and statistics are kept: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gpu_capability_reasons(device: str) -> list[str]:
    """Triton and FlashAttention ask for the same: an NVIDIA GPU of the Ampere generation or newer."""
    if device != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return []
    capability = torch.cuda.get_device_capability()
    if capability >= (8, 0):
        return []
    return ["needs a GPU of compute capability 8.0 or higher, got {}.{}".format(*capability)]


class Regroup(NamedTuple):
    """From the groups of one level, src, to those of another, dst; or of the same.

    cu_seqlens: (G_src + 1) int32 - bounds of the groups of src in the patch stream.
    tiles: (NT, 2) int32 - the tile map of src at the least of `TILE_ROWS`.
    children: (G of the coarser level + 1) int32 - bounds of each coarse group's run of fine ones; None if the levels
        are the same.
    num_prefix: P, prefix rows of every group.
    dst_groups: G_dst.
    """

    cu_seqlens: Tensor
    tiles: Tensor
    children: Tensor | None
    num_prefix: int
    dst_groups: int

    @property
    def src_groups(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def coarser(self) -> bool:
        """Whether dst is the coarser level, whose prefix rows are means of those of src."""
        return self.children is not None and self.dst_groups == self.children.shape[0] - 1
