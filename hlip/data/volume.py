"""What reading gives: a volume, or an error that names the file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


class ScanError(ValueError):
    """A scan that cannot be used. The message names the file and the reason.

    rule: a short name for all errors of the kind, by which they are counted.
    """

    def __init__(self, path: Path | str, reason: str, rule: str = "unreadable") -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason
        self.rule = rule

    def __reduce__(self) -> tuple[type[ScanError], tuple[str, str, str]]:
        return ScanError, (self.path, self.reason, self.rule)


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
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path
    modality: str = ""
    description: str = ""
    part: str = ""
    prepared: bool = False

    def without_voxels(self) -> Volume:
        """Its grid alone: an array of the same shape that takes no memory, of zeros."""
        return replace(self, array=np.broadcast_to(np.zeros((), self.array.dtype), self.array.shape))
