"""Where the slices, scans and studies of a packed batch begin and end.

Shapes: T patch tokens, G groups of a level, P prefix rows of a group.

All patch tokens of a batch lie in one stream, ordered study, scan, slice, row, column. The groups of
every level are therefore intervals of that stream, and a level is nothing but its ``cu_seqlens``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Level = Literal["slice", "scan", "study"]
Grid = tuple[int, int, int]
LEVELS: tuple[Level, ...] = get_args(Level)  # fine to coarse
MAX_PREFIX = 32
TILE_ROWS = (32, 64, 128)  # the tile sizes that kernels may use


class StudyLayout:
    """The nested groups of a packed batch of studies. Immutable; made by `from_grids`.

    Group boundaries are kept twice: on the host, where batches are planned, and as int32 tensors on
    `device`, where kernels read them. Nothing here ever reads a device tensor back, and nothing is computed after
    construction: a compiled model sees tensors and integers only.
    """

    def __init__(
        self,
        grids: Sequence[Sequence[Grid]],
        slice_lengths: np.ndarray,
        slices_per_scan: np.ndarray,
        num_prefix: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.grids: tuple[tuple[Grid, ...], ...] = tuple(tuple(study) for study in grids)
        self.num_prefix = num_prefix
        self._slice_lengths = slice_lengths
        self._slices_per_scan = slices_per_scan

        slice_bounds = _bounds(slice_lengths)
        slices_of_scan = _bounds(slices_per_scan)
        scans_of_study = _bounds(np.array([len(study) for study in self.grids], dtype=np.int64))
        slices_of_study = slices_of_scan[scans_of_study]
        self._bounds: dict[str, np.ndarray] = {
            "slice": slice_bounds,
            "scan": slice_bounds[slices_of_scan],
            "study": slice_bounds[slices_of_study],
        }
        children = {
            ("slice", "scan"): slices_of_scan,
            ("slice", "study"): slices_of_study,
            ("scan", "study"): scans_of_study,
        }
        if slice_bounds[-1] > np.iinfo(np.int32).max:
            raise ValueError(f"{slice_bounds[-1]} tokens: a batch holds at most {np.iinfo(np.int32).max}")
        self.num_tokens = int(slice_bounds[-1])  # T, patch tokens; prefix rows not counted
        self._num_groups = {level: len(bounds) - 1 for level, bounds in self._bounds.items()}
        self._max_seqlen = {level: int(np.diff(bounds).max()) for level, bounds in self._bounds.items()}
        tiles = {
            (level, rows): tile_map
            for level, bounds in self._bounds.items()
            for rows, tile_map in _tile_maps(np.diff(bounds) + num_prefix).items()
        }
        # One buffer, so that moving a layout to a device is one copy.
        pieces = [*self._bounds.values(), *children.values(), *tiles.values()]
        with torch.inference_mode(False):  # a layout made there may serve in training too
            flat = torch.from_numpy(np.concatenate([piece.ravel() for piece in pieces]).astype(np.int32))
            flat = flat.to(device, non_blocking=True)
        views = iter(_mark_dynamic(flat.split([piece.size for piece in pieces])))
        self.device = flat.device
        self._cu_seqlens = {level: next(views) for level in LEVELS}
        self._children = {pair: next(views) for pair in children}
        maps = dict(zip(tiles, _mark_dynamic([view.view(-1, 2) for view in views]), strict=True))
        self._tiles = {level: [maps[level, rows] for rows in TILE_ROWS] for level in LEVELS}

    @classmethod
    def from_grids(cls, grids: Sequence[Sequence[Grid]], num_prefix: int = 1) -> StudyLayout:
        """Lay out a batch from its token grids.

        Args:
            grids: per study, the token grid `(d, h, w)` of each of its scans; scans may differ.
            num_prefix: prefix rows (cls, register) in front of every group, 0 to 32.

        Raises:
            ValueError: no study, a study without scans, or a grid that is not three positive integers.
        """
        _check_num_prefix(num_prefix)
        if len(grids) == 0:
            raise ValueError("grids is empty: a layout needs at least one study")
        for s, study in enumerate(grids):
            if len(study) == 0:
                raise ValueError(f"study {s} has no scans")
            for m, grid in enumerate(study):
                if (
                    not isinstance(grid, Sequence)
                    or len(grid) != 3
                    or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in grid)
                ):
                    raise ValueError(
                        f"study {s}, scan {m}: expected a token grid (d, h, w) of positive integers, got {grid!r}"
                    )
        ints = tuple(tuple((int(d), int(h), int(w)) for d, h, w in study) for study in grids)
        d, h, w = np.array([grid for study in ints for grid in study], dtype=np.int64).T
        return cls(ints, np.repeat(h * w, d), d, num_prefix)

    @property
    def num_studies(self) -> int:
        return self.num_groups("study")

    @property
    def num_scans(self) -> int:
        return self.num_groups("scan")

    def num_groups(self, level: Level) -> int:
        """G, the number of groups of `level`."""
        return self._num_groups[check_level(level)]

    def cu_seqlens(self, level: Level) -> Tensor:
        """Bounds of the groups in the patch stream: (G + 1) int32 on `device`; prefix rows not counted."""
        return self._cu_seqlens[check_level(level)]

    def seqlens(self, level: Level) -> np.ndarray:
        """Patch tokens of each group: (G) int64 on the host; prefix rows not counted."""
        return np.diff(self._bounds[check_level(level)])

    def max_seqlen(self, level: Level) -> int:
        """Patch tokens of the longest group; prefix rows not counted."""
        return self._max_seqlen[check_level(level)]

    def children(self, fine: Level, coarse: Level) -> Tensor:
        """Bounds of each coarse group's run of fine groups: (G_coarse + 1) int32 on `device`."""
        if LEVELS.index(check_level(fine)) >= LEVELS.index(check_level(coarse)):
            raise ValueError(f"expected a finer and a coarser level, got {fine!r} and {coarse!r}")
        return self._children[fine, coarse]

    def tiles(self, level: Level) -> list[Tensor]:
        """Tile maps of `level`, one for each of `TILE_ROWS`: (NT, 2) int32 on `device`, a tile's group and first row.

        A group's rows, prefix rows first, are cut into tiles; tiles of the longest groups come first, and none is
        empty.
        """
        return self._tiles[check_level(level)]

    def select(self, keep: Tensor) -> StudyLayout:
        """The layout of the rows `patches[keep]`: patch dropout and scan dropout are choices of rows.

        A slice or scan that keeps no row leaves the layout, its prefix rows with it.

        Args:
            keep: on the host, (T) bool, or strictly increasing int64 row numbers.

        Raises:
            ValueError: rows out of range or out of order, or a study that would keep no row.
        """
        if keep.device.type != "cpu":
            raise ValueError(f"keep must be on the host, where layouts are planned, got {keep.device}")
        rows = keep.detach().numpy()
        if rows.dtype == np.bool_:
            if rows.shape != (self.num_tokens,):
                raise ValueError(f"expected a mask of shape ({self.num_tokens},), got {rows.shape}")
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or rows.dtype != np.int64:
            raise ValueError(f"expected 1D bool or int64 rows, got {rows.ndim}D {rows.dtype}")
        if rows.size and (rows[0] < 0 or rows[-1] >= self.num_tokens or (np.diff(rows) <= 0).any()):
            raise ValueError(f"rows must increase strictly within [0, {self.num_tokens})")
        kept = np.diff(np.searchsorted(rows, self._bounds["study"]))
        if (kept == 0).any():
            raise ValueError(f"study {int(np.argmin(kept))} would keep no patch token")
        slice_lengths = np.diff(np.searchsorted(rows, self._bounds["slice"]))
        slice_bounds = _bounds(self._slices_per_scan)
        slices_per_scan = np.add.reduceat(slice_lengths > 0, slice_bounds[:-1], dtype=np.int64)
        alive = iter((slices_per_scan > 0).tolist())
        grids = [[grid for grid in study if next(alive)] for study in self.grids]
        return StudyLayout(
            grids, slice_lengths[slice_lengths > 0], slices_per_scan[slices_per_scan > 0], self.num_prefix, self.device
        )

    def with_num_prefix(self, num_prefix: int) -> StudyLayout:
        """The same groups with another number of prefix rows."""
        _check_num_prefix(num_prefix)
        return self._replace(num_prefix, self.device)

    def to(self, device: torch.device | str) -> StudyLayout:
        """The same layout with its tensors on `device`."""
        return self._replace(self.num_prefix, device)

    def _replace(self, num_prefix: int, device: torch.device | str) -> StudyLayout:
        if num_prefix == self.num_prefix and torch.device(device) == self.device:
            return self
        return StudyLayout(self.grids, self._slice_lengths, self._slices_per_scan, num_prefix, device)

    def __repr__(self) -> str:
        groups = ", ".join(f"{self.num_groups(level)} {level} groups" for level in LEVELS)
        return f"StudyLayout({self.num_tokens} tokens, {groups}, num_prefix={self.num_prefix}, device={self.device})"


