"""Image files in. A file that cannot be used raises `ScanError`, which names it and says why."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_VOXELS = 2**30  # 4 GiB as float32; a larger header is a mistake or an attack
MAX_SHEAR = 0.01  # cosine between two axes; larger than what rounding of a header can cause


class ScanError(ValueError):
    """A scan that cannot be used. The message names the file and the reason.

    rule: a short name for all errors of the kind, by which they are counted.
    """

    def __init__(self, path: Path | str, reason: str, rule: str = "unreadable") -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason
        self.rule = rule

    def __reduce__(self) -> tuple[type[ScanError], tuple[str, str, str]]:
        return ScanError, (self.path, self.reason, self.rule)


@dataclass(frozen=True)
class Volume:
    """One 3D image as read.

    array: (X, Y, Z) float32 - intensities; not-a-number and infinite voxels hold the smallest finite value.
    affine: (4, 4) float64 - voxel to millimetres, x to the right, y anterior, z superior.
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path


def read_nifti(path: Path | str) -> Volume:
    """Read one 3D NIfTI image (`.nii`, `.nii.gz`).

    Raises:
        ScanError: missing, empty, truncated or not NIfTI; not 3D; a zero or sheared axis; no finite voxel,
            or one value everywhere.
    """
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    except ImportError as error:
        raise ImportError("reading NIfTI needs nibabel: pip install 'hlip-kernels[io]'") from error

    path = Path(path)
    if not path.is_file():
        raise ScanError(path, "no such file")
    if path.stat().st_size == 0:
        raise ScanError(path, "empty file")
    size = _uncompressed_size(path)
    unreadable = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, OverflowError, zlib.error)
    try:
        image = nibabel.load(path)
    except unreadable as error:
        raise ScanError(path, f"not a readable NIfTI file ({error})") from error
    if type(image) not in (nibabel.Nifti1Image, nibabel.Nifti2Image, nibabel.Nifti1Pair, nibabel.Nifti2Pair):
        raise ScanError(path, f"not a NIfTI image but {type(image).__name__}")

    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise ScanError(path, f"expected one 3D volume, got {len(shape)}D of shape {image.shape}")
    if min(shape) < 1:
        raise ScanError(path, f"an axis has no voxels: shape {shape}")
    if np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        raise ScanError(path, f"shape {shape} has more than {MAX_VOXELS} voxels")
    affine = np.asarray(image.affine, dtype=np.float64)
    _check_axes(path, affine)
    if image.get_data_dtype().kind not in "biuf":
        raise ScanError(path, f"expected one number a voxel, got {image.get_data_dtype()}")
    needed = int(image.dataobj.offset) + int(np.prod(shape)) * image.get_data_dtype().itemsize
    if isinstance(image, nibabel.Nifti1Image) and size < needed:
        raise ScanError(path, f"truncated or corrupt (the header asks for {needed} bytes, there are {size})")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            array = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    except unreadable as error:
        raise ScanError(path, f"truncated or corrupt ({error})") from error
    return Volume(_finite(path, array), affine, path)


def _uncompressed_size(path: Path) -> int:
    """Bytes of the file's content. Reads compressed files to the end, which checks their checksum."""
    if path.suffix.lower() != ".gz":
        return path.stat().st_size
    size = 0
    try:
        with gzip.open(path) as file:
            while block := file.read(2**20):
                size += len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise ScanError(path, f"not a readable NIfTI file: truncated or corrupt ({error})") from error
    return size


def _check_axes(path: Path, affine: np.ndarray) -> None:
    axes = affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or not (spacing > 1e-6).all():
        raise ScanError(path, f"an axis has no length: voxel size {spacing.round(6).tolist()} mm")
    cosines = (axes / spacing).T @ (axes / spacing)
    shear = np.abs(cosines - np.eye(3)).max()
    if shear > MAX_SHEAR:
        raise ScanError(path, f"sheared axes: cosine {shear:.3f} between two of them (at most {MAX_SHEAR})")


def _finite(path: Path, array: np.ndarray) -> np.ndarray:
    finite = np.isfinite(array)
    if not finite.any():
        raise ScanError(path, "no finite voxel")
    low = array.min() if finite.all() else array[finite].min()
    array = np.where(finite, array, low)
    if array.max() == low:
        raise ScanError(path, f"constant: every voxel is {low}")
    return array
