"""From a volume as read to the uint8 scans that a model sees."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..read.readers import read_scan
from ..read.rules import Rules, check_count, check_volume, plain_values
from ..read.safe import read_settings, read_yaml, readable
from ..read.scan import ScanError, ScanSource, Volume
from ..read.schema import check_ranges, check_types, structure
from ..study import PreparedScan

VERSION = 1  # to be raised whenever reading or preprocessing changes what a scan looks like
CHUNK = 16  # slices that are windowed and resized at a time

# In-plane axes (rows, columns) that go with each through-plane axis; 0, 1, 2 are right, posterior, inferior.
_PLANES = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}
_PLANE_NAMES = {2: "axial", 1: "coronal", 0: "sagittal"}


@dataclass(frozen=True)
class Window:
    """Intensities that become 0 and 255.

    name: what the scan is called beside those of other windows.
    """

    low: float
    high: float
    name: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"a window must increase, got {self.low} to {self.high}")


@dataclass(frozen=True)
class Recipe:
    """Preprocessing: window, through-plane axis first, then one of three grids.

    By default slices are padded to squares, the scan is resized to `size`, and its middle cut out. With `spacing` it is
    resampled to that, always axial, and its middle is cut out, or black put around it, to `size`. With `native` it
    keeps its own grid, each axis resized to the nearest whole number of patches, at least one.

    size: (D, H, W) voxels.
    crop: (H, W) voxels kept in the middle of each slice.
    percentiles: intensities of the whole volume mapped to 0 and 255.
    windows: fixed ones in place of percentiles; each makes a scan of its own.
    spacing: (D, H, W) mm per voxel.
    native: (pd, ph, pw) voxels of a patch.
    rules: what a scan must be.

    Source: HLIP (arXiv 2505.21862), Appendix B.
    """

    size: tuple[int, int, int] = (48, 256, 256)
    crop: tuple[int, int] | None = (224, 224)
    percentiles: tuple[float, float] | None = (0.5, 99.5)
    windows: tuple[Window, ...] = ()
    spacing: tuple[float, float, float] | None = None
    native: tuple[int, int, int] | None = None
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, {"at least 1": ("size", "crop", "native"), "above 0": ("spacing",)})
        if self.crop and (self.crop[0] > self.size[1] or self.crop[1] > self.size[2]):
            raise ValueError(f"crop {self.crop} must fit into the slices of size {self.size}")
        if bool(self.percentiles) == bool(self.windows):
            raise ValueError(f"either percentiles or windows, got {self.percentiles} and {self.windows}")
        if self.percentiles and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles must increase within 0 to 100, got {self.percentiles}")
        if len({window.name for window in self.windows}) < len(self.windows):
            raise ValueError(f"windows need names of their own, got {[window.name for window in self.windows]}")
        if self.spacing and self.native:
            raise ValueError(f"either spacing or native, got {self.spacing} and {self.native}")

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(D, H, W) of the results; None where each scan keeps its own grid."""
        return None if self.native else (self.size[0], *(self.crop or self.size[1:]))

    def prepare(self, source: ScanSource) -> list[PreparedScan]:
        """Read a scan and preprocess it; one result, or more for a 4D image or several windows.

        Raises:
            ScanError: it cannot be used; its `rule` tells the kind of reason.
        """
        return [scan for volume in read_scan(source, self.rules) for scan in self(volume)]

    def __call__(self, volume: Volume) -> list[PreparedScan]:
        """Returns a scan for each window.

        Axial slices lie with rows to posterior and columns to the right, coronal ones inferior and right,
        sagittal ones inferior and posterior.

        Raises:
            ScanError: against the rules, or no contrast within a window.
        """
        check_volume(volume, self.rules)
        array, spacing, plane = through_plane_first(volume, axial=self.spacing is not None)
        check_count(volume.path, len(array), self.rules)
        axes = self.axes(array.shape, spacing, volume.prepared)
        side = max(max(axis.length + axis.black, axis.resized) for axis in axes[1:])
        if side > self.rules.max_side:
            raise ScanError(
                volume.path,
                f"slices of {side} voxels a side before they are cut, expected at most {self.rules.max_side}",
                "too_large",
            )
        result = (axes[0].spacing, axes[1].spacing, axes[2].spacing)
        scans = []
        for window in self._windows(volume):
            image = _resample(array, window, axes)
            if image.min() == image.max():
                raise ScanError(volume.path, f"no contrast within {window.low:g} to {window.high:g}", "no_contrast")
            name = "-".join(filter(None, (volume.part, window.name)))
            scans.append(PreparedScan(name, image, result, plane, len(array), grid=volume.without_voxels()))
        return scans

    def on_source(self, volume: Volume, values: np.ndarray) -> np.ndarray:
        """The way back: what is known of a prepared scan's patches, on the voxels of the volume it was made of.

        Linear between the centres of patches; 0 where the scan was cut off.

        Args:
            volume: only its shape, affine and `prepared` count; see `Volume.without_voxels`.
            values: (d, h, w) - for the patches that the prepared scan divides into.

        Returns:
            (X, Y, Z) float32, in the orientation of `volume`.
        """
        result = np.zeros(volume.array.shape, dtype=np.float32)
        array, spacing, _ = through_plane_first(replace(volume, array=result), axial=self.spacing is not None)
        axes = self.axes(array.shape, spacing, volume.prepared)
        depth, rows, columns = (axis.back(n) for axis, n in zip(axes, values.shape, strict=True))
        array[:] = np.einsum("id,dhw,jh,kw->ijk", depth, values.astype(np.float32), rows, columns, optimize=True)
        return result  # `array` is a view of it

    def axes(self, shape: tuple[int, ...], spacing: tuple[float, ...], prepared: bool) -> list[Axis]:
        """What becomes of each axis, D, H and W."""
        if prepared and (self.spacing or shape == self.shape):
            kept = self.shape or shape
            return [Axis(n, 0, n, k, mm) for n, k, mm in zip(shape, kept, spacing, strict=True)]
        if self.native:
            counts = [max(1, round(n / p)) * p for n, p in zip(shape, self.native, strict=True)]
            return [Axis(n, 0, m, m, mm * n / m) for n, m, mm in zip(shape, counts, spacing, strict=True)]
        assert self.shape
        if self.spacing:
            counts = [max(1, round(n * mm / to)) for n, mm, to in zip(shape, spacing, self.spacing, strict=True)]
            return [
                Axis(n, 0, m, k, mm * n / m) for n, m, k, mm in zip(shape, counts, self.shape, spacing, strict=True)
            ]
        side = max(shape[1:])
        black = (0, side - shape[1], side - shape[2])
        return [
            Axis(n, b, m, k, mm * (n + b) / m)
            for n, b, m, k, mm in zip(shape, black, self.size, self.shape, spacing, strict=True)
        ]

    def _windows(self, volume: Volume) -> tuple[Window, ...]:
        if volume.prepared and volume.array.dtype == np.uint8:
            return (Window(0, 255),)
        if not self.percentiles:
            return self.windows
        low, high = percentiles(volume.array, self.percentiles)
        if not low < high:
            raise ScanError(volume.path, f"no contrast: percentiles {self.percentiles} are both {low:g}", "no_contrast")
        return (Window(low, high),)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for JSON or YAML."""
        return plain_values(self) | {"rules": plain_values(self.rules)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """The recipe with these fields, defaults elsewhere.

        Raises:
            ValueError: an unknown field, or a value that does not fit; names it.
        """
        return structure(cls, content, "recipe")

    @property
    def hash(self) -> str:
        """Changes whenever the recipe, or what the code makes of it, does."""
        plain = Recipe.from_dict(self.to_dict()).to_dict()  # whole numbers as floats where those are meant
        content = json.dumps([VERSION, plain], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Axis:
    """One axis on its way: `length` voxels, with `black` ones around them, resized, and the middle kept.

    kept: more than `resized` puts black around.
    spacing: mm per voxel in the end.
    """

    length: int
    black: int
    resized: int
    kept: int
    spacing: float

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
        places = (np.arange(first, first + count) + 0.5) * (self.length / self.resized) - 0.5
        return max(0, self.margins[0]) + np.arange(count), places.clip(0, self.length - 1)

    def back(self, parts: int) -> np.ndarray:
        """(length, parts) float32: what each voxel of the source takes of each of so many equal parts of the result,
        linearly between their centres, and nothing where it was cut off."""
        scale = self.resized / (self.length + self.black)
        places = (np.arange(self.length) + self.black // 2 + 0.5) * scale + self.margins[
            0
        ]  # edges of voxels: 0, 1, ...
        at = (places * parts / self.kept - 0.5).clip(0, parts - 1)
        weights = (1 - np.abs(at[:, None] - np.arange(parts))).clip(0)
        return np.where(((places > 0) & (places < self.kept))[:, None], weights, 0).astype(np.float32)


def _resample(array: np.ndarray, window: Window, axes: Sequence[Axis]) -> Tensor:
    """Window a (D, H, W) array and interpolate it linearly onto the axes' grid. Returns (D', H', W') uint8.

    Goes through the result some slices at a time and reads only those that they lie between.
    """
    depth, rows, columns = axes
    slices, places = depth.sampled()
    below = places.astype(np.int64)
    weights = torch.from_numpy((places - below).astype(np.float32))[:, None, None]
    image = torch.zeros(tuple(axis.kept for axis in axes), dtype=torch.uint8)
    for k in range(0, len(slices), CHUNK):
        low, weight = below[k : k + CHUNK], weights[k : k + CHUNK]
        high = np.minimum(low + 1, depth.length - 1)
        needed, index = np.unique(np.concatenate([low, high]), return_inverse=True)
        slab = torch.from_numpy(np.ascontiguousarray(array[needed], dtype=np.float32))
        slab.clamp_(window.low, window.high).sub_(window.low).div_(window.high - window.low)
        slab = _resize_slices(slab, rows, columns)
        between = torch.lerp(slab[index[: len(low)]], slab[index[len(low) :]], weight)
        image[slices[k] : slices[k] + len(low)] = between.mul_(255).round_().to(torch.uint8)
    return image


def _resize_slices(slab: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Returns the (N, H, W) slices with black around, resized, and their middle kept."""
    before = [axis.black // 2 for axis in (columns, rows)]
    after = [axis.black - axis.black // 2 for axis in (columns, rows)]
    slab = F.pad(slab, (before[0], after[0], before[1], after[1])) if any(before + after) else slab
    size = (rows.resized, columns.resized)
    slab = F.interpolate(slab[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    margins = (*columns.margins, *rows.margins)
    return F.pad(slab, margins) if any(margins) else slab


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


def through_plane_first(volume: Volume, axial: bool = False) -> tuple[np.ndarray, tuple[float, float, float], str]:
    """The volume as (D, H, W): the axis of largest spacing first, oriented to right, posterior, inferior.

    Axes of equal spacing count as axial. With `axial`, the inferior axis comes first whatever the spacing.

    Returns the array, a view; mm per voxel along its axes; and the plane's name.
    """
    from nibabel import orientations
    from nibabel.affines import voxel_sizes

    ornt = orientations.io_orientation(volume.affine)
    wanted = orientations.axcodes2ornt(("R", "P", "I"))
    array = orientations.apply_orientation(volume.array, orientations.ornt_transform(ornt, wanted))
    spacing = voxel_sizes(volume.affine)[np.argsort(ornt[:, 0])]
    through = 2 if axial or volume.prepared else max((2, 1, 0), key=lambda axis: round(float(spacing[axis]), 3))
    mm = [math.nan if volume.prepared else float(spacing[axis]) for axis in _PLANES[through]]
    return array.transpose(_PLANES[through]), (mm[0], mm[1], mm[2]), _PLANE_NAMES[through]


_CT = Rules(modalities=("CT",), hounsfield=True)
RECIPES = {
    "brain-mri": Recipe(),
    "head-ct": Recipe(
        percentiles=None,
        windows=(Window(0.0, 120.0, "brain"), Window(-20.0, 180.0, "blood"), Window(-800.0, 2000.0, "bone")),
        rules=_CT,
    ),
    "chest-ct": Recipe(
        size=(112, 336, 336),
        crop=None,
        percentiles=None,
        windows=(Window(-1150.0, 350.0),),
        spacing=(3.0, 1.0, 1.0),
        rules=_CT,
    ),
}


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by its name, from a YAML file with the fields of `Recipe`, or that of a model, whose folder it is.

    What a file leaves out is as in brain-mri.

    Raises:
        ValueError: neither a name nor a readable file or model, or fields that do not fit.
    """
    if name_or_path in RECIPES:
        return RECIPES[name_or_path]
    path = Path(name_or_path)
    if path.is_dir():
        return _recipe_of_model(path / "config.json")
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(
            f"unknown recipe {name_or_path!r}: expected {', '.join(RECIPES)}, a file that ends in .yaml, or a model's "
            "folder"
        )
    with readable(path, "a readable recipe"):
        return Recipe.from_dict(read_yaml(path))


def _recipe_of_model(path: Path) -> Recipe:
    with readable(path, "a readable recipe"):
        config = read_settings(path)
        content = config.get("recipe") if isinstance(config, Mapping) else None
        if content is None:
            raise ValueError("this model was saved without a recipe")
        return Recipe.from_dict(content)
