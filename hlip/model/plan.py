"""What is decided on the host before the encoder runs: dropout, and the position of every token.

Shapes: T patch tokens, V voxels of a patch, K rows of the position tables that make up one position.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hlip_kernels import Grid, StudyLayout

from ..study import Draws, PackedBatch, patch_dropout, scan_dropout
from .config import VisionConfig


@dataclass
class TokenBatch:
    """What the encoder reads of a packed batch: tensors and a layout, nothing left to decide.

    patches: (T, V) uint8
    places: (T, K) int32 - a token's position is the sum of these rows of the position tables, spatial rows before
        sequential ones.
    weights: (T, K) float32 - factors of those rows.
    layout: with the prefix rows of the model.
    """

    patches: Tensor
    places: Tensor
    weights: Tensor
    layout: StudyLayout

    def pin_memory(self) -> TokenBatch:
        return replace(
            self,
            patches=self.patches.pin_memory(),
            places=self.places.pin_memory(),
            weights=self.weights.pin_memory(),
            layout=self.layout.pin_memory(),
        )

    def to(self, device: torch.device | str) -> TokenBatch:
        return replace(
            self,
            patches=self.patches.to(device, non_blocking=True),
            places=self.places.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
            layout=self.layout.to(device),
        )


def plan(batch: PackedBatch, config: VisionConfig, training: bool, seeds: Sequence[int] | None = None) -> TokenBatch:
    """Plan a batch for an encoder of this configuration.

    Args:
        seeds: of what is drawn in training, one per study; see `Draws`.

    Scans beyond `config.max_scans`, and grids other than `config.grid`, take interpolated positions.

    Raises:
        ValueError: patches of another size.

    Source: HLIP (arXiv 2505.21862), sections 3.1 and 3.2.
    """
    if tuple(batch.patch_size) != tuple(config.patch_size):
        raise ValueError(f"the model reads patches of {config.patch_size} voxels, the batch has {batch.patch_size}")
    draws = Draws(seeds)
    if training and config.scan_dropout:
        batch = batch.select(scan_dropout(batch.layout, config.scan_dropout, draws))
    if training and config.patch_dropout:
        batch = batch.select(patch_dropout(batch.layout, config.patch_dropout, config.levels[0], draws))
    layout = batch.layout
    try:
        scan, place = batch.positions.numpy().T
    except RuntimeError as error:
        raise RuntimeError(
            "a batch is planned on the host, before a transform of torch.func: give the model encoder.plan(batch)"
        ) from error
    columns = [_spatial(place, layout, config.grid)]
    if config.max_scans:
        numbers, factors = _sequential(scan, layout, config.max_scans, draws if training else None)
        columns.append((numbers + int(np.prod(config.grid)), factors))
    places = torch.from_numpy(np.concatenate([rows for rows, _ in columns], axis=1).astype(np.int32))
    weights = torch.from_numpy(np.concatenate([factors for _, factors in columns], axis=1).astype(np.float32))
    tokens = TokenBatch(batch.patches, places, weights, layout.with_num_prefix(config.num_prefix).build())
    return tokens.to(batch.patches.device)


def _spatial(place: np.ndarray, layout: StudyLayout, table: Grid) -> tuple[np.ndarray, np.ndarray]:
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


def _sequential(
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
    """Where places of an axis of `size` fall on one of `table`, ends aligned as image resizing aligns them:
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
