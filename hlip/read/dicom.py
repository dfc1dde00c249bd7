"""DICOM series in: headers by pydicom, compressed pixels by SimpleITK (GDCM)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .nifti import check_file, finite, rescale
from .rules import Rules, check_grid, check_image_type, check_modality
from .scan import ScanError, ScanSource, Volume

LPS = np.array([-1.0, -1.0, 1.0])  # DICOM's x runs to the left, its y to the back
SAME_PLACE = 0.01  # mm; closer slices are at one place
UNEVEN = 0.1  # of the usual step; what a slice may lie off the regular grid
MAX_FRAMES = 2**16  # of one file
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax
PIXEL_TAGS = (
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "PixelData",
)  # fmt: skip
MAX_TILES = 2**16  # of a JPEG 2000 image, as the standard has it
START_OF_FRAME = {bytes([0xFF, k]) for k in (*range(0xC0, 0xD0), 0xF7)} - {b"\xff\xc4", b"\xff\xc8", b"\xff\xcc"}


@dataclass(frozen=True)
class Slice:
    """One slice of a series, its pixels not yet read.

    axes: (6) - directions of a row and of a column, as DICOM gives them.
    position: (3) mm - the first pixel's place, as DICOM gives it.
    spacing: mm from row to row and from column to column.
    slope, intercept: from stored numbers to intensities, as the header has them.
    compressed: by other than run lengths; GDCM decodes such pixels.
    order: of slices at the same place.
    """

    path: Path
    frame: int
    uid: str
    shape: tuple[int, int]
    axes: tuple[float, ...]
    position: tuple[float, ...]
    spacing: tuple[float, float]
    slope: float
    intercept: float
    compressed: bool
    order: tuple[float, ...]

    @property
    def along(self) -> float:
        """Place along the normal, mm."""
        return float(np.dot(np.cross(self.axes[:3], self.axes[3:]), self.position))


def read_dicom(source: ScanSource, rules: Rules) -> list[Volume]:
    """Read one series: slices sorted along their normal, however files are named and numbered.

    A few slices of another orientation or size (a scout) are left out. A slice that occurs twice is taken once; where
    every place has the same number of slices, they are volumes of a 4D series. Missing slices are interpolated between
    their neighbours, up to `rules.max_missing`. Frames of multi-frame files are slices like others. A gantry tilt stays
    in the affine as shear.

    Raises:
        ScanError: see `Rules`.
    """
    first, slices = None, []
    for path in source.files:
        data = _open_dicom(path)
        series, modality, description, image_type = _about(path, data)
        first = first or (series, modality, description)
        if series != first[0]:
            raise ScanError(path, f"of another series than {source.files[0].name}")
        check_modality(path, modality, rules)
        check_image_type(path, image_type, rules)
        slices.extend(_slices(path, data))
    assert first is not None
    path = source.files[0]
    slices = _one_orientation(path, slices, rules)
    if len(slices) * np.prod(slices[0].shape, dtype=np.float64) > rules.max_voxels:
        raise ScanError(path, f"the series has more than {rules.max_voxels} voxels", "too_large")
    stacks = _stacks(path, slices)
    if len(stacks) > 1 and (rules.four_d == "reject" or (rules.four_d == "split" and len(stacks) > rules.max_parts)):
        raise ScanError(path, f"expected one 3D volume, got {len(stacks)} at the same places", "four_d")
    stacks = stacks if rules.four_d == "split" else stacks[:1]
    modality, description = source.modality or first[1], source.description or first[2]
    volumes = []
    for t, stack in enumerate(stacks):
        array, affine = _read_stack(path, stack, rules)
        volumes.append(Volume(array, affine, path, modality, description, f"t{t}" if len(stacks) > 1 else ""))
    return volumes


def _open_dicom(path: Path) -> Any:
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise ImportError("reading DICOM needs pydicom: pip install 'hlip-kernels[io]'") from error

    check_file(path)
    try:
        with path.open("rb") as file:
            if DEFLATED in file.read(2048):
                raise ScanError(path, "deflated as a whole: its size cannot be told before it is read")
            file.seek(0)
            return pydicom.dcmread(file, stop_before_pixels=True)
    except ScanError:
        raise
    except InvalidDicomError as error:
        raise ScanError(path, f"not a DICOM file ({error})") from error
    except Exception as error:  # a damaged file may fail anywhere within the parser
        raise ScanError(path, f"truncated or corrupt ({type(error).__name__}: {error})") from error


def _about(path: Path, data: Any) -> tuple[str, str, str, list[str]]:
    """The UID of the series, its modality and description, and the values of the image's type."""
    try:
        names = ("SeriesInstanceUID", "Modality", "SeriesDescription")
        series, modality, description = (str(data.get(name) or "") for name in names)
        return series, modality, description, _strings(data.get("ImageType"))
    except Exception as error:  # values are parsed when they are asked for, each with errors of its own
        raise ScanError(path, f"a damaged header ({type(error).__name__}: {error})") from error


