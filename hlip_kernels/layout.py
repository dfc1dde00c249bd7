"""Where the slices, scans and studies of a packed batch begin and end.

Shapes: T patch tokens, G groups of a level, P prefix rows of a group, R = G * P + T rows of a level's tensor.

All patch tokens of a batch lie in one stream, ordered study, scan, slice, row, column: the groups of every level are
intervals of it. The rows of a level's tensor lie group after group, each group's prefix rows in front of its patches
(group order), so that a level is nothing but its `cu_seqlens`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

Level = Literal["slice", "scan", "study"]
Grid = tuple[int, int, int]
LEVELS: tuple[Level, ...] = get_args(Level)  # fine to coarse
PAIRS: tuple[tuple[Level, Level], ...] = (("slice", "scan"), ("slice", "study"), ("scan", "study"))
MAX_PREFIX = 32
TILE_ROWS = (32, 64, 128)  # the tile sizes that kernels may use


class Views(NamedTuple):
    """The part of a layout that kernels read: int32 views of one buffer, each by its level or pair of levels."""

    buffer: Tensor
    cu_seqlens: dict[Level, Tensor]
    children: dict[tuple[Level, Level], Tensor]
    parents: dict[tuple[Level, Level], Tensor]
    tiles: dict[Level, list[Tensor]]


class StudyLayout:
    """The nested groups of a packed batch of studies. Immutable; made by `from_grids`.

    Group boundaries are kept twice: on the host, where batches are planned, and as int32 tensors on `device`, where
    kernels read them. The tensors are views of one buffer, which `to` moves as it is. Nothing here ever reads a device
    tensor back.
    """

    def __init__(
        self,
        grids: Sequence[Sequence[Grid]],
        slice_lengths: np.ndarray,
        slices_per_scan: np.ndarray,
        num_prefix: int,
        device: torch.device | str | None = "cpu",
    ) -> None:
        self.grids: tuple[tuple[Grid, ...], ...] = tuple(tuple(study) for study in grids)
        self.num_prefix = num_prefix
        self._slice_lengths = slice_lengths
        self._slices_per_scan = slices_per_scan

        slice_bounds = _bounds(slice_lengths)
        slices_of_scan = _bounds(slices_per_scan)
        scans_of_study = _bounds(np.array([len(study) for study in self.grids], dtype=np.int64))
        slices_of_study = slices_of_scan[scans_of_study]
        self._bounds: dict[Level, np.ndarray] = {  # in the patch stream
            "slice": slice_bounds,
            "scan": slice_bounds[slices_of_scan],
            "study": slice_bounds[slices_of_study],
        }
        self._runs = dict(zip(PAIRS, (slices_of_scan, slices_of_study, scans_of_study), strict=True))
        self._num_groups = {level: len(bounds) - 1 for level, bounds in self._bounds.items()}
        self._max_seqlen = {level: int(np.diff(b).max()) + num_prefix for level, b in self._bounds.items()}
        self.num_tokens = int(slice_bounds[-1])  # T, patch tokens; prefix rows not counted
        most = self.num_tokens + max(self._num_groups.values()) * num_prefix
        if most > np.iinfo(np.int32).max:
            raise ValueError(f"{most} rows: a batch holds at most {np.iinfo(np.int32).max}")
        self.device = _numbered("cpu" if device is None else device)
        self._made: Views | None = None
        if device is not None:
            self.build()

    @classmethod
    def from_grids(
        cls, grids: Sequence[Sequence[Grid]], num_prefix: int = 1, device: torch.device | str | None = "cpu"
    ) -> StudyLayout:
        """Lay out a batch from its token grids.

        Args:
            grids: per study, the token grid `(d, h, w)` of each of its scans; scans may differ.
            num_prefix: prefix rows (cls, register) in front of every group, 0 to 32.
            device: where its tensors are to be. None makes none before they are asked for (see `build`): for a layout
                that others are to be made of.

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
        return cls(ints, np.repeat(h * w, d), d, num_prefix, device)

    @property
    def num_studies(self) -> int:
        return self.num_groups("study")

    @property
    def num_scans(self) -> int:
        return self.num_groups("scan")

    def num_groups(self, level: Level) -> int:
        """G, the number of groups of `level`."""
        return self._num_groups[check_level(level)]

    def num_rows(self, level: Level) -> int:
        """R, the rows of a tensor at `level`: prefix rows and patches."""
        return self.num_groups(level) * self.num_prefix + self.num_tokens

    def seqlens(self, level: Level) -> np.ndarray:
        """Patch tokens of each group: (G) int64 on the host; prefix rows not counted."""
        return np.diff(self._bounds[check_level(level)])

    def max_seqlen(self, level: Level) -> int:
        """Rows of the longest group, its prefix rows included."""
        return self._max_seqlen[check_level(level)]

    def cu_seqlens(self, level: Level) -> Tensor:
        """Bounds of the groups' rows, prefix rows included: (G + 1) int32 on `device`."""
        return self.views().cu_seqlens[check_level(level)]

    def cu_patches(self, level: Level) -> Tensor:
        """Bounds of the groups in the patch stream, prefix rows not counted: (G + 1) int32 on `device`."""
        bounds = self.cu_seqlens(level)
        before = torch.arange(bounds.shape[0], dtype=torch.int32, device=bounds.device)
        return bounds - before * self.num_prefix

    def patch_rows(self, level: Level) -> Tensor:
        """The row of each patch of the stream: (T) int64 on `device`."""
        bounds = self.cu_seqlens(level).long()
        before = torch.arange(1, bounds.shape[0], device=bounds.device) * self.num_prefix
        prefixes = before.repeat_interleave(bounds.diff() - self.num_prefix, output_size=self.num_tokens)
        return torch.arange(self.num_tokens, device=bounds.device) + prefixes

    def prefix_rows(self, level: Level) -> Tensor:
        """The row of each prefix row, group after group: (G * P) int64 on `device`."""
        begin = self.cu_seqlens(level)[:-1].long()
        return (begin[:, None] + torch.arange(self.num_prefix, device=begin.device)).flatten()

    def children(self, fine: Level, coarse: Level) -> Tensor:
        """Bounds of each coarse group's run of fine groups: (G_coarse + 1) int32 on `device`."""
        return self.views().children[_check_pair(fine, coarse)]

    def parents(self, fine: Level, coarse: Level) -> Tensor:
        """The coarse group that each fine group lies in: (G_fine) int32 on `device`."""
        return self.views().parents[_check_pair(fine, coarse)]

    def tiles(self, level: Level) -> list[Tensor]:
        """Tile maps of `level`, one for each of `TILE_ROWS`: (NT, 2) int32 on `device`, a tile's group and first row.

        A group's rows are cut into tiles; tiles of the longest groups come first, and none is
        empty.
        """
        return self.views().tiles[check_level(level)]

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
        lengths, counts = slice_lengths[slice_lengths > 0], slices_per_scan[slices_per_scan > 0]
        return self._derived(grids, lengths, counts, self.num_prefix)

    def with_num_prefix(self, num_prefix: int) -> StudyLayout:
        """The same groups with another number of prefix rows."""
        _check_num_prefix(num_prefix)
        if num_prefix == self.num_prefix:
            return self
        return self._derived(self.grids, self._slice_lengths, self._slices_per_scan, num_prefix)

    def to(self, device: torch.device | str) -> StudyLayout:
        """The same layout with its tensors on `device`: one copy, from pinned memory to a GPU."""
        device = _numbered(device)
        if device == self.device:
            return self
        new = copy.copy(self)
        new.device = device
        if self._made is not None:
            to_gpu = device.type == "cuda"
            with torch.inference_mode(False):  # see `_tensors`
                buffer = _pinned(self._made.buffer) if to_gpu else self._made.buffer
                buffer = buffer.to(device, non_blocking=to_gpu)  # the other way, the host would read too early
                new._made, new.device = self._split(buffer), buffer.device
        return new

    def pin_memory(self) -> StudyLayout:
        """The same layout with its tensors in pinned memory."""
        new = copy.copy(self.build())
        with torch.inference_mode(False):
            new._made = self._split(_pinned(self.views().buffer))
        return new

    def build(self) -> StudyLayout:
        """Make the tensors now, if there are none yet; a compiled function cannot. Returns itself."""
        if self._made is None:
            self._made = self._tensors()
            self.device = self._made.buffer.device
        return self

    def _derived(
        self, grids: Sequence[Sequence[Grid]], slice_lengths: np.ndarray, slices_per_scan: np.ndarray, num_prefix: int
    ) -> StudyLayout:
        """Another layout on the same device, which has tensors if this one has."""
        new = StudyLayout(grids, slice_lengths, slices_per_scan, num_prefix, None).to(self.device)
        return new if self._made is None else new.build()

    def views(self) -> Views:
        """All tensors that kernels read. They are made now if there are none yet."""
        if self._made is None:
            if torch.compiler.is_compiling():
                raise RuntimeError("this layout has no tensors yet: call layout.build() before a compiled function")
            self.build()
        assert self._made is not None
        return self._made

    def _tensors(self) -> Views:
        lengths = {level: np.diff(bounds) + self.num_prefix for level, bounds in self._bounds.items()}
        maps = {level: _tile_maps(rows) for level, rows in lengths.items()}
        self._tile_counts = {level: [len(tiles) for tiles in of_level] for level, of_level in maps.items()}
        pieces = [
            *(_bounds(rows) for rows in lengths.values()),
            *self._runs.values(),
            *(np.repeat(np.arange(len(runs) - 1), np.diff(runs)) for runs in self._runs.values()),
            *(tiles.ravel() for of_level in maps.values() for tiles in of_level),
        ]
        with torch.inference_mode(False):  # a layout made there may serve in training too
            buffer = torch.from_numpy(np.concatenate(pieces).astype(np.int32))
            if self.device.type == "cuda":
                buffer = _pinned(buffer)
            return self._split(buffer.to(self.device, non_blocking=self.device.type == "cuda"))

    def _split(self, buffer: Tensor) -> Views:
        """The views of a buffer as `_tensors` lays it out."""
        groups, counts = self._num_groups, self._tile_counts
        sizes = [
            *(groups[level] + 1 for level in LEVELS),
            *(groups[coarse] + 1 for _, coarse in PAIRS),
            *(groups[fine] for fine, _ in PAIRS),
            *(2 * count for level in LEVELS for count in counts[level]),
        ]
        views = iter(_mark_dynamic(buffer.split(sizes)))
        cu_seqlens = {level: next(views) for level in LEVELS}
        children = {pair: next(views) for pair in PAIRS}
        parents = {pair: next(views) for pair in PAIRS}
        maps = iter(_mark_dynamic([view.view(-1, 2) for view in views]))
        return Views(
            buffer, cu_seqlens, children, parents, {level: [next(maps) for _ in TILE_ROWS] for level in LEVELS}
        )

    def __repr__(self) -> str:
        groups = ", ".join(f"{self.num_groups(level)} {level} groups" for level in LEVELS)
        return f"StudyLayout({self.num_tokens} tokens, {groups}, num_prefix={self.num_prefix}, device={self.device})"


