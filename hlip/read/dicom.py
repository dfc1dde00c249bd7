"""DICOM series in: slices put together from headers, whatever files are named and numbered."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .headers import DEFLATED, HEAD_BYTES, parse, several
from .pixels import Pixels
from .rules import Rules, check_count, check_grid, check_image_type, check_modality, finite, is_rescaled
from .scan import ScanError, ScanSource, Volume, damage
from .series import Mark, marks_of, split_volumes
from .voxels import check_file, rescale

LPS = np.array([-1.0, -1.0, 1.0])  # DICOM's x runs to the left, its y to the back
SAME_PLACE = 0.01  # mm; closer slices are at one place
UNEVEN = 0.1  # of the usual step; what a slice may lie off the regular grid
MAX_FRAMES = 2**16  # of one file


@dataclass(frozen=True)
class Slice:
    """One slice of a series, its pixels not yet read.

    pixels: of its file.
    frame: its number in the file.
    axes: (6) - directions of a row and of a column, as DICOM gives them.
    position: (3) mm - the first pixel's place, as DICOM gives it.
    spacing: mm from row to row and from column to column.
    scale: slope and intercept, from stored numbers to intensities, as the header has them.
    number: of acquisition, instance and frame.
    header: what its file says of it, or of it as a frame.
    """

    pixels: Pixels
    frame: int
    uid: str
    shape: tuple[int, int]
    axes: tuple[float, ...]
    position: tuple[float, ...]
    spacing: tuple[float, float]
    scale: tuple[float, float]
    number: tuple[float, float, int]
    header: Any

    @property
    def along(self) -> float:
        """Place along the normal, mm."""
        return float(np.dot(np.cross(self.axes[:3], self.axes[3:]), self.position))

    @functools.cached_property
    def marks(self) -> tuple[Mark, ...]:
        """Marks that tell it from slices at the same place."""
        return marks_of(self.header, self.pixels.header)


def read_volumes(source: ScanSource, rules: Rules) -> list[Volume]:
    """Read one series: slices sorted along their normal, however files are named and numbered.

    A few slices of another orientation or size (a scout) are left out. A slice that occurs twice is taken once; where
    every place has the same number of slices, they are volumes of a 4D series. Missing slices are interpolated between
    their neighbours, up to `rules.max_missing`. Frames of multi-frame files are slices like others. A gantry tilt stays
    in the affine as shear.

    Raises:
        ScanError: see `Rules`.
    """
    path = source.files[0]
    first, slices = None, []
    for file in source.files:
        check_file(file)
        with damage(file, "truncated or corrupt"), file.open("rb", HEAD_BYTES) as opened:
            if DEFLATED in opened.read(2048):
                raise ScanError(file, "deflated as a whole: its size cannot be told before it is read")
            data, offset = parse(opened)
        with damage(file, "a damaged header"):
            series, modality, description = (
                str(data.get(name) or "") for name in ("SeriesInstanceUID", "Modality", "SeriesDescription")
            )
            first = first or (series, modality, description)
            if series != first[0]:
                raise ScanError(file, f"of another series than {path.name}")
            check_modality(file, modality, rules)
            check_image_type(file, several(data.get("ImageType")), rules)
            slices.extend(_slices(Pixels(file, data, offset)))
    assert first is not None
    slices = _one_orientation(path, slices, rules)
    if len(slices) * np.prod(slices[0].shape, dtype=np.float64) > rules.max_voxels:
        raise ScanError(path, f"the series has more than {rules.max_voxels} voxels", "too_large")
    stacks = _stacks(path, slices)
    if len(stacks) > 1 and (rules.four_d == "reject" or (rules.four_d == "split" and len(stacks) > rules.max_parts)):
        raise ScanError(path, f"expected one 3D volume, got {len(stacks)} at the same places", "four_d")
    stacks = stacks if rules.four_d == "split" else stacks[:1]
    return [
        Volume(*_read_stack(path, stack, rules), path, *first[1:], f"t{t}" if len(stacks) > 1 else "", rows_down=True)
        for t, stack in enumerate(stacks)
    ]


def _slices(pixels: Pixels) -> list[Slice]:
    """The slices of one file: one, or each frame of a multi-frame one."""
    path, data = pixels.path, pixels.header
    if int(data.get("SamplesPerPixel", 1)) != 1 or str(data.get("PhotometricInterpretation")) != "MONOCHROME2":
        raise ScanError(
            path,
            f"expected one grey value a pixel, got {data.get('SamplesPerPixel', 1)} samples, "
            f"{data.get('PhotometricInterpretation')}",
            "not_grey",
        )
    frames = int(data.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" not in data:
        if frames > 1:
            raise ScanError(path, f"{frames} frames without a place for each")
        return [_slice(pixels, 0, data)]
    groups = data.PerFrameFunctionalGroupsSequence
    if len(groups) != frames or frames > MAX_FRAMES:
        raise ScanError(path, f"{frames} frames with places for {len(groups)}")
    shared = data.get("SharedFunctionalGroupsSequence") or [None]
    return [_slice(pixels, k, _functional_groups(groups[k], shared[0])) for k in range(frames)]


def _functional_groups(frame: Any, shared: Any) -> Any:
    """A frame's place, orientation, spacing and rescaling, its own or those it shares, in one data set."""
    from pydicom.dataset import Dataset

    merged = Dataset()
    for name in (
        "PlaneOrientationSequence",
        "PlanePositionSequence",
        "PixelMeasuresSequence",
        "PixelValueTransformationSequence",
        "FrameContentSequence",
        "MREchoSequence",
        "MRDiffusionSequence",
        "MRImageFrameTypeSequence",
        "CTImageFrameTypeSequence",
        "CardiacSynchronizationSequence",
        "TemporalPositionSequence",
    ):
        for group in (shared, frame):
            if group is not None and group.get(name):
                merged.update(group[name].value[0])
    return merged


