"""From a volume as read to the uint8 scan that a model sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .readers import ScanError, Volume


@dataclass(frozen=True)
class PreparedScan:
    """One image that a model may see.

    name: suffix of the source's name: empty, or which of several images of it ("brain", "t3").
    image: (D, H, W) uint8 - through-plane axis first.
    spacing: mm per voxel along D, H, W.
    plane: "axial", "coronal" or "sagittal".
    """

    name: str
    image: Tensor
    spacing: tuple[float, float, float]
    plane: str


# In-plane axes (rows, columns) that go with each through-plane axis; 0, 1, 2 are right, posterior, inferior.
_PLANES = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}


@dataclass(frozen=True)
class BrainMRI:
    """Preprocessing of brain MRI: percentile window, through-plane axis first, square, resized, cropped.

    size: (D, H, W) voxels after the resize.
    crop: (H, W) voxels kept in the middle of each slice.
    percentiles: intensities mapped to 0 and 255.

    Source: HLIP (arXiv 2505.21862), Appendix B.
    """

    size: tuple[int, int, int] = (48, 256, 256)
    crop: tuple[int, int] = (224, 224)
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __post_init__(self) -> None:
        if min(self.size) < 1 or self.crop[0] > self.size[1] or self.crop[1] > self.size[2] or min(self.crop) < 1:
            raise ValueError(f"crop {self.crop} must fit into the slices of size {self.size}")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles must increase within 0 to 100, got {self.percentiles}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W) of the result."""
        return (self.size[0], *self.crop)

    def __call__(self, volume: Volume) -> Tensor:
        """Returns a (D, H, W) uint8 scan.

        Axial slices lie with rows to posterior and columns to the right, coronal ones inferior and right,
        sagittal ones inferior and posterior.

        Raises:
            ScanError: the two percentiles have the same intensity.
        """
        array = through_plane_first(volume)
        low, high = np.percentile(array, self.percentiles)
        if not high > low:
            raise ScanError(volume.path, f"no contrast: percentiles {self.percentiles} are both {low}")
        scan = torch.from_numpy(np.ascontiguousarray(array)).clamp(low, high).sub_(low).div_(high - low)
        height, width = scan.shape[1:]
        top, left = (max(height, width) - height) // 2, (max(height, width) - width) // 2
        scan = F.pad(scan, (left, max(height, width) - width - left, top, max(height, width) - height - top))
        scan = F.interpolate(scan[None, None], self.size, mode="trilinear", align_corners=False)[0, 0]
        top, left = (self.size[1] - self.crop[0]) // 2, (self.size[2] - self.crop[1]) // 2
        scan = scan[:, top : top + self.crop[0], left : left + self.crop[1]]
        return scan.mul(255).round_().to(torch.uint8).contiguous()


def through_plane_first(volume: Volume) -> np.ndarray:
    """The volume as (D, H, W): the axis of largest spacing first, oriented to right, posterior, inferior.

    Axes of equal spacing count as axial.
    """
    from nibabel import orientations
    from nibabel.affines import voxel_sizes

    ornt = orientations.io_orientation(volume.affine)
    wanted = orientations.axcodes2ornt(("R", "P", "I"))
    array = orientations.apply_orientation(volume.array, orientations.ornt_transform(ornt, wanted))
    spacing = voxel_sizes(volume.affine)[np.argsort(ornt[:, 0])]
    through = max((2, 1, 0), key=lambda axis: round(float(spacing[axis]), 3))
    return array.transpose(_PLANES[through])