def _numbered(device: torch.device | str) -> torch.device:
    """The device as tensors name it: "cuda" is the current one of several."""
    device = torch.device(device)
    if device.type in ("cpu", "meta") or device.index is not None:
        return device
    return torch.empty(0, device=device).device


def _pinned(buffer: Tensor) -> Tensor:
    """Itself where there is no GPU to copy to, or nothing to copy."""
    if not torch.cuda.is_available() or type(buffer) is not Tensor or buffer.device.type != "cpu" or buffer.is_pinned():
        return buffer
    return buffer.pin_memory()


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


def check_rows(name: str, x: Tensor, layout: StudyLayout, level: Level) -> None:
    """Raise ValueError unless x has the rows of `level`, on the layout's device."""
    rows = layout.num_rows(level)
    if x.shape[0] != rows:
        raise ValueError(
            f"{name}: expected {rows} rows at level {level!r} ({layout.num_groups(level)} groups x {layout.num_prefix} "
            f"prefix + {layout.num_tokens} patches), got {x.shape[0]}"
        )
    if x.device != layout.device:
        raise ValueError(f"{name} is on {x.device}, the layout on {layout.device}; move one with .to(device)")


def _check_pair(fine: Level, coarse: Level) -> tuple[Level, Level]:
    pair = check_level(fine), check_level(coarse)
    if pair not in PAIRS:
        raise ValueError(f"expected a finer and a coarser level, got {fine!r} and {coarse!r}")
    return pair


def _check_num_prefix(num_prefix: int) -> None:
    if not (type(num_prefix) is int and 0 <= num_prefix <= MAX_PREFIX):
        raise ValueError(f"num_prefix must be an integer from 0 to {MAX_PREFIX}, got {num_prefix!r}")


def _tile_maps(lengths: np.ndarray) -> list[np.ndarray]:
    """For each of `TILE_ROWS`: (NT, 2), the tiles of groups that have `lengths` rows, longest groups first."""
    smallest = TILE_ROWS[0]
    order = np.argsort(-lengths, kind="stable")
    counts = -(-lengths[order] // smallest)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    finest = np.stack([np.repeat(order, counts), place * smallest], axis=1)
    return [finest[finest[:, 1] % rows == 0] for rows in TILE_ROWS]


def _bounds(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
