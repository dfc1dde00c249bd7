"""A scan: its files, the volume that reading makes of them, and the errors and records of scans that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class ScanSource:
    """A scan as it lies on disk.

    name: what to call it; unlike the others of its study, whose scans are ordered by it.
    kind: a NIfTI image; the DICOM files of one series; or a tensor of the released tools (`.pt`).
    files: one, or all of a DICOM series.
    modality: DICOM's code, such as MR or CT; empty if the files do not say.
    description: the series', in words; empty if the files do not say.
    offsets: the byte at which each file's image begins, while scans are compared; else empty.
    """

    name: str
    kind: Literal["nifti", "dicom", "tensor"]
    files: tuple[Path, ...]
    modality: str = ""
    description: str = ""
    offsets: tuple[int, ...] = ()

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Its files, each with the byte at which the image begins."""
        return [(str(file), offset) for file, offset in zip_longest(self.files, self.offsets, fillvalue=0)]


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


class ScanError(ValueError):
    """A scan that cannot be used. The message names the file and the reason.

    rule: a short name for all errors of the kind, by which they are counted.
    """

    def __init__(self, path: Path | str, reason: str, rule: str = "unreadable") -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason
        self.rule = rule

    def of(self, study: str, scan: str) -> Rejection:
        """The rejection of a scan for this error."""
        return Rejection(study, scan, self.rule, self.reason)

    def __reduce__(self) -> tuple[type[ScanError], tuple[str, str, str]]:
        return ScanError, (self.path, self.reason, self.rule)


@contextmanager
def damage(path: Path | str, what: str) -> Iterator[None]:
    """Whatever is raised becomes a ScanError: a damaged file may fail anywhere within a parser or decoder, and values
    are parsed when they are asked for."""
    try:
        yield
    except (ScanError, ImportError):
        raise
    except Exception as error:
        raise ScanError(path, f"{what} ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Volume:
    """One 3D image as read.

    array: (X, Y, Z) - intensities, in the stored integer type if it can hold them, else int16, int32 or float32;
        not-a-number and infinite voxels hold the smallest finite value.
    affine: (4, 4) float64 - voxel to millimetres, x to the right, y anterior, z superior.
    modality: DICOM's code, such as MR or CT; empty if not known.
    description: the series', in words; empty if not known.
    part: which volume of a 4D image this is, such as "t3"; empty if it is the only one.
    prepared: the grid is that of a prepared scan (X, Y, Z are its W, H, D), and so are intensities of type uint8.
    rows_down: a NIfTI file of it would have Y the other way round: DICOM's rows are counted from the top.
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path
    modality: str = ""
    description: str = ""
    part: str = ""
    prepared: bool = False
    rows_down: bool = False

    def without_voxels(self) -> Volume:
        """Its grid alone: an array of the same shape that takes no memory, of zeros."""
        return replace(self, array=np.broadcast_to(np.zeros((), self.array.dtype), self.array.shape))
