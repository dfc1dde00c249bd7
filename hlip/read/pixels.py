"""Pixels of DICOM files: by pydicom, but compressed ones by SimpleITK (GDCM)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .scan import ScanError, damage

STORED = (
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation",
)  # fmt: skip
MAX_TILES = 2**16  # of a JPEG 2000 image, as the standard has it
START_OF_FRAME = {bytes([0xFF, k]) for k in (*range(0xC0, 0xD0), 0xF7)} - {b"\xff\xc4", b"\xff\xc8", b"\xff\xcc"}


class Pixels:
    """The pixels of one file, which are read where they lie when they are asked for.

    header: says how they are stored.
    offset: byte at which their element begins; 0 if there is none.
    """

    def __init__(self, path: Path, header: Any, offset: int) -> None:
        from pydicom.uid import RLELossless

        self.path, self.header, self.offset = path, header, offset
        self.syntax = header.file_meta.TransferSyntaxUID
        self.by_gdcm = self.syntax.is_compressed and self.syntax != RLELossless

    def frames(self, numbers: Sequence[int], shape: tuple[int, int]) -> Iterator[np.ndarray]:
        """The (rows, columns) numbers of some frames, as stored.

        Frames are decoded one at a time; but GDCM decodes a file as a whole.
        """
        from pydicom.datadict import keyword_for_tag
        from pydicom.filereader import data_element_generator
        from pydicom.pixels import as_pixel_options, get_decoder

        with damage(self.path, "truncated or corrupt pixels"), self.path.open("rb") as file:
            if not self.offset:
                raise EOFError("there are none")
            file.seek(self.offset)
            implicit, little = self.header.original_encoding
            element: Any = next(data_element_generator(file, implicit, little, defer_size=None if self.by_gdcm else 1))
            if self.by_gdcm:
                yield from _by_gdcm(self.path, self.header, element, numbers, shape)
                return
            file.seek(element.value_tell)
            options = as_pixel_options(self.header, pixel_keyword=keyword_for_tag(element.tag), pixel_vr=element.VR)
            for frame, _ in get_decoder(self.syntax).iter_array(file, indices=numbers, raw=True, **options):
                if frame.shape != shape:
                    raise ScanError(self.path, f"pixels of shape {frame.shape}, expected {shape}")
                yield frame


def _by_gdcm(
    path: Path, header: Any, element: Any, numbers: Sequence[int], shape: tuple[int, int]
) -> Iterator[np.ndarray]:
    """The stored numbers of some frames. GDCM sees what it needs to decode them and nothing else, in a file that is in
    memory only: it allocates whatever any other element claims to hold."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise ImportError("reading compressed DICOM needs SimpleITK: pip install 'hlip-kernels[io]'") from error

    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.encaps import generate_frames
    from pydicom.uid import UID, SecondaryCaptureImageStorage

    plain = Dataset()
    for tag in STORED:
        if tag in header:
            plain.add(header[tag])
    plain[element.tag] = element
    for frame in generate_frames(plain.PixelData, number_of_frames=int(header.get("NumberOfFrames") or 1)):
        size = _size_of_code_stream(frame)
        if size != (*shape, 1):  # GDCM goes by it, and a few bytes may ask for any memory
            raise ScanError(path, f"corrupt pixels (their shape is {size}, expected {(*shape, 1)})")
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = header.file_meta.TransferSyntaxUID
    plain.SOPClassUID = plain.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    plain.SOPInstanceUID = plain.file_meta.MediaStorageSOPInstanceUID = UID("1.2")
    with os.fdopen(os.memfd_create("slices.dcm"), "wb") as file:
        plain.save_as(file, enforce_file_format=True)
        file.flush()
        image = sitk.ReadImage(f"/proc/self/fd/{file.fileno()}", imageIO="GDCMImageIO")  # must outlive the view of it
    frames = sitk.GetArrayViewFromImage(image).reshape(-1, *shape)
    if max(numbers) >= len(frames):
        raise ScanError(path, f"{len(frames)} frames, expected more than {max(numbers)}")
    yield from (frames[k].astype(np.float32) if frames.dtype == np.float64 else frames[k] for k in numbers)


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