def _slice(pixels: Pixels, frame: int, place: Any) -> Slice:
    path, data = pixels.path, pixels.header
    for name in ("ImageOrientationPatient", "ImagePositionPatient"):
        if not place.get(name):
            raise ScanError(path, f"no {name}: not a slice of a volume", "localiser")
    if not place.get("PixelSpacing"):
        raise ScanError(path, "no PixelSpacing", "spacing")
    slope = 1.0 if place.get("RescaleSlope") is None else float(place.RescaleSlope)
    intercept = float(place.get("RescaleIntercept") or 0)
    axes, position, spacing = (
        tuple(float(x) for x in place.get(name))
        for name in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
    )
    if (len(axes), len(position), len(spacing)) != (6, 3, 2) or not np.isfinite([*axes, *position, *spacing]).all():
        raise ScanError(path, f"a damaged header: {len(axes)}, {len(position)} and {len(spacing)} numbers of its place")
    if min(spacing) <= 0:
        raise ScanError(path, f"PixelSpacing {spacing} mm", "spacing")
    if np.linalg.norm(np.cross(axes[:3], axes[3:])) < 0.1:
        raise ScanError(path, f"rows and columns run the same way: {axes}", "sheared")
    shape, uid = (int(data.Rows), int(data.Columns)), str(data.get("SOPInstanceUID", ""))
    number = (float(data.get("AcquisitionNumber") or 0), float(data.get("InstanceNumber") or 0), frame)
    scale = (slope, intercept)
    return Slice(pixels, frame, uid, shape, axes, position, (spacing[0], spacing[1]), scale, number, place)


def _one_orientation(path: Path, slices: Sequence[Slice], rules: Rules) -> list[Slice]:
    """The slices that lie parallel; a group too small for a volume, such as a scout, is left out."""
    groups: list[list[Slice]] = []
    for item in slices:
        group = next((group for group in groups if _parallel(item, group[0])), [])
        if not group:
            groups.append(group)
        group.append(item)
    large = [group for group in groups if len(group) >= rules.min_slices]
    if not large:
        counts = " and ".join(str(len(group)) for group in groups)
        raise ScanError(path, f"{counts} slices, expected at least {rules.min_slices}", "few_slices")
    if len(large) > 1:
        raise ScanError(path, f"{len(large)} orientations or sizes in one series", "mixed_orientations")
    return large[0]


def _parallel(one: Slice, other: Slice) -> bool:
    if (one.shape, one.axes, one.spacing) == (other.shape, other.axes, other.spacing):
        return True
    return (
        one.shape == other.shape
        and np.allclose(one.axes, other.axes, atol=1e-3)
        and np.allclose(one.spacing, other.spacing, rtol=1e-3)
    )


def _stacks(path: Path, slices: Iterable[Slice]) -> list[list[Slice]]:
    """Volumes of slices sorted along their normal: one, or more if all places have as many slices."""
    places: list[list[Slice]] = []
    seen = set()
    for item in sorted(slices, key=lambda s: (s.along, s.number, str(s.pixels.path))):
        # Some de-identified archives give every slice one instance UID, so that alone makes no copy.
        instance = (item.uid, item.position, item.number)
        if instance in seen and item.uid:
            continue
        seen.add(instance)
        if places and item.along - places[-1][0].along < SAME_PLACE:
            places[-1].append(item)
        else:
            places.append([item])
    if len({len(place) for place in places}) > 1:
        places = [_without_copies(place) for place in places]
    counts = {len(place) for place in places}
    if len(counts) > 1:
        raise ScanError(path, f"from {min(counts)} to {max(counts)} slices at one place", "duplicate_slices")
    return split_volumes(path, places)