def _strings(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _slices(path: Path, data: Any) -> list[Slice]:
    """The slices of one file: one, or each frame of a multi-frame one."""
    try:
        if int(data.get("SamplesPerPixel", 1)) != 1 or str(data.get("PhotometricInterpretation")) != "MONOCHROME2":
            what = f"{data.get('SamplesPerPixel', 1)} samples, {data.get('PhotometricInterpretation')}"
            raise ScanError(path, f"expected one grey value a pixel, got {what}", "not_grey")
        frames = int(data.get("NumberOfFrames") or 1)
        if "PerFrameFunctionalGroupsSequence" not in data:
            if frames > 1:
                raise ScanError(path, f"{frames} frames without a place for each")
            return [_slice(path, data, 0, data)]
        groups = data.PerFrameFunctionalGroupsSequence
        if len(groups) != frames or frames > MAX_FRAMES:
            raise ScanError(path, f"{frames} frames with places for {len(groups)}")
        shared = data.get("SharedFunctionalGroupsSequence") or [None]
        return [_slice(path, data, k, _functional_groups(groups[k], shared[0])) for k in range(frames)]
    except ScanError:
        raise
    except Exception as error:  # values are parsed when they are asked for, each with errors of its own
        raise ScanError(path, f"a damaged header ({type(error).__name__}: {error})") from error


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
    ):
        for group in (shared, frame):
            if group is not None and group.get(name):
                merged.update(group[name].value[0])
    return merged


def _slice(path: Path, data: Any, frame: int, place: Any) -> Slice:
    from pydicom.uid import RLELossless

    for name in ("ImageOrientationPatient", "ImagePositionPatient"):
        if not place.get(name):
            raise ScanError(path, f"no {name}: not a slice of a volume", "localiser")
    if not place.get("PixelSpacing"):
        raise ScanError(path, "no PixelSpacing", "spacing")
    syntax = data.file_meta.TransferSyntaxUID
    compressed = syntax.is_compressed and syntax != RLELossless
    slope = 1.0 if place.get("RescaleSlope") is None else float(place.RescaleSlope)
    intercept = float(place.get("RescaleIntercept") or 0)
    axes = tuple(float(x) for x in place.ImageOrientationPatient)
    position = tuple(float(x) for x in place.ImagePositionPatient)
    spacing = tuple(float(x) for x in place.PixelSpacing)
    if (len(axes), len(position), len(spacing)) != (6, 3, 2) or not np.isfinite([*axes, *position, *spacing]).all():
        raise ScanError(path, f"a damaged header: {len(axes)}, {len(position)} and {len(spacing)} numbers of its place")
    if min(spacing) <= 0:
        raise ScanError(path, f"PixelSpacing {spacing} mm", "spacing")
    if np.linalg.norm(np.cross(axes[:3], axes[3:])) < 0.1:
        raise ScanError(path, f"rows and columns run the same way: {axes}", "sheared")
    return Slice(
        path,
        frame,
        str(data.get("SOPInstanceUID", "")),
        (int(data.Rows), int(data.Columns)),
        axes,
        position,
        (spacing[0], spacing[1]),
        slope,
        intercept,
        compressed,
        (float(data.get("AcquisitionNumber") or 0), float(data.get("InstanceNumber") or 0), frame),
    )


