"""The published recipes a second time, in a straight line: SimpleITK reads and orients, PyTorch resizes whole volumes.

Slow and greedy on purpose, and shares nothing with the library. Every function takes the files of one scan: a NIfTI
file, or the slices of a DICOM series.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch.nn import functional as F


def read(files: Sequence[Path]) -> sitk.Image:
    if len(files) == 1:
        return sitk.ReadImage(str(files[0]))
    origins = {}
    for file in files:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(file))
        reader.ReadImageInformation()
        origins[str(file)] = np.array(reader.GetOrigin())
    normal = np.array(reader.GetDirection()).reshape(3, 3)[:, 2]
    names = sorted(origins, key=lambda name: float(normal @ origins[name]))
    series = sitk.ImageSeriesReader()
    series.SetImageIO("GDCMImageIO")
    series.SetFileNames(names)
    image = series.Execute()
    steps = [float(np.linalg.norm(origins[b] - origins[a])) for a, b in pairwise(names)]
    usual = float(np.median(steps))
    if max(steps) > 1.5 * usual:
        image = fill_gaps(image, [round(step / usual) for step in steps])
    image.SetSpacing((*image.GetSpacing()[:2], usual))
    return image


def fill_gaps(image: sitk.Image, steps: list[int]) -> sitk.Image:
    array = sitk.GetArrayFromImage(image).astype(np.float64)
    stack = [array[0]]
    for before, here, count in zip(array[:-1], array[1:], steps, strict=True):
        stack.extend(before + (here - before) * i / count for i in range(1, count + 1))
    result = sitk.GetImageFromArray(np.stack(stack))
    result.SetDirection(image.GetDirection())
    result.SetOrigin(image.GetOrigin())
    result.SetSpacing(image.GetSpacing())
    return result


def orient(image: sitk.Image, axial: bool = False) -> tuple[np.ndarray, list[float]]:
    """Through-plane (or inferior) axis first, in-plane RP, RI or PI. Returns float32 (D, H, W) and their mm."""
    image = sitk.DICOMOrient(image, "RPI")  # x to the right, y to posterior, z to inferior
    array = sitk.GetArrayFromImage(image).astype(np.float32)  # inferior, posterior, right
    right, posterior, inferior = image.GetSpacing()
    thickest = max(round(right, 3), round(posterior, 3), round(inferior, 3))
    if axial or round(inferior, 3) == thickest:
        return array, [inferior, posterior, right]
    if round(posterior, 3) == thickest:
        return array.transpose(1, 0, 2), [posterior, inferior, right]
    return array.transpose(2, 0, 1), [right, inferior, posterior]


def resize(scan: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(scan[None, None], tuple(size), mode="trilinear", align_corners=False)[0, 0]


def to_uint8(scan: torch.Tensor) -> np.ndarray:
    return (scan * 255).round().to(torch.uint8).numpy()


def window(array: np.ndarray, low: float, high: float) -> torch.Tensor:
    return torch.from_numpy((np.clip(array, low, high) - low) / (high - low)).to(torch.float32)


def square_48x224x224(scan: torch.Tensor) -> np.ndarray:
    _, height, width = scan.shape
    side = max(height, width)
    padded = torch.zeros(len(scan), side, side)
    top, left = (side - height) // 2, (side - width) // 2
    padded[:, top : top + height, left : left + width] = scan
    return to_uint8(resize(padded, (48, 256, 256))[:, 16:240, 16:240])


def brain_mri(files: Sequence[Path]) -> np.ndarray:
    array, _ = orient(read(files))
    return square_48x224x224(window(array, *np.percentile(array, [0.5, 99.5])))


def head_ct(files: Sequence[Path]) -> list[np.ndarray]:
    array, _ = orient(read(files))
    return [square_48x224x224(window(array, low, high)) for low, high in ((0, 120), (-20, 180), (-800, 2000))]


def chest_ct(files: Sequence[Path]) -> np.ndarray:
    array, spacing = orient(read(files), axial=True)
    counts = [round(n * mm / to) for n, mm, to in zip(array.shape, spacing, (3, 1, 1), strict=True)]
    scan = resize(window(array, -1150, 350), counts)
    for axis, size in enumerate((112, 336, 336)):
        count = scan.shape[axis]
        if count > size:
            scan = scan.narrow(axis, (count - size) // 2, size)
        else:
            before = (size - count) // 2
            pad = [0, 0, 0, 0, 0, 0]
            pad[2 * (2 - axis) : 2 * (2 - axis) + 2] = [before, size - count - before]
            scan = F.pad(scan, pad)
    return to_uint8(scan)


def native_mri(files: Sequence[Path], patch: Sequence[int]) -> np.ndarray:
    array, _ = orient(read(files))
    scan = window(array, *np.percentile(array, [0.5, 99.5]))
    return to_uint8(resize(scan, [max(1, round(n / p)) * p for n, p in zip(array.shape, patch, strict=True)]))
