"""Positions of patches: tables over a scan's grid and over the scans of a study, and how they are resampled.

Shapes: T patch tokens, K rows of the tables that make up one position, C width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hlip_kernels import Grid, StudyLayout

from ..study import Draws

# By the name that files of models have for them; a class enters itself.
POSITIONS: dict[str, Tiled] = {}


class Tiled:
    """A 2D sin-cos table over (h, w), as MAE's, plus a 1D one over d. Other kinds of positions say what differs.

    divisor: the width is a multiple of it.

    Source: HLIP (arXiv 2505.21862), section 3.2.
    """

    divisor: ClassVar = 4

    def __init_subclass__(cls) -> None:
        POSITIONS[cls.__name__.lower()] = cls()

    def table(self, grid: Grid, width: int) -> Tensor:
        """(d, h, w, C) positions of the patches of a scan."""
        d, h, w = (np.arange(n) for n in grid)
        plane = [sincos(w, width // 2)[None], sincos(h, width // 2)[:, None]]
        in_plane = torch.cat([axis.expand(*grid[1:], width // 2) for axis in plane], dim=-1)
        return in_plane + sincos(d, width)[:, None, None]


POSITIONS["tiled"] = Tiled()


class SinCos3D(Tiled):
    """Each of w, h and d has a third of the width."""

    divisor: ClassVar = 6

    def table(self, grid: Grid, width: int) -> Tensor:
        d, h, w = (np.arange(n) for n in grid)
        third = width // 3
        axes = [sincos(w, third)[None, None], sincos(h, third)[None, :, None], sincos(d, third)[:, None, None]]
        return torch.cat([axis.expand(*grid, third) for axis in axes], dim=-1).contiguous()


class Rope(Tiled):
    """Positions are added as those called "tiled" are, and in every layer each patch's queries and keys are turned by
    its place in the whole grid of its scan. Scans of a study are alike. Of a head's dimensions, d, h and w have a third
    each, in whole pairs.

    Source: the ablations of HLIP's released code; RoFormer (arXiv 2104.09864).
    """

    def angles(self, coordinates: Tensor, head_dim: int) -> Tensor:
        """(T, 3) places along d, h and w to the (T, N) angles of a head's first N pairs of dimensions."""
        pairs = head_dim // 6
        frequencies = 10000.0 ** (-torch.arange(pairs, dtype=coordinates.dtype, device=coordinates.device) / pairs)
        return (coordinates[:, :, None] * frequencies).flatten(1)


if TYPE_CHECKING:
    PositionsName = str
else:
    PositionsName = Literal[tuple(POSITIONS)]


def sincos(places: np.ndarray, width: int) -> Tensor:
    """(N) places to (N, width) float32: sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi."""
    frequencies = 10000.0 ** (-np.arange(width // 2) / (width / 2))
    angles = places[:, None] * frequencies
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()


def spatial_rows(place: np.ndarray, layout: StudyLayout, table: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Rows (T, 1 or 8) of the spatial table, and their weights."""
    scans = [grid for study in layout.grids for grid in study]
    grids = sorted(set(scans))
    if grids == [tuple(table)]:
        return place[:, None], np.ones((len(place), 1))
    corners = [_corners(grid, tuple(table)) for grid in grids]
    first = np.cumsum([0] + [len(rows) for rows, _ in corners[:-1]])
    which = {grid: i for i, grid in enumerate(grids)}
    token = np.repeat(first[[which[grid] for grid in scans]], layout.seqlens("scan")) + place
    return np.concatenate([rows for rows, _ in corners])[token], np.concatenate([w for _, w in corners])[token]


def coordinates(place: np.ndarray, layout: StudyLayout) -> np.ndarray:
    """(T, 3): places along d, h and w in the whole grid of the scan, also of patches that dropout left."""
    grids = np.array([grid for study in layout.grids for grid in study])
    _, h, w = grids.repeat(layout.seqlens("scan"), axis=0).T
    return np.stack([place // (h * w), place // w % h, place % w], axis=1)


def sequential_rows(
    scan: np.ndarray, layout: StudyLayout, max_scans: int, draws: Draws | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (T, 1 or 2) of the sequential table, and their weights."""
    lengths = layout.seqlens("study")
    study = np.repeat(np.arange(len(lengths)), lengths)
    if draws:  # scans are numbered anew, and every study draws their positions without replacement
        num_scans = np.array([len(scans) for scans in layout.grids])
        scan = np.repeat(np.concatenate([np.arange(n) for n in num_scans]), layout.seqlens("scan"))
        drawn = draws(np.full(len(lengths), max_scans)).reshape(-1, max_scans).argsort(1)
        fits = num_scans[study] <= max_scans
        scan = np.where(fits, drawn[study, np.minimum(scan, max_scans - 1)], scan)
    else:
        num_scans = np.maximum.reduceat(scan, np.cumsum(lengths) - lengths) + 1
    if num_scans.max() <= max_scans:
        return scan[:, None], np.ones((len(scan), 1))
    below, above, weight = _between(scan, np.maximum(num_scans, max_scans)[study], max_scans)
    return np.stack([below, above], axis=1), np.stack([1 - weight, weight], axis=1)


def _between(place: np.ndarray, size: np.ndarray | int, table: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map places of an axis of `size` to one of `table`, ends aligned as image resizing aligns them:
    the places below and above, and the weight of the latter."""
    at = np.clip((place + 0.5) * table / size - 0.5, 0, table - 1)
    below = np.floor(at).astype(np.int64)
    return below, np.minimum(below + 1, table - 1), at - below


@functools.lru_cache(maxsize=1024)
def _corners(grid: Grid, table: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Trilinear resampling of a table to a grid: (d * h * w, 8) rows of the table, and their weights."""
    rows, weights = np.zeros((*grid, 8), dtype=np.int64), np.ones((*grid, 8))
    for axis in range(3):
        below, above, weight = _between(np.arange(grid[axis]), grid[axis], table[axis])
        upper = np.arange(8) >> axis & 1
        shape = tuple(grid[axis] if i == axis else 1 for i in range(3))
        rows = rows * table[axis] + np.where(upper, above[:, None], below[:, None]).reshape(*shape, 8)
        weights = weights * np.where(upper, weight[:, None], 1 - weight[:, None]).reshape(*shape, 8)
    return rows.reshape(-1, 8), weights.reshape(-1, 8)