def _one_orientation(path: Path, slices: Sequence[Slice], rules: Rules) -> list[Slice]:
    """The slices that lie parallel; a group too small for a volume, such as a scout, is left out."""
    groups: list[list[Slice]] = []
    for item in slices:
        for group in groups:
            if _parallel(item, group[0]):
                group.append(item)
                break
        else:
            groups.append([item])
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
    same_axes = np.allclose(one.axes, other.axes, atol=1e-3)
    return one.shape == other.shape and same_axes and bool(np.allclose(one.spacing, other.spacing, rtol=1e-3))


def _stacks(path: Path, slices: Iterable[Slice]) -> list[list[Slice]]:
    """Volumes of slices sorted along their normal: one, or more if all places have as many slices."""
    places: list[list[Slice]] = []
    seen = set()
    for item in sorted(slices, key=lambda s: (s.along, s.order, str(s.path))):
        if (item.uid, item.frame) in seen and item.uid:
            continue
        seen.add((item.uid, item.frame))
        if places and item.along - places[-1][0].along < SAME_PLACE:
            places[-1].append(item)
        else:
            places.append([item])
    counts = {len(place) for place in places}
    if len(counts) > 1:
        places = [_without_copies(place) for place in places]
        counts = {len(place) for place in places}
    if len(counts) > 1:
        raise ScanError(path, f"from {min(counts)} to {max(counts)} slices at one place", "duplicate_slices")
    return [[sorted(place, key=lambda s: (s.order, str(s.path)))[t] for place in places] for t in range(counts.pop())]


def _without_copies(place: list[Slice]) -> list[Slice]:
    """Slices at one place whose pixels differ."""
    kept: dict[bytes, Slice] = {}
    for item in place:
        kept.setdefault(next(_frames([item])).tobytes(), item)
    return list(kept.values())


