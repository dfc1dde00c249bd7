"""NIfTI images in: each file is opened once, its header first, its voxels behind."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .rules import Rules, check_grid, finite
from .scan import ScanError, ScanSource, Volume
from .voxels import BLOCK, check_file, rescale

TRAILING = 2**20  # bytes that may follow the voxels of a NIfTI file
LEADING = 2**26  # bytes that may come before them


def read_nifti(path: Path | str) -> Volume:
    """Read one 3D NIfTI image (`.nii`, `.nii.gz`, `.hdr` with `.img`).

    Raises:
        ScanError: missing, empty, truncated or not NIfTI; not 3D; an axis without use; too few finite voxels, or one
            value everywhere.
    """
    return read_volumes(ScanSource("", "nifti", (Path(path),)), Rules())[0]


def read_volumes(source: ScanSource, rules: Rules) -> list[Volume]:
    """Read one NIfTI image: one volume, or more where `rules` split a 4D one. Raises ScanError as `read_nifti`."""
    path = file = source.files[0]
    if path.name.lower().endswith((".hdr", ".hdr.gz")):
        file = path.with_name(path.name.replace(".hdr", ".img"))
    check_file(path)
    try:
        with _open_bytes(path) as content:
            header = _read_header(path, content, alone=file != path)
            if file == path:
                return _read_images(path, file, header, content, rules)
        if not file.is_file():
            raise EOFError(f"no {file}")
        with _open_bytes(file) as content:
            _read(content, max(0, header.get_data_offset()))
            return _read_images(path, file, header, content, rules)
    except (OSError, EOFError, zlib.error) as error:
        raise ScanError(path, f"truncated or corrupt ({error})") from error


def _read_header(path: Path, content: Any, alone: bool) -> Any:
    """The header at the start of a file; `content` is then where the voxels begin, unless it stands alone.

    Raises:
        ScanError: of neither version of NIfTI; longer than any header is meant to be; without the size of its voxels.
    """
    try:
        from nibabel import Nifti1Header, Nifti2Header
        from nibabel.spatialimages import HeaderDataError
    except ImportError as error:
        raise ImportError("reading NIfTI needs nibabel: pip install 'hlip-kernels[io]'") from error

    try:
        block = _read(content, 348)
        size = min(int.from_bytes(block[:4], order) for order in ("little", "big"))
        if size not in (348, 540):
            raise ValueError("wrong size of the header")
        kind = Nifti1Header if size == 348 else Nifti2Header
        header = kind(block + _read(content, size - 348), check=False)
        if header["magic"] not in (kind.single_magic, kind.pair_magic):
            raise ValueError(f"not a NIfTI image but one with the mark {header['magic'].item()!r}")
        if 3000 <= header["intent_code"] < 3100:
            raise ValueError("not a NIfTI image but CIFTI")
        if not header["vox_offset"] <= LEADING:
            raise ValueError(f"its voxels begin at byte {header['vox_offset']:g}")
        if header["sform_code"] <= 0 and not (header["pixdim"][1:4] > 0).all():
            raise ScanError(path, f"voxel size {header['pixdim'][1:4].tolist()} mm", "spacing")
        header.check_fix()
        if not alone:
            if header.get_data_offset() < size:
                raise ValueError("its voxels begin within the header")
            _read(content, header.get_data_offset() - size)
        return header
    except ScanError:
        raise
    except (HeaderDataError, OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise ScanError(path, f"not a readable NIfTI file ({error})") from error


def _read_images(path: Path, file: Path, header: Any, content: Any, rules: Rules) -> list[Volume]:
    """The volumes of a header: `content` is that of `file`, where the voxels begin."""
    shape = whole = header.get_data_shape()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 and (len(shape) != 4 or rules.four_d == "reject"):
        raise ScanError(path, f"expected one 3D volume, got {len(shape)}D of shape {whole}", "four_d")
    parts = shape[3] if len(shape) == 4 else 1
    if rules.four_d == "split" and parts > rules.max_parts:
        raise ScanError(path, f"{parts} volumes in one file, at most {rules.max_parts}", "four_d")
    affine, (slope, intercept) = _geometry(path, header)
    check_grid(path, shape, affine, rules)
    stored = header.get_data_dtype()
    if stored.kind not in "biuf":
        raise ScanError(path, f"expected one number a voxel, got {stored}", "not_grey")
    offset, count = header.get_data_offset(), int(np.prod(shape[:3]))
    packed = isinstance(content.raw, _Inflated)
    if not packed and file.stat().st_size < offset + count * parts * stored.itemsize:
        raise EOFError("shorter than its header says")
    kept = parts if rules.four_d == "split" else 1
    volumes = []
    for t in range(kept):
        raw = _read_voxels(content, count, stored).reshape(shape[:3], order="F")
        array = finite(path, rescale(raw, slope, intercept, rules), rules)
        volumes.append(Volume(array, affine, path, part=f"t{t}" if kept > 1 else ""))
    if packed and kept == parts and len(content.read(TRAILING + 1)) > TRAILING:  # its checksum is at the end
        raise EOFError("more data than its header says")
    return volumes


def _geometry(path: Path, header: Any) -> tuple[np.ndarray, tuple[float, float]]:
    """The affine, voxels to millimetres; slope and intercept.

    As ITK chooses where a header gives two ways or none: the sform if it is the scanner's or the only one, else the
    qform; without any, columns run to the left, rows to the front, slices upwards.
    """
    from nibabel.spatialimages import HeaderDataError

    qform, sform = int(header["qform_code"]), int(header["sform_code"])
    try:
        if sform == 1 or (sform and not qform):
            affine = header.get_sform()
        elif qform:
            affine = header.get_qform()
        else:
            affine = np.diag([-1.0, -1.0, 1.0, 1.0] * np.array([*header.get_zooms()[:3], 1.0]))
        slope, intercept = header.get_slope_inter()
    except (HeaderDataError, ValueError) as error:
        raise ScanError(path, f"not a readable NIfTI file ({error})") from error
    return np.asarray(affine, dtype=np.float64), (1.0 if slope is None else float(slope), float(intercept or 0))


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
            piece = self._inflater.decompress(self._input, min(len(buffer), BLOCK))
            self._input = self._inflater.unconsumed_tail or self._inflater.unused_data
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_bytes(path: Path) -> Any:
    return io.BufferedReader(_Inflated(path), 1) if path.suffix.lower() == ".gz" else path.open("rb")


def _read(content: Any, count: int) -> bytes:
    block = bytearray(count)
    _read_into(content, memoryview(block))
    return bytes(block)


def _read_into(content: Any, target: memoryview) -> None:
    if content.readinto(target) < len(target):
        raise EOFError("shorter than its header says")


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
