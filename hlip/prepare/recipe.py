"""From a volume as read to the uint8 scans that a model sees."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..read.readers import read_scan
from ..read.rules import Rules, check_count, check_volume, later, plain_values
from ..read.safe import hint, read_settings, read_yaml, readable
from ..read.scan import ScanError, ScanSource, Volume
from ..read.schema import check_ranges, check_types, structure
from ..store.format import differing
from ..study import PreparedScan
from .grid import Axis, Greys, as_written, percentiles, resample, through_plane_first

VERSION = 1  # to be raised whenever reading or preprocessing changes what a scan looks like


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
    depth: along the through-plane axis, a slice of the result lies between two of the source ("linear"), or is the one
        that covers its middle ("nearest-exact", as PyTorch calls it). In a slice, voxels always lie between others.
    rounding: grey levels are rounded to whole ones once, at the end ("round"), or cut down to whole ones where
        intensities become grey levels ("truncate").
    lengths: with `spacing`, the voxels of an axis are rounded ("round") or cut down ("floor") to a whole number.
    windowing: intensities become grey levels before they are interpolated ("first") or after ("last").
    reorient: turn the axes as above; else they stay as a NIfTI file has them, its last axis first, and as dcm2niix
        would write a DICOM series.

    The last five came later: what was made without them was made with their defaults. `RECIPES` sets them as the
    published models saw their scans.

    Source: HLIP (arXiv 2505.21862), Appendix B.
    """

    size: tuple[int, int, int] = (48, 256, 256)
    crop: tuple[int, int] | None = (224, 224)
    percentiles: tuple[float, float] | None = (0.5, 99.5)
    windows: tuple[Window, ...] = ()
    spacing: tuple[float, float, float] | None = None
    native: tuple[int, int, int] | None = None
    rules: Rules = field(default_factory=Rules)
    depth: Literal["linear", "nearest-exact"] = later("linear")
    rounding: Literal["round", "truncate"] = later("round")
    lengths: Literal["round", "floor"] = later("round")
    windowing: Literal["first", "last"] = later("first")
    reorient: bool = later(True)

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

        Where axes are turned, axial slices lie with rows to posterior and columns to the right, coronal ones inferior
        and right, sagittal ones inferior and posterior.

        Raises:
            ScanError: against the rules, or no contrast within a window.
        """
        check_volume(volume, self.rules)
        array, spacing, plane = self.depth_first(volume)
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
            truncated = self.rounding == "truncate" and not _is_grey(volume)
            image = resample(array, axes, Greys(window.low, window.high, truncated, self.windowing == "last"))
            if image.min() == image.max():
                raise ScanError(volume.path, f"no contrast within {window.low:g} to {window.high:g}", "no_contrast")
            name = "-".join(filter(None, (volume.part, window.name)))
            scans.append(PreparedScan(name, image, result, plane, len(array), grid=volume.without_voxels()))
        return scans

    def on_source(self, volume: Volume, values: np.ndarray) -> np.ndarray:
        """The way back: what is known of a prepared scan's patches, on the voxels of the volume it was made of.

        Linear between the centres of patches; 0 where the scan was cut off.

        Args:
            volume: only its grid counts; see `Volume.without_voxels`.
            values: (d, h, w) - for the patches that the prepared scan divides into.

        Returns:
            (X, Y, Z) float32, in the orientation of `volume`.
        """
        result = np.zeros(volume.array.shape, dtype=np.float32)
        array, spacing, _ = self.depth_first(replace(volume, array=result))
        axes = self.axes(array.shape, spacing, volume.prepared)
        depth, rows, columns = (axis.back(n) for axis, n in zip(axes, values.shape, strict=True))
        array[:] = np.einsum("id,dhw,jh,kw->ijk", depth, values.astype(np.float32), rows, columns, optimize=True)
        return result  # `array` is a view of it

    def axes(self, shape: tuple[int, ...], spacing: tuple[float, ...], prepared: bool) -> list[Axis]:
        """What becomes of each axis, D, H and W."""
        kept, black = self.shape or shape, (0, 0, 0)
        if prepared and (self.spacing or shape == self.shape):
            resized = shape
        elif self.native:
            resized = kept = tuple(max(1, round(n / p)) * p for n, p in zip(shape, self.native, strict=True))
        elif self.spacing:
            written = spacing if self.lengths == "round" else map(as_written, spacing)
            counts = [n * mm / to for n, mm, to in zip(shape, written, self.spacing, strict=True)]
            resized = tuple(max(1, round(count) if self.lengths == "round" else math.floor(count)) for count in counts)
        else:
            side = max(shape[1:])
            resized, black = self.size, (0, side - shape[1], side - shape[2])
        nearest = (self.depth == "nearest-exact", False, False)
        return [
            Axis(n, b, m, k, mm * (n + b) / m, exact)
            for n, b, m, k, mm, exact in zip(shape, black, resized, kept, spacing, nearest, strict=True)
        ]

    def depth_first(self, volume: Volume) -> tuple[np.ndarray, tuple[float, float, float], str]:
        """As `through_plane_first` gives it."""
        return through_plane_first(volume, axial=self.spacing is not None, reorient=self.reorient)

    def _windows(self, volume: Volume) -> tuple[Window, ...]:
        if _is_grey(volume):
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

    def unlike(self, stored: Mapping[str, Any]) -> list[str]:
        """In words, the fields in which a store's recipe differs, if it makes scans of the same shape; rules aside."""
        try:
            other = Recipe.from_dict({**stored, "rules": {}})
        except ValueError as error:  # of a later version, or of a class of the user's own
            return [f"recipe is unknown to this version ({error}), not"]
        fields = differing(other.spelt_out(), replace(self, rules=Rules()).spelt_out(), where="recipe.")
        return [f"{name} is {value}, not {own}" for name, value, own in fields if other.shape == self.shape]

    def spelt_out(self) -> dict[str, Any]:
        """As `to_dict`, with all fields that came later."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @property
    def hash(self) -> str:
        """Changes whenever the recipe, or what the code makes of it, does."""
        plain = Recipe.from_dict(self.to_dict()).to_dict()  # whole numbers as floats where those are meant
        content = json.dumps([VERSION, plain], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def _is_grey(volume: Volume) -> bool:
    """True if its intensities are grey levels already, of 255."""
    return volume.prepared and volume.array.dtype == np.uint8


_CT = Rules(modalities=("CT",), hounsfield=True)
_LINEAR = {
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
# What the published models saw, and the same without the ways of their makers, as this package made it at first.
RECIPES = {
    "brain-mri": replace(_LINEAR["brain-mri"], depth="nearest-exact", rounding="truncate"),
    "head-ct": replace(_LINEAR["head-ct"], depth="nearest-exact", rounding="truncate"),
    "chest-ct": replace(_LINEAR["chest-ct"], lengths="floor", windowing="last", reorient=False),
    **{f"{name}-linear": recipe for name, recipe in _LINEAR.items()},
}
PUBLISHED = tuple(_LINEAR)


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """A recipe that may be given by its name or file; see `load_recipe`."""
    return load_recipe(str(recipe)) if isinstance(recipe, (str, Path)) else recipe


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by its name, from a YAML file with the fields of `Recipe`, or that of a model, whose folder it is.

    What a file leaves out is as in brain-mri-linear.

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
            f"unknown recipe {name_or_path!r}: expected {', '.join(PUBLISHED)}, a file that ends in .yaml, or a "
            f"model's folder; each name also with -linear{hint(name_or_path, RECIPES, [])}"
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
