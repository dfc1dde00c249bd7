"""Tile sizes of the Triton kernels: a plain table, no search at run time.

A row is chosen by GPU architecture, width of the type, head dim, and the length of the level's longest group.
Tiles change the order of sums, so a table, unlike autotuning, also keeps results the same from run to run.
`python bench/attention.py --static` compiles every row and shows what it costs; no half-precision row spills.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DEFAULT_ARCHITECTURE = "sm_80"
BLOCK_D = {16: 16, 32: 32, 64: 64, 80: 128, 96: 128, 128: 128}  # head dim -> columns of a tile, a power of two
SHORT = 256  # patch tokens; groups up to here leave large tiles half empty


class Tile(NamedTuple):
    """rows: of the program's own tile, one of `layout.TILE_ROWS`; streamed: of the tiles it loops over."""

    rows: int
    streamed: int
    warps: int
    stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkdv: Tile


def attention_config(arch: str, dtype: torch.dtype, head_dim: int, max_seqlen: int) -> AttentionConfig:
    """The table's row; an unknown architecture gets the default's."""
    wide = BLOCK_D[head_dim] == 128
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1) if wide else Tile(64, 32, 4, 1)
        return AttentionConfig(tile, tile, Tile(32, 32, 4, 1))
    if arch in ("sm_90", "sm_100") and wide:
        return AttentionConfig(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2))
    if arch == "sm_90":
        if max_seqlen <= SHORT:
            return AttentionConfig(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
        return AttentionConfig(Tile(128, 64, 4, 3), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2))
    if arch == "sm_100":
        if max_seqlen <= SHORT:
            return AttentionConfig(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2))
        return AttentionConfig(Tile(128, 64, 8, 3), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2))
    if arch == "gfx942":
        streamed = 32 if wide else 64
        return AttentionConfig(Tile(64, streamed, 4, 1), Tile(64, streamed, 4, 1), Tile(64, streamed, 4, 1))
    warps = 8 if wide else 4
    return AttentionConfig(
        Tile(64, 32 if head_dim == 32 else 64, warps, 2),
        Tile(64, 32, warps, 1 if head_dim == 32 else 2),
        Tile(64, 64 if head_dim == 16 else 32, warps, 2),
    )


@functools.cache
def architecture(device_index: int = 0) -> str:
    """The GPU's name in the table, such as `sm_90`; the default's where there is no GPU."""
    if not torch.cuda.is_available():
        return DEFAULT_ARCHITECTURE
    if torch.version.hip:
        return torch.cuda.get_device_properties(device_index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}"