def _without_copies(place: list[Slice]) -> list[Slice]:
    """Slices at one place whose pixels differ."""
    kept: dict[bytes, Slice] = {}
    for item in place:
        for values in item.pixels.frames([item.frame], item.shape):  # which hold until the next are asked for
            kept.setdefault(values.tobytes(), item)
    return list(kept.values())


def _read_stack(path: Path, stack: list[Slice], rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (X, Y, Z) intensities and their affine."""
    check_count(path, len(stack), rules)
    index = _regular_places(path, np.array([item.along for item in stack]), rules)
    rows, columns = stack[0].shape
    affine = _affine(stack, int(index[-1]))
    check_grid(path, (columns, rows, int(index[-1]) + 1), affine, rules)

    array = np.empty(0)
    for pixels, group in groupby(zip(stack, index, strict=True), key=lambda pair: pair[0].pixels):
        pairs = list(group)
        frames = pixels.frames([item.frame for item, _ in pairs], (rows, columns))
        for (_, k), values in zip(pairs, frames, strict=True):
            if not array.size:
                array = np.empty((columns, rows, int(index[-1]) + 1), values.dtype, order="F")
            elif array.dtype != values.dtype:
                array = array.astype(np.promote_types(array.dtype, values.dtype), order="F")
            array[:, :, k] = values.T
    scales = [item.scale for item in stack]
    if len(set(scales)) == 1:
        _fill_missing(array, index)
        array = rescale(array, *scales[0], rules)
    else:
        array = _rescale_slices(array, index, scales, rules)
        _fill_missing(array, index)
    return finite(path, array, rules), affine


def _rescale_slices(
    array: np.ndarray, index: np.ndarray, scales: Sequence[tuple[float, float]], rules: Rules
) -> np.ndarray:
    """The slices at `index`, each by its own (slope, intercept), as float32; whether they are Hounsfield units already
    is told from all of them, as `rescale` tells it."""
    if rules.hounsfield and is_rescaled(array[:, :, index], *np.median(scales, axis=0)):
        return array
    result = array.astype(np.float32, order="F")
    for k, (slope, intercept) in zip(index, scales, strict=True):
        result[:, :, k] = result[:, :, k].astype(np.float64) * slope + intercept
    return result


def _regular_places(path: Path, along: np.ndarray, rules: Rules) -> np.ndarray:
    """The place of each slice, counted in usual steps: 0, 1, 2, ... but for missing ones."""
    if len(along) == 1:
        return np.zeros(1, dtype=np.int64)
    steps = np.diff(along)
    usual = np.median(steps)
    counts = np.maximum(1, np.rint(steps / usual)).astype(np.int64)
    index = np.concatenate([[0], np.cumsum(counts)])
    missing = 1 - len(along) / (index[-1] + 1)
    if missing > rules.max_missing:
        raise ScanError(
            path,
            f"{index[-1] + 1 - len(along)} of {index[-1] + 1} slices are missing, at most {rules.max_missing:.0%}",
            "missing_slices",
        )
    if np.abs(steps / counts - usual).max() > UNEVEN * usual:
        raise ScanError(path, f"uneven slices: from {steps.min():.3f} to {steps.max():.3f} mm apart", "uneven_slices")
    return index


def _affine(stack: Sequence[Slice], last: int) -> np.ndarray:
    """Voxel to millimetres of a stack whose final slice has the index `last`."""
    first, final = np.array(stack[0].position), np.array(stack[-1].position)
    rows, columns = stack[0].spacing
    affine = np.eye(4)
    affine[:3, 0] = np.array(stack[0].axes[:3]) * columns
    affine[:3, 1] = np.array(stack[0].axes[3:]) * rows
    affine[:3, 2] = (final - first) / last if last else np.cross(stack[0].axes[:3], stack[0].axes[3:])
    affine[:3, 3] = first
    affine[:3] *= LPS[:, None]
    return affine


def _fill_missing(array: np.ndarray, index: np.ndarray) -> None:
    """Put between two slices that are apart what lies between them, linearly."""
    for before, after in pairwise(index):
        for k in range(before + 1, after):
            weight = (k - before) / (after - before)
            between = array[:, :, before] * (1 - weight) + array[:, :, after] * weight
            array[:, :, k] = between if array.dtype.kind == "f" else np.rint(between)
