"""Volumes with a known orientation, and recipes that leave them alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hlip.read.scan import Volume

nibabel = pytest.importorskip("nibabel")
# Anatomical axes: 0 right, 1 posterior, 2 inferior, as directions in mm (x right, y anterior, z superior).
DIRECTIONS = np.array([[1.0, 0, 0], [0, -1.0, 0], [0, 0, -1.0]])
# What (depth, row, column) of a scan run along.
PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
SPACINGS = {"axial": (1.0, 1.0, 3.0), "coronal": (0.9, 4.0, 1.1), "sagittal": (1.2, 1.0, 1.0), "isotropic": (1.0,) * 3}


def anatomy() -> np.ndarray:
    """Indexed by steps to the right, posterior, inferior; every voxel different."""
    return np.random.default_rng(0).permutation(4 * 5 * 6).reshape(4, 5, 6).astype(np.float32)


def store(order: tuple[int, ...], reverse: tuple[bool, ...], spacing: tuple[float, ...], turn: float = 0.0) -> Volume:
    """`anatomy` as a file might hold it: storage axis k runs along anatomical axis order[k], or against it."""
    world = anatomy()
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    stored = np.empty([world.shape[axis] for axis in order], dtype=np.float32)
    for index in np.ndindex(*stored.shape):
        place = [0, 0, 0]
        for k, axis in enumerate(order):
            place[axis] = stored.shape[k] - 1 - index[k] if reverse[k] else index[k]
        stored[index] = world[tuple(place)]
    affine = np.eye(4)
    affine[:3, 3] = [-20, 30, 40]
    for k, axis in enumerate(order):
        step = rotation @ DIRECTIONS[axis] * spacing[axis]
        affine[:3, k] = -step if reverse[k] else step
        if reverse[k]:
            affine[:3, 3] += step * (world.shape[axis] - 1)
    return Volume(stored, affine, Path("scan.nii"))


def axial(array: np.ndarray, path: str = "scan.nii") -> Volume:
    """A volume whose (D, H, W) is `array`."""
    stored = np.ascontiguousarray(array.transpose(2, 1, 0), dtype=np.float32)
    return Volume(stored, np.diag([1.0, -1.0, -4.0, 1.0]), Path(path))
