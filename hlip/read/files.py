"""What lies in a folder: its files, the headers of DICOM files, and which files hold the same scan.

Nothing here decodes an image. A file that cannot be used is a `Problem`, never an exception, for the rest goes on.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import multiprocessing
import os
import re
import signal
import stat
import struct
import sys
import unicodedata
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from .safe import hint

NIFTI_SUFFIXES = (".nii", ".nii.gz")
TENSOR_SUFFIX = ".pt"
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")  # files of other names are DICOM only if their content is
FILES_PER_JOB = 200
HEAD_BYTES = 2**15  # one read of this size holds most headers
SAMPLE = 4096  # bytes
MAX_INFLATED = 2**32  # bytes of a compressed file that are looked at

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

Kind = Literal["nifti", "dicom", "tensor"]
Progress = Callable[..., Iterable]  # called as tqdm is: (iterable, total=, desc=, unit=)
Part = tuple[str, int]  # a file, and the byte at which its image begins
Item = TypeVar("Item")
Result = TypeVar("Result")


class Problem(NamedTuple):
    """A file or folder that is left out; `rule` as in `Rejection`."""

    path: str
    rule: str
    reason: str


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


def silent(items: Iterable[Item], **_: Any) -> Iterable[Item]:
    """A `Progress` that shows nothing."""
    return items


def kind_of(path: Path | str) -> Kind | None:
    """By the name; None if the content must say."""
    name = str(path).lower()
    if name.endswith(NIFTI_SUFFIXES):
        return "nifti"
    return "tensor" if name.endswith(TENSOR_SUFFIX) else None


def stem(name: str) -> str:
    """A file's name without the suffix of an image."""
    return re.sub(r"(?i)\.(nii(\.gz)?|pt)$", "", name)


