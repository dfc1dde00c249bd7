"""From the voxels of a volume to those of a prepared scan: its axes, its grey levels, its grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..read.scan import Volume

CHUNK = 16  # slices that are windowed and resized at a time

# In-plane axes (rows, columns) that go with each through-plane axis; 0, 1, 2 are right, posterior, inferior.
_PLANES = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}
_PLANE_NAMES = {2: "axial", 1: "coronal", 0: "sagittal"}


@dataclass(frozen=True)
class Axis:
    """One axis on its way: `length` voxels, with `black` ones around them, resized, and the middle kept.

    kept: more than `resized` puts black around.
    spacing: mm per voxel in the end.
    nearest: a voxel of the result is one of the source, the nearest; else it lies between two.
    """

    length: int
    black: int
    resized: int
    kept: int
    spacing: float
    nearest: bool = False

    @property
    def margins(self) -> tuple[int, int]:
        """Voxels before and after that are put around (cut off, if negative) after the resize."""
        before = -((self.resized - self.kept) // 2) if self.resized >= self.kept else (self.kept - self.resized) // 2
        return before, self.kept - self.resized - before

    def forward(self, voxels: np.ndarray) -> list[int]:
        """Which voxels of the result show some of the source more than any other: increasing. There may be none, as
        where several come to lie between two voxels of the result."""
        rows, places = self.sampled()
        return rows[np.isin(np.floor(places + 0.5), voxels)].tolist()

    def sampled(self) -> tuple[np.ndarray, np.ndarray]:
        """The voxels of the result that are not black, and the place in the source that each is interpolated at."""
        first = max(0, -self.margins[0])  # of the resized voxels, the first that is kept
        count = min(self.resized, self.kept)
        middles = np.arange(first, first + count) + 0.5
        if self.nearest:  # in the precision of PyTorch, whose results lie on the same side of a voxel's edge
            places = np.floor((middles * np.float32(self.length / self.resized)).astype(np.float32))
        else:
            places = middles * (self.length / self.resized) - 0.5
        return max(0, self.margins[0]) + np.arange(count), places.clip(0, self.length - 1)

    def back(self, parts: int) -> np.ndarray:
        """(length, parts) float32: what each voxel of the source takes of each of so many equal parts of the result,
        linearly between their centres, and nothing where it was cut off."""
        scale = self.resized / (self.length + self.black)
        middles = (np.arange(self.length) + self.black // 2 + 0.5) * scale + self.margins[0]  # edges are 0, 1, ...
        at = (middles * parts / self.kept - 0.5).clip(0, parts - 1)
        weights = (1 - np.abs(at[:, None] - np.arange(parts))).clip(0)
        return np.where(((middles > 0) & (middles < self.kept))[:, None], weights, 0).astype(np.float32)


@dataclass(frozen=True)
class Greys:
    """Makes grey levels, 0 to 1, of intensities, `low` to `high`.

    truncated: cut down to whole levels of 255, as NumPy does where it is asked for the type uint8.
    last: made of what was interpolated; else interpolated themselves.
    """

    low: float
    high: float
    truncated: bool = False
    last: bool = False

    def __call__(self, values: np.ndarray) -> Tensor:
        if not self.truncated:
            levels = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
            return levels.clamp_(self.low, self.high).sub_(self.low).div_(self.high - self.low)
        kind = np.float32 if values.dtype == np.float32 else np.float64
        low, high = kind(self.low), kind(self.high)
        levels = (np.clip(values, low, high, dtype=kind) - low) / (high - low + 1e-8) * 255
        return torch.from_numpy(levels.astype(np.uint8)).float().div_(255)


def resample(array: np.ndarray, axes: Sequence[Axis], greys: Greys) -> Tensor:
    """Interpolate a (D, H, W) array onto the axes' grid. Returns (D', H', W') uint8.

    Goes through the result some slices at a time and reads only those that they lie between.
    """
    depth, rows, columns = axes
    slices, places = depth.sampled()
    below, above = np.floor(places).astype(np.int64), np.ceil(places).astype(np.int64)
    weights = torch.from_numpy((places - below).astype(np.float32))[:, None, None]
    image = torch.zeros(tuple(axis.kept for axis in axes), dtype=torch.uint8)
    for k in range(0, len(slices), CHUNK):
        low, high, weight = below[k : k + CHUNK], above[k : k + CHUNK], weights[k : k + CHUNK]
        needed, index = np.unique(np.concatenate([low, high]), return_inverse=True)
        slab = array[needed]
        slab = torch.from_numpy(np.ascontiguousarray(slab, dtype=np.float32)) if greys.last else greys(slab)
        slab = _resize_slices(slab, rows, columns, greys.low if greys.last else 0.0)
        levels = torch.lerp(slab[index[: len(low)]], slab[index[len(low) :]], weight)
        levels = greys(levels.numpy()) if greys.last else levels
        image[slices[k] : slices[k] + len(low)] = levels.mul_(255).round_().to(torch.uint8)
    return image


def _resize_slices(slab: Tensor, rows: Axis, columns: Axis, black: float) -> Tensor:
    """Returns the (N, H, W) slices with black around, resized, and their middle kept."""
    before = [axis.black // 2 for axis in (columns, rows)]
    after = [axis.black - axis.black // 2 for axis in (columns, rows)]
    around = (before[0], after[0], before[1], after[1])
    slab = F.pad(slab, around, value=black) if any(around) else slab
    size = (rows.resized, columns.resized)
    slab = F.interpolate(slab[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    margins = (*columns.margins, *rows.margins)
    return F.pad(slab, margins, value=black) if any(margins) else slab


def as_written(mm: float) -> float:
    """The shortest decimal that single precision takes for this number: a table of scans says 0.7 where a header holds
    0.69999999, and floor makes 69 of 100 voxels of that."""
    decimals = (float(f"{mm:.{digits}g}") for digits in range(1, 10))
    return next((decimal for decimal in decimals if abs(decimal - mm) <= mm * 2**-24), mm)


def percentiles(array: np.ndarray, wanted: tuple[float, float]) -> tuple[float, float]:
    """What `np.percentile` gives; by counting, where there are few different integers."""
    if array.dtype.kind not in "iu" or array.dtype.itemsize > 2:
        low, high = np.percentile(array.ravel("K"), wanted)
        return float(low), float(high)
    values = array.ravel("K")
    least = int(values.min())
    counts = np.zeros(int(values.max()) - least + 1, dtype=np.int64)
    for k in range(0, len(values), 2**20):
        counts += np.bincount(values[k : k + 2**20].astype(np.int64) - least, minlength=len(counts))
    places = np.array(wanted) / 100 * (len(values) - 1)
    ends = np.cumsum(counts)
    below, above = (np.searchsorted(ends, end(places).astype(np.int64), side="right") for end in (np.floor, np.ceil))
    low, high = least + below + (above - below) * (places - np.floor(places))
    return float(low), float(high)


def through_plane_first(
    volume: Volume, axial: bool = False, reorient: bool = True
) -> tuple[np.ndarray, tuple[float, float, float], str]:
    """The volume as (D, H, W): the axis of largest spacing first, oriented to right, posterior, inferior.

    Axes of equal spacing count as axial. With `axial`, the inferior axis comes first whatever the spacing. Without
    `reorient`, the array stays as a NIfTI file has it, its last axis first; of DICOM, as dcm2niix writes it.

    Returns the array, a view; mm per voxel along its axes; and the plane's name.
    """
    from nibabel import orientations
    from nibabel.affines import voxel_sizes

    ornt, spacing = orientations.io_orientation(volume.affine), voxel_sizes(volume.affine)
    if reorient:
        wanted = orientations.axcodes2ornt(("R", "P", "I"))
        array = orientations.apply_orientation(volume.array, orientations.ornt_transform(ornt, wanted))
        spacing = spacing[np.argsort(ornt[:, 0])]
        through = 2 if axial or volume.prepared else max((2, 1, 0), key=lambda axis: round(float(spacing[axis]), 3))
        order = _PLANES[through]
    else:
        array = volume.array[:, ::-1] if volume.rows_down else volume.array
        through, order = int(ornt[2, 0]), (2, 1, 0)
    mm = [math.nan if volume.prepared else float(spacing[axis]) for axis in order]
    return array.transpose(order), (mm[0], mm[1], mm[2]), _PLANE_NAMES[through]
