"""Image files in. A file that cannot be used raises `ScanError`, which names it and says why."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .files import NIFTI_SUFFIXES
from .rules import Rules, check_grid, check_source, is_rescaled
from .scan import ScanError, ScanSource, Volume
from .tensors import load_tensors

__all__ = ["ScanError", "Volume", "read_nifti", "read_scan"]
BLOCK = 2**24  # bytes that are read and converted at a time
TRAILING = 2**20  # bytes that may follow the voxels of a NIfTI file
LEADING = 2**26  # bytes that may come before them: nibabel reads a header's extensions into memory, whatever their size


def read_scan(source: ScanSource, rules: Rules) -> list[Volume]:
    """Read one scan: one volume, or more where `rules` split a 4D image.

    Raises:
        ScanError: not readable, or against the rules that concern files.
    """
    check_source(source, rules)
    if source.kind == "nifti":
        volumes = _read_nifti(source.files[0], rules)
    elif source.kind == "dicom":
        from .dicom import read_dicom

        return read_dicom(source, rules)
    else:
        volumes = [_read_tensor(source.files[0], rules)]
    return [replace(v, modality=source.modality, description=source.description) for v in volumes]


def read_nifti(path: Path | str) -> Volume:
    """Read one 3D NIfTI image (`.nii`, `.nii.gz`, `.hdr` with `.img`).

    Raises:
        ScanError: missing, empty, truncated or not NIfTI; not 3D; an axis without use; too few finite voxels, or one
            value everywhere.
    """
    return _read_nifti(Path(path), Rules())[0]


def _read_nifti(path: Path, rules: Rules) -> list[Volume]:
    image = _open_nifti(path)
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 and (len(shape) != 4 or rules.four_d == "reject"):
        raise ScanError(path, f"expected one 3D volume, got {len(shape)}D of shape {image.shape}", "four_d")
    parts = shape[3] if len(shape) == 4 else 1
    if rules.four_d == "split" and parts > rules.max_parts:
        raise ScanError(path, f"{parts} volumes in one file, at most {rules.max_parts}", "four_d")
    affine = _affine(path, image.header)
    check_grid(path, shape, affine, rules)
    stored = image.get_data_dtype()
    if stored.kind not in "biuf":
        raise ScanError(path, f"expected one number a voxel, got {stored}", "not_grey")
    offset = int(image.dataobj.offset)
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    count = int(np.prod(shape[:3]))
    file = Path(image.file_map["image"].filename)
    kept = parts if rules.four_d == "split" else 1
    volumes = []
    try:
        with _open_bytes(file) as content:
            if not isinstance(content, _Inflated) and file.stat().st_size < offset + count * parts * stored.itemsize:
                raise EOFError("shorter than its header says")
            _skip(content, offset)
            for t in range(kept):
                raw = _read_voxels(content, count, stored).reshape(shape[:3], order="F")
                array = finite(path, rescale(raw, slope, intercept, rules), rules)
                volumes.append(Volume(array, affine, path, part=f"t{t}" if kept > 1 else ""))
            if kept == parts:
                _finish(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ScanError(path, f"truncated or corrupt ({error})") from error
    return volumes


def _affine(path: Path, header: Any) -> np.ndarray:
    """Voxels to millimetres, as ITK chooses where a header gives two ways or none: the sform if it is the scanner's or
    the only one, else the qform; without any, columns run to the left, rows to the front, slices upwards."""
    from nibabel.spatialimages import HeaderDataError

    qform, sform = int(header["qform_code"]), int(header["sform_code"])
    try:
        if sform == 1 or (sform and not qform):
            affine = header.get_sform()
        elif qform:
            affine = header.get_qform()
        else:
            affine = np.diag([-1.0, -1.0, 1.0, 1.0] * np.array([*header.get_zooms()[:3], 1.0]))
    except (HeaderDataError, ValueError) as error:
        raise ScanError(path, f"not a readable NIfTI file ({error})") from error
    return np.asarray(affine, dtype=np.float64)


def _open_nifti(path: Path) -> Any:
    """The image with its header read, its voxels not."""
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    except ImportError as error:
        raise ImportError("reading NIfTI needs nibabel: pip install 'hlip-kernels[io]'") from error

    check_file(path)
    try:
        if path.name.lower().endswith(NIFTI_SUFFIXES):
            _check_header(path)
        image = nibabel.load(path)
        kinds = (nibabel.Nifti1Image, nibabel.Nifti2Image, nibabel.Nifti1Pair, nibabel.Nifti2Pair)
        if type(image) not in kinds:
            raise ScanError(path, f"not a NIfTI image but {type(image).__name__}")
        voxels = Path(image.file_map["image"].filename)
        if not voxels.is_file():
            raise ScanError(path, f"truncated or corrupt (no {voxels})")
        if voxels.suffix.lower() not in (".nii", ".img", ".gz"):
            raise ScanError(path, f"compressed by other than gzip ({voxels.suffix})")
        int(image.dataobj.offset)  # may not be a number
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        if isinstance(error, ScanError):
            raise
        raise ScanError(path, f"not a readable NIfTI file ({error})") from error
    return image


def _check_header(path: Path) -> None:
    """What nibabel passes by, mends in silence, or stumbles over.

    Raises:
        ScanError: of neither version of NIfTI; longer than any header is meant to be; without the size of its voxels.
    """
    from nibabel import Nifti1Header, Nifti2Header

    block = bytearray(540)
    with _open_bytes(path) as content:
        _read_into(content, memoryview(block)[:348])
        size = min(int.from_bytes(block[:4], order) for order in ("little", "big"))
        if size not in (348, 540):
            raise ScanError(path, "not a readable NIfTI file (wrong size of the header)")
        _read_into(content, memoryview(block)[348:size])
    header = (Nifti1Header if size == 348 else Nifti2Header)(bytes(block[:size]), check=False)
    if not header["vox_offset"] <= LEADING:
        raise ScanError(path, f"not a readable NIfTI file (its voxels begin at byte {header['vox_offset']:g})")
    if header["sform_code"] <= 0 and not (header["pixdim"][1:4] > 0).all():
        raise ScanError(path, f"voxel size {header['pixdim'][1:4].tolist()} mm", "spacing")


def check_file(path: Path) -> None:
    """Raises ScanError where there is no file, or nothing in it."""
    try:
        size = path.stat().st_size
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise ScanError(path, "no such file", "missing") from error
        raise ScanError(path, f"cannot be read ({error.strerror})") from error
    if not path.is_file():
        raise ScanError(path, "not a regular file")
    if size == 0:
        raise ScanError(path, "empty file")


class _Inflated(io.RawIOBase):
    """A gzip file's content, inflated piece by piece: faster than the gzip module, and as strict about checksums."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._inflater = zlib.decompressobj(wbits=31)
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if not self._input:
                self._input = self._file.read(2**18)
            if self._inflater.eof and self._input.strip(b"\0"):  # zeros may pad the last member
                self._inflater = zlib.decompressobj(wbits=31)
            elif self._inflater.eof:
                self._input = b""
                return 0
            elif not self._input:
                raise EOFError("the compressed data end early")
            piece = self._inflater.decompress(self._input, len(buffer))
            self._input = self._inflater.unconsumed_tail or self._inflater.unused_data
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_bytes(path: Path) -> Any:
    return _Inflated(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _skip(content: Any, count: int) -> None:
    while count > 0:
        piece = memoryview(bytearray(min(count, BLOCK)))
        _read_into(content, piece)
        count -= len(piece)


def _read_into(content: Any, target: memoryview) -> None:
    done = 0
    while done < len(target):
        got = content.readinto(target[done : done + BLOCK])
        if not got:
            raise EOFError("shorter than its header says")
        done += got


def _read_voxels(content: Any, count: int, stored: np.dtype) -> np.ndarray:
    """The next `count` numbers, in the machine's byte order; those of 8 bytes and more as float32."""
    if stored.itemsize <= 4 and stored.isnative:
        array = np.empty(count, stored)
        _read_into(content, array.view(np.uint8).data)
        return array
    array = np.empty(count, np.float32 if stored.itemsize > 4 else stored.newbyteorder("="))
    for first in range(0, count, BLOCK // stored.itemsize):
        block = np.empty(min(count - first, BLOCK // stored.itemsize), stored)
        _read_into(content, block.view(np.uint8).data)
        with np.errstate(over="ignore", invalid="ignore"):
            array[first : first + len(block)] = block
    return array


def _finish(content: Any) -> None:
    """Read to the end, where a compressed file keeps its checksum."""
    if isinstance(content, _Inflated):
        left, buffer = TRAILING, memoryview(bytearray(TRAILING))
        while got := content.readinto(buffer):
            left -= got
            if left < 0:
                raise EOFError("more data than its header says")


def rescale(array: np.ndarray, slope: float, intercept: float, rules: Rules) -> np.ndarray:
    """`array * slope + intercept`, in place where its type can hold that; else as int32 or float32.

    Where `rules` want Hounsfield units and the numbers are such already, they stay as they are: many archives keep
    converted volumes under headers that ask to convert them again.
    """
    if (slope, intercept) == (1, 0) or (rules.hounsfield and is_rescaled(array, slope, intercept)):
        return array
    if array.dtype.kind in "iu" and slope == 1 and intercept == int(intercept):
        low, high = int(array.min()) + int(intercept), int(array.max()) + int(intercept)
        for kind in (array.dtype, np.dtype(np.int16), np.dtype(np.int32)):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                result = array if kind == array.dtype else np.empty_like(array, kind)
                return np.add(array, int(intercept), out=result, dtype=np.int64, casting="unsafe")
    assert array.flags.forc  # else the numbers raveled would be a copy
    flat = array.ravel("K")
    result = flat.view(np.float32) if array.itemsize == 4 else np.empty_like(flat, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(0, flat.size, BLOCK // 8):
            result[k : k + BLOCK // 8] = flat[k : k + BLOCK // 8].astype(np.float64) * slope + intercept
    return result.reshape(array.shape, order="F" if array.flags.f_contiguous else "C")


def finite(path: Path, array: np.ndarray, rules: Rules) -> np.ndarray:
    """The array with its smallest finite value where there was none, in place.

    Raises:
        ScanError: too few finite voxels, or one value everywhere.
    """
    if array.dtype.kind == "f" and not np.isfinite([array.min(), array.max()]).all():
        good = np.isfinite(array)
        share = float(good.mean())
        if share == 0:
            raise ScanError(path, "no finite voxel", "not_finite")
        if share < rules.min_finite:
            raise ScanError(
                path, f"{share:.0%} of the voxels are finite, expected {rules.min_finite:.0%}", "not_finite"
            )
        array[~good] = array[good].min()
    low = array.min()
    if array.max() == low:
        raise ScanError(path, f"constant: every voxel is {low}", "constant")
    return array


def _read_tensor(path: Path, rules: Rules) -> Volume:
    """Read a `.pt` scan of the released tools: (D, H, W) or (D, H, W, 1), through-plane axis first.

    Numbers of type uint8, or floating-point ones within [0, 1], are a prepared scan's intensities (of 255); others are
    intensities still to be windowed, such as Hounsfield units. The grid is taken as prepared in any case: the file
    keeps neither spacing nor orientation.
    """
    import torch

    check_file(path)
    try:
        tensor = load_tensors(path)
    except (OSError, ValueError) as error:
        raise ScanError(path, f"not a readable tensor ({str(error)[:200]})") from error
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ScanError(path, f"expected a dense tensor, got {type(tensor).__name__}")
    tensor = tensor.detach()
    if tensor.dim() == 4 and tensor.shape[3] == 1:
        tensor = tensor[..., 0]
    if tensor.dim() != 3:
        raise ScanError(path, f"expected a tensor (D, H, W), got shape {tuple(tensor.shape)}", "four_d")
    if tensor.is_complex() or tensor.is_quantized or tensor.dtype == torch.bool:
        raise ScanError(path, f"expected one number a voxel, got {tensor.dtype}", "not_grey")
    affine = np.diag([1.0, -1.0, -1.0, 1.0])
    check_grid(path, tuple(tensor.shape), affine, rules)
    if tensor.is_floating_point():
        array = finite(path, tensor.to(torch.float32, copy=True).numpy(), rules)
        if array.min() >= 0 and array.max() <= 1:
            array = np.rint(array * 255).astype(np.uint8)
    else:
        array = finite(path, tensor.numpy().copy(), rules)
    return Volume(array.transpose(2, 1, 0), affine, path, prepared=True)
