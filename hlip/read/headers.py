"""Headers of DICOM files, which are read without their pixels."""

from __future__ import annotations

import os
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .files import Progress, in_runs, printable, silent, why
from .scan import ScanError

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")  # files of other names are DICOM only if their content is
FILES_PER_JOB = 200
HEAD_BYTES = 2**15  # one read of this size holds most headers

# All that is ever taken from a DICOM header. No name or birth date is among them; the accession number is for joining
# reports, and goes no further.
DICOM_TAGS = (
    "AccessionNumber",
    "SOPInstanceUID",
    "Modality",
    "SeriesDescription",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "InstanceNumber",
    "Rows",
)
DEFLATED = b"1.2.840.10008.1.2.1.99"
MAX_DEFLATED = 2**28  # bytes
DICOMDIR_CLASS = "1.2.840.10008.1.3.10"


class Header(NamedTuple):
    """A DICOM file in a few words.

    instance: SOPInstanceUID, empty if it has none.
    number, position: SeriesNumber and InstanceNumber, 0 if there is none.
    is_image: it has rows of pixels; a report or a contour has not.
    offset: byte at which the pixels begin, 0 if that cannot be told.
    """

    path: str
    study: str
    accession: str
    series: str
    instance: str
    number: int
    position: int
    modality: str
    description: str
    is_image: bool
    offset: int


def read_headers(
    paths: Sequence[str], workers: int = 1, progress: Progress = silent
) -> Iterator[Header | ScanError | None]:
    """The header of every DICOM file; None for a file that is no DICOM image and does not claim to be."""
    return in_runs(_read_header, paths, FILES_PER_JOB, workers, progress, desc="reading headers", unit="file")


def _read_header(path: str) -> Header | ScanError | None:
    try:
        with warnings.catch_warnings(), Path(path).open("rb", HEAD_BYTES) as file:
            warnings.simplefilter("ignore")  # pydicom comments on every odd value; what matters is checked here
            start = file.read(132)
            if not _begins_like_dicom(start):
                named = path.lower().endswith(DICOM_SUFFIXES)
                return ScanError(path, "not a DICOM file, in spite of its name") if named else None
            _check_inflated(file)
            dataset, offset = parse(file, force=True, specific_tags=list(DICOM_TAGS))
            if dataset.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR_CLASS:
                return None
            study, series = (_word(_raw(dataset, f"{level}InstanceUID")) for level in ("Study", "Series"))
            if not study or not series:
                if start[128:] != b"DICM":
                    return None  # began like one by chance
                return ScanError(path, f"no {'Series' if study else 'Study'}InstanceUID", "no_uid")
            return Header(
                path,
                study,
                _word(_raw(dataset, "AccessionNumber")),
                series,
                _word(_raw(dataset, "SOPInstanceUID")),
                _number(_raw(dataset, "SeriesNumber")),
                _number(_raw(dataset, "InstanceNumber")),
                _word(_raw(dataset, "Modality")),
                _word("\\".join(several(dataset.get("SeriesDescription")))),  # several, if it has a backslash in it
                any(_raw(dataset, "Rows")),
                offset,
            )
    except ImportError:
        raise
    except Exception as error:  # damaged headers make pydicom raise nearly every type there is
        return ScanError(path, f"not a readable DICOM header ({why(error)})")


def _begins_like_dicom(start: bytes) -> bool:
    """By the mark after the preamble; without one, by a first element of group 2 or 8 of plausible length."""
    if start[128:] == b"DICM":
        return True
    if len(start) < 8 or start[:2] not in (b"\2\0", b"\x08\0", b"\0\x08"):
        return False
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    return explicit or struct.unpack("<I", start[4:8])[0] < 1024


def parse(file: Any, **options: Any) -> tuple[Any, int]:
    """The header of a DICOM file, and the byte at which its pixels begin, or 0 if that cannot be told.

    options: of `pydicom.dcmread`.
    """
    try:
        from pydicom import dcmread
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise ImportError("reading DICOM needs pydicom: pip install 'hlip-kernels[io]'") from error

    file.seek(0)
    try:
        dataset = dcmread(file, stop_before_pixels=True, **options)
    except InvalidDicomError as error:
        raise ScanError(file.name, f"not a DICOM file ({error})") from error
    return dataset, file.tell() if file.tell() < os.fstat(file.fileno()).st_size else 0


def _check_inflated(file: Any) -> None:
    """pydicom unpacks a deflated file as a whole, so one that would fill the memory must not get that far."""
    file.seek(0)
    head = file.read(2048)
    if DEFLATED not in head:
        return
    if head[128:136] != b"DICM\2\0\0\0":
        raise ValueError("deflated, without the length of its file meta information")
    file.seek(144 + struct.unpack("<I", head[140:144])[0])
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    stream.decompress(file.read(), MAX_DEFLATED)
    if stream.unconsumed_tail:
        raise ValueError(f"more than {MAX_DEFLATED} bytes when inflated")


def _raw(dataset: Any, tag: str) -> bytes:
    """The value of an element as stored, which for all but free texts is ASCII or a number."""
    element = dataset.get_item(tag)
    return element.value if element is not None and isinstance(element.value, bytes) else b""


def _word(value: str | bytes) -> str:
    text = value if isinstance(value, str) else value.decode("ascii", "backslashreplace")
    return sys.intern(printable(" ".join(text.split("\0")[0].split())))


def _number(value: bytes) -> int:
    try:
        return int(float(value.strip(b" \0") or 0))
    except (ValueError, OverflowError):
        return 0


def several(value: Any) -> list[str]:
    """The values of an element, of which there may be none, one or several."""
    return [value] if isinstance(value, str) else [str(item) for item in value or ()]
