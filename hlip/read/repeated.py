"""Which files hold the same scan."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

from .files import Progress, in_runs, silent

SAMPLE = 4096  # bytes
MAX_INFLATED = 2**32  # bytes of a compressed file that are looked at
Part = tuple[str, int]  # a file, and the byte at which its image begins


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
    return in_runs(_repeated, studies, 20, workers, progress, desc="comparing scans", unit="study")


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