def _mark_dynamic(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tell torch.compile that these lengths vary, each by itself. It would take two that are equal in the first batch
    to be equal in all, and compile again for the batch in which they are not."""
    dynamo = sys.modules.get("torch._dynamo")  # loaded by whoever compiles
    if dynamo is not None and not torch.compiler.is_compiling():
        for tensor in tensors:
            dynamo.maybe_mark_dynamic(tensor, 0)
    return tensors


def check_level(level: str) -> Level:
    """Return `level` if it is one; raise ValueError naming the three otherwise."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    return level


def _check_num_prefix(num_prefix: int) -> None:
    if not (type(num_prefix) is int and 0 <= num_prefix <= MAX_PREFIX):
        raise ValueError(f"num_prefix must be an integer from 0 to {MAX_PREFIX}, got {num_prefix!r}")


def _tile_maps(lengths: np.ndarray) -> dict[int, np.ndarray]:
    """For each of `TILE_ROWS`: (NT, 2), the tiles of groups with so many rows, longest groups first."""
    smallest = TILE_ROWS[0]
    order = np.argsort(-lengths, kind="stable")
    counts = -(-lengths[order] // smallest)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    finest = np.stack([np.repeat(order, counts), place * smallest], axis=1)
    return {rows: finest[finest[:, 1] % rows == 0] for rows in TILE_ROWS}


def _bounds(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