def printable(text: str) -> str:
    """The text in one Unicode form, with escapes for what cannot be printed or encoded."""
    if text.isascii() and text.isprintable():
        return text
    text = unicodedata.normalize("NFC", text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def why(error: Exception) -> str:
    """An error in words, without the path that `OSError` adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def near(path: Path) -> str:
    """Names beside a missing path that are close to its own, as words to add to an error."""
    try:
        names = [each.name for each in path.parent.iterdir() if not each.name.startswith(".")]
    except OSError:
        return ""
    return hint(path.name, names, ())


def is_file(path: Path) -> bool:
    """Whether it is a regular file; False, too, if its name is too long or lies where one may not look."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def walk(root: Path) -> tuple[list[str], list[Problem]]:
    """All files below a folder in sorted order, and what could not be entered.

    Hidden files and folders are passed by. A link to a file within the folder counts as that file, unless the file
    itself is found; any other link is a problem, so that links can neither loop nor lead out.
    """
    home = root.resolve()
    files, problems, folders = [], [], [str(root)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink():
                        reason = _link(Path(entry.path), home)
                        if reason:
                            problems.append(Problem(entry.path, "link", reason))
                        elif reason is None:
                            files.append(entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        files.append(entry.path)
                    else:
                        problems.append(Problem(entry.path, "unreadable", "not a regular file"))
        except OSError as error:
            problems.append(Problem(folder, "unreadable", f"the folder cannot be read ({why(error)})"))
    return sorted(files), sorted(problems)


def _link(path: Path, home: Path) -> str | None:
    """None if the link stands for a file, the reason if it is refused, "" if its file is found anyway."""
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: the link leads to itself
        return "the link leads nowhere"
    if not target.is_relative_to(home):
        return "the link leads out of the folder"
    if not stat.S_ISREG(mode):
        return "the link leads to a folder or device"
    hidden = any(part.startswith(".") for part in target.relative_to(home).parts)
    return None if hidden else ""


def each(
    function: Callable[[Sequence[Item]], list[Result]],
    items: Sequence[Item],
    per_job: int,
    workers: int,
    progress: Progress,
    **words: str,
) -> Iterator[Result]:
    """`function` of runs of items, in so many processes: one result per item, in the items' order."""
    jobs = [items[i : i + per_job] for i in range(0, len(items), per_job)]
    workers = min(workers, len(jobs))
    if not jobs:
        return
    if workers <= 1:
        yield from progress(chain.from_iterable(map(function, jobs)), total=len(items), **words)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield from progress(chain.from_iterable(pool.map(function, jobs)), total=len(items), **words)
    finally:
        pool.shutdown(cancel_futures=True)


def read_headers(
    paths: Sequence[str], workers: int = 1, progress: Progress = silent
) -> Iterator[Header | Problem | None]:
    """The header of every DICOM file; None for a file that is no DICOM image and does not claim to be."""
    return each(_read_headers, paths, FILES_PER_JOB, workers, progress, desc="reading headers", unit="file")


def _read_headers(paths: Sequence[str]) -> list[Header | Problem | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom comments on every odd value; what matters is checked here
        return [_read_header(path) for path in paths]


def _read_header(path: str) -> Header | Problem | None:
    try:
        with Path(path).open("rb") as file:
            start = file.read(132)
            if not _begins_like_dicom(start):
                named = path.lower().endswith(DICOM_SUFFIXES)
                return Problem(path, "unreadable", "not a DICOM file, in spite of its name") if named else None
            dataset, offset = _parse(file)
        if dataset.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR_CLASS:
            return None
        study, series = (_word(_raw(dataset, f"{level}InstanceUID")) for level in ("Study", "Series"))
        if not study or not series:
            if start[128:] != b"DICM":
                return None  # began like one by chance
            return Problem(path, "no_uid", f"no {'Series' if study else 'Study'}InstanceUID")
        description = dataset.get("SeriesDescription")  # several values, if it has a backslash in it
        return Header(
            path,
            study,
            _word(_raw(dataset, "AccessionNumber")),
            series,
            _word(_raw(dataset, "SOPInstanceUID")),
            _number(_raw(dataset, "SeriesNumber")),
            _number(_raw(dataset, "InstanceNumber")),
            _word(_raw(dataset, "Modality")),
            _word(description if isinstance(description, str) else "\\".join(description or ())),
            any(_raw(dataset, "Rows")),
            offset,
        )
    except ImportError:
        raise
    except Exception as error:  # damaged headers make pydicom raise nearly every type there is
        return Problem(path, "unreadable", f"not a readable DICOM header ({why(error)})")


def _begins_like_dicom(start: bytes) -> bool:
    """By the mark after the preamble; without one, by a first element of group 2 or 8 of plausible length."""
    if start[128:] == b"DICM":
        return True
    if len(start) < 8 or start[:2] not in (b"\2\0", b"\x08\0", b"\0\x08"):
        return False
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    return explicit or struct.unpack("<I", start[4:8])[0] < 1024


def _parse(file: Any) -> tuple[Any, int]:
    """The needed elements of a DICOM file, and the byte at which its pixels begin."""
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ImportError("reading DICOM needs pydicom: pip install 'hlip-kernels[io]'") from error

    read = functools.partial(dcmread, force=True, stop_before_pixels=True, specific_tags=list(DICOM_TAGS))
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if DEFLATED in head[:2048]:
        _check_inflated(file, head)
    else:
        with contextlib.suppress(Exception):  # a header longer than that is cut, and read from the file
            start = io.BytesIO(head)
            dataset = read(start)
            if start.tell() < len(head):
                return dataset, start.tell()
    file.seek(0)
    dataset = read(file)
    return dataset, file.tell() if file.tell() < size else 0


def _check_inflated(file: Any, head: bytes) -> None:
    """pydicom unpacks a deflated file as a whole, so one that would fill the memory must not get that far."""
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


def find_repeated(
    studies: Sequence[Sequence[Sequence[Part]]], workers: int = 1, progress: Progress = silent
) -> Iterator[dict[int, int]]:
    """Which scans of a study hold the same bytes as an earlier one.

    Compared are sizes, then samples of those of equal size, then all bytes of those of equal samples. Of DICOM files
    only the pixels count, of compressed ones the content.

    Args:
        studies: the scans of each, as the parts that make up a scan, in order.

    Returns:
        For each study, the index of each repeated scan with that of the first of its kind.
    """
    return each(_find_repeated, studies, 20, workers, progress, desc="comparing scans", unit="study")


def _find_repeated(studies: Sequence[Sequence[Sequence[Part]]]) -> list[dict[int, int]]:
    return [_repeated(scans) for scans in studies]


def _repeated(scans: Sequence[Sequence[Part]]) -> dict[int, int]:
    groups = [list(range(len(scans)))]
    for look in (_sizes, _samples, _digests):
        split: dict[Hashable, list[int]] = defaultdict(list)
        for g, group in enumerate(groups):
            if look is _samples and len({_is_packed(path) for i in group for path, _ in scans[i]}) > 1:
                split[g, None] = group  # of a compressed file and another, samples say nothing
                continue
            for i in group if len(group) > 1 else ():
                try:
                    split[g, look(scans[i])].append(i)
                except (OSError, EOFError, zlib.error):
                    continue  # is like no other; whoever reads it will say what is wrong
        groups = list(split.values())
    return {i: group[0] for group in groups for i in group[1:]}


def _is_packed(path: str) -> bool:
    return path.lower().endswith(".gz")


def _sizes(scan: Sequence[Part]) -> Hashable:
    return tuple(_size(Path(path)) - offset for path, offset in scan)


def _size(path: Path) -> int:
    """Bytes of the content, modulo 2**32, which is all that a compressed file says."""
    size = path.stat().st_size
    if size == 0:
        raise EOFError(f"{path}: empty file")
    if not _is_packed(str(path)):
        return size % 2**32
    return struct.unpack("<I", _read(path, max(0, size - 4), 4).rjust(4, b"\0"))[0]


def _samples(scan: Sequence[Part]) -> Hashable:
    """The middle of a few parts; of a compressed one, the checksum at its end."""
    samples = []
    for path, offset in {scan[i] for i in (0, len(scan) // 2, -1)}:
        size = Path(path).stat().st_size
        samples.append(_read(Path(path), max(0, size - 8) if _is_packed(path) else (offset + size) // 2, SAMPLE))
    return tuple(sorted(samples))


def _read(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _digests(scan: Sequence[Part]) -> Hashable:
    digest = hashlib.sha256()
    for path, offset in scan:
        with gzip.open(path) if _is_packed(path) else Path(path).open("rb") as file:
            file.seek(offset)
            left = MAX_INFLATED
            while left > 0 and (block := file.read(min(left, 2**20))):
                digest.update(block)
                left -= len(block)
    return digest.digest()