def _read_stack(path: Path, stack: list[Slice], rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (X, Y, Z) intensities and their affine."""
    if len(stack) < rules.min_slices:
        raise ScanError(path, f"{len(stack)} slices, expected at least {rules.min_slices}", "few_slices")
    index = _regular_places(path, np.array([item.along for item in stack]), rules)
    rows, columns = stack[0].shape
    affine = _affine(stack, int(index[-1]))
    check_grid(path, (columns, rows, int(index[-1]) + 1), affine, rules)

    array = np.empty(0)
    scales = {(item.slope, item.intercept) for item in stack}
    for _, group in groupby(zip(stack, index, strict=True), key=lambda pair: pair[0].path):
        pairs = list(group)
        for (item, k), values in zip(pairs, _frames([item for item, _ in pairs]), strict=True):
            if len(scales) > 1:
                values = rescale(values.astype(np.float32), item.slope, item.intercept, rules)
            if not array.size:
                array = np.empty((columns, rows, int(index[-1]) + 1), values.dtype, order="F")
            elif array.dtype != values.dtype:
                array = array.astype(np.promote_types(array.dtype, values.dtype), order="F")
            array[:, :, k] = values.T
    _fill_missing(array, index)
    if len(scales) == 1:
        array = rescale(array, *scales.pop(), rules)
    return finite(path, array, rules), affine


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
        reason = f"{index[-1] + 1 - len(along)} of {index[-1] + 1} slices are missing, at most {rules.max_missing:.0%}"
        raise ScanError(path, reason, "missing_slices")
    if np.abs(steps / counts - usual).max() > UNEVEN * usual:
        reason = f"uneven slices: from {steps.min():.3f} to {steps.max():.3f} mm apart"
        raise ScanError(path, reason, "uneven_slices")
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


def _frames(items: Sequence[Slice]) -> Iterator[np.ndarray]:
    """The (rows, columns) numbers of slices of one file, as stored.

    Frames are decoded one at a time; but GDCM decodes a file as a whole.
    """
    from pydicom.pixels import iter_pixels

    path, shape = items[0].path, items[0].shape
    numbers = [item.frame for item in items]
    try:
        if items[0].compressed:
            image = _gdcm_image(path, shape)  # must outlive the view of it
            frames = _gdcm_view(image).reshape(-1, *shape)
            if max(numbers) >= len(frames):
                raise ScanError(path, f"{len(frames)} frames, expected more than {max(numbers)}")
            yield from (frames[k].astype(np.float32) if frames.dtype == np.float64 else frames[k] for k in numbers)
            return
        for frame in iter_pixels(path, indices=numbers, raw=True):
            if frame.shape != shape:
                raise ScanError(path, f"pixels of shape {frame.shape}, expected {shape}")
            yield frame
    except (ScanError, ImportError):
        raise
    except Exception as error:  # a damaged file may fail anywhere within the decoder
        raise ScanError(path, f"truncated or corrupt pixels ({type(error).__name__}: {error})") from error


def _check_code_streams(path: Path, data: Any, shape: tuple[int, int]) -> None:
    """Raises ScanError unless every frame is an image of that shape by its own header, which is what GDCM goes by:
    a few bytes there may ask for any memory."""
    from pydicom.encaps import generate_frames

    for frame in generate_frames(data.PixelData, number_of_frames=int(data.get("NumberOfFrames") or 1)):
        found = _size_of_code_stream(frame)
        if found != (*shape, 1):
            raise ScanError(path, f"corrupt pixels (their shape is {found}, expected {(*shape, 1)})")


def _size_of_code_stream(stream: bytes) -> tuple[int, ...]:
    """Rows, columns and samples of a JPEG, JPEG-LS or JPEG 2000 image; nothing of what is neither."""
    if stream[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000
        right, lower, left, upper = struct.unpack(">4I", stream[8:24])
        across, down = struct.unpack(">2I", stream[24:32])  # of a tile, of which there may be many
        samples = int.from_bytes(stream[40:42], "big")
        tiles = (right // max(across, 1) + 1) * (lower // max(down, 1) + 1)
        return (lower - upper, right - left, samples) if tiles <= MAX_TILES else ()
    at = 0
    while stream[4:8] == b"jP  " and (length := int.from_bytes(stream[at : at + 4], "big")) >= 8:
        at += length  # boxes of a JPEG 2000 file before its code stream
        if stream[at + 4 : at + 8] == b"jp2c":
            return _size_of_code_stream(stream[at + 8 :])
    at = 2 if stream[:2] == b"\xff\xd8" else len(stream)
    while at + 10 <= len(stream):
        marker, length = stream[at : at + 2], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker in START_OF_FRAME:
            return (*struct.unpack(">2H", stream[at + 5 : at + 9]), stream[at + 9])
        at += 1 if marker == b"\xff\xff" else 2 + max(length, 2)
    return ()


def _gdcm_image(path: Path, shape: tuple[int, int]) -> Any:
    """The stored numbers of all frames. GDCM sees what it needs to decode them and nothing else, in a file that is in
    memory only: it allocates whatever any other element claims to hold."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise ImportError("reading compressed DICOM needs SimpleITK: pip install 'hlip-kernels[io]'") from error

    from pydicom import Dataset, dcmread
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, SecondaryCaptureImageStorage

    data = dcmread(path, specific_tags=list(PIXEL_TAGS))
    _check_code_streams(path, data, shape)
    plain = Dataset()
    for tag in PIXEL_TAGS:
        if tag in data:
            plain.add(data[tag])
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = data.file_meta.TransferSyntaxUID
    plain.SOPClassUID = plain.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    plain.SOPInstanceUID = plain.file_meta.MediaStorageSOPInstanceUID = UID("1.2")
    with os.fdopen(os.memfd_create("slices.dcm"), "wb") as file:
        plain.save_as(file, enforce_file_format=True)
        file.flush()
        return sitk.ReadImage(f"/proc/self/fd/{file.fileno()}", imageIO="GDCMImageIO")


def _gdcm_view(image: Any) -> np.ndarray:
    import SimpleITK as sitk

    return sitk.GetArrayViewFromImage(image)
