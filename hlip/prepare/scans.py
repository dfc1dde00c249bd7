"""Scans as they lie on disk: files of a study put together, and named."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from ..read.files import kind_of, printable, stem
from ..read.headers import Header
from ..read.scan import Rejection, ScanError, ScanSource

NAME_LENGTH = 120  # characters
KNOWN_BROKEN = frozenset(["train_1267_a_4", "train_11755_a_3", "train_11755_a_4"])  # volumes of CT-RATE


def make_scans(
    names: Mapping[str, str], headers: Mapping[str, Header | ScanError | None], uid: str, rejected: list[Rejection]
) -> list[ScanSource]:
    """The scans in a study's files, given with their names, which may be the same; DICOM files make up series."""
    scans = []
    series: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for path, name in sorted(names.items()):
        kind, header = kind_of(path), headers.get(path)
        if isinstance(header, Header):
            series[header.series, header.study].append(header)
        elif kind is not None and stem(Path(path).name) in KNOWN_BROKEN:
            rejected.append(Rejection(uid, name, "known_broken", "published as a broken volume of CT-RATE"))
        elif kind is not None:
            scans.append(ScanSource(name, kind, (Path(path),)))
    for key in sorted(series):
        scans += _series(series[key], uid, rejected)
    return scans


def _series(headers: Sequence[Header], uid: str, rejected: list[Rejection]) -> list[ScanSource]:
    """The scan of a series, unless none of its files is an image."""
    headers = sorted(headers, key=attrgetter("position", "instance", "path"))
    first = headers[0]
    name = f"{first.number:04d}" + (f"-{clean(first.description)}" if first.description else "")
    shown = [header for header in headers if header.is_image]
    images: dict[tuple[str, int], Header] = {}
    for header in shown:
        # Some de-identified archives give every slice one instance UID: only the position tells those apart.
        images.setdefault((header.instance or header.path, header.position), header)
    if not images:
        rejected.append(
            Rejection(
                uid,
                name,
                "no_image",
                f"{len(headers)} files of modality {first.modality or '?'} without rows of pixels",
            )
        )
        return []
    if copies := len(shown) - len(images):
        rejected.append(Rejection(uid, name, "copy", f"{copies} files repeat an instance of the series"))
    files = tuple(Path(header.path) for header in images.values())
    offsets = tuple(header.offset for header in images.values())
    return [ScanSource(name, "dicom", files, first.modality, first.description, offsets)]


def named(scans: Iterable[ScanSource]) -> tuple[ScanSource, ...]:
    """The scans in the order of their names, made unique and short enough."""
    taken: set[str] = set()
    repeats: Counter[str] = Counter()
    result = []
    for scan in sorted(scans, key=attrgetter("name")):
        base = name = scan.name[:NAME_LENGTH] or "scan"
        while name in taken:
            repeats[base] += 1
            name = f"{base[: NAME_LENGTH - 8]}~{repeats[base] + 1}"
        taken.add(name)
        result.append(replace(scan, name=name))
    return tuple(sorted(result, key=attrgetter("name")))


def clean(name: str) -> str:
    return re.sub(r"""[\s/\\<>:"|?*]+""", "_", printable(name.strip()))
