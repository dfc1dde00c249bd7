"""Where scans lie before they are prepared: studies found in folders, lists and tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ScanSource:
    """A scan as it lies on disk.

    name: what to call it; unlike the others of its study, whose scans are ordered by it.
    kind: a NIfTI image; the DICOM files of one series; or a tensor of the released tools (`.pt`).
    files: one, or all of a DICOM series.
    modality: DICOM's code, such as MR or CT; empty if the files do not say.
    description: the series', in words; empty if the files do not say.
    """

    name: str
    kind: Literal["nifti", "dicom", "tensor"]
    files: tuple[Path, ...]
    modality: str = ""
    description: str = ""


@dataclass(frozen=True)
class StudySource:
    """A study as it lies on disk: its scans in their fixed order, what was written about it, and its labels."""

    uid: str
    scans: tuple[ScanSource, ...]
    impression: str = ""
    findings: str = ""
    labels: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Rejection:
    """What is left out, and why.

    scan: empty if it is the whole study.
    rule: a short name for all rejections of the kind, by which they are counted.
    """

    study: str
    scan: str
    rule: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What `find_studies` found: the studies, and what it left out."""

    studies: list[StudySource]
    rejected: list[Rejection]
