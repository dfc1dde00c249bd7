"""Scans as they lie on disk: files of a study put together, and named."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from ..read.files import Header, Part, Problem, kind_of, printable, stem
from ..read.scan import Rejection, ScanSource

NAME_LENGTH = 120  # characters
KNOWN_BROKEN = frozenset(["train_1267_a_4", "train_11755_a_3", "train_11755_a_4"])  # volumes of CT-RATE


@dataclass(frozen=True)
class Scan:
    """A scan while its study is put together.

    key: orders scans of one name.
    parts: what holds its image, to compare it with others.
    """

    source: ScanSource
    key: str
    parts: tuple[Part, ...]


def make_scans(
    names: Mapping[str, str], headers: Mapping[str, Header | Problem | None], uid: str, rejected: list[Rejection]
) -> list[Scan]:
    """The scans in a study's files, given with their names; DICOM files make up series."""
    scans = []
    series: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for path, name in names.items():
        kind, header = kind_of(path), headers.get(path)
        if isinstance(header, Header):
            series[header.study, header.series].append(header)
        elif kind is not None and stem(Path(path).name) in KNOWN_BROKEN:
            rejected.append(Rejection(uid, name, "known_broken", "published as a broken volume of CT-RATE"))
        elif kind is not None:
            scans.append(Scan(ScanSource(name, kind, (Path(path),)), path, ((path, 0),)))
    for key in sorted(series):
        scan = _series(series[key], uid, rejected)
        if scan is not None:
            scans.append(scan)
    return scans


def _series(headers: Sequence[Header], uid: str, rejected: list[Rejection]) -> Scan | None:
    headers = sorted(headers, key=attrgetter("position", "instance", "path"))
    first = headers[0]
    name = f"{first.number:04d}" + (f"-{clean(first.description)}" if first.description else "")
    images: dict[tuple[str, int], Header] = {}
    copies = []
    for header in headers:
        # Some de-identified archives give every slice one instance UID: only the position tells those apart.
        key = (header.instance or header.path, header.position)
        if header.is_image and images.setdefault(key, header) is not header:
            copies.append(header)
    if not images:
        reason = f"{len(headers)} files of modality {first.modality or '?'} without rows of pixels"
        rejected.append(Rejection(uid, name, "no_image", reason))
        return None
    if copies:
        reason = f"{len(copies)} files repeat an instance of the series"
        rejected.append(Rejection(uid, name, "copy", reason))
    files = tuple(Path(header.path) for header in images.values())
    parts = tuple((header.path, header.offset) for header in images.values())
    return Scan(ScanSource(name, "dicom", files, first.modality, first.description), first.series, parts)


def accession_of(headers: Iterable[Header | Problem | None]) -> str:
    return min((header.accession for header in headers if isinstance(header, Header) and header.accession), default="")


def named(scans: Iterable[Scan]) -> list[Scan]:
    """The scans in the order of their names, made unique and short enough."""
    taken: set[str] = set()
    repeats: Counter[str] = Counter()
    result = []
    for scan in sorted(scans, key=lambda scan: (scan.source.name, scan.key)):
        base = name = scan.source.name[:NAME_LENGTH] or "scan"
        while name in taken:
            repeats[base] += 1
            name = f"{base[: NAME_LENGTH - 8]}~{repeats[base] + 1}"
        taken.add(name)
        result.append(replace(scan, source=replace(scan.source, name=name)))
    return sorted(result, key=lambda scan: scan.source.name)


def clean(name: str) -> str:
    return re.sub(r"""[\s/\\<>:"|?*]+""", "_", printable(name.strip()))
