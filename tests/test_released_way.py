"""Preprocessing as the published models saw it, against a second implementation: whole volumes, NumPy and PyTorch.

Nothing below but the recipes themselves is of the library. Volumes are as files hold them: (X, Y, Z) and an affine.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dicom_files import write_series
from hlip.prepare.discover import find_study
from hlip.prepare.grid import Axis, through_plane_first
from hlip.prepare.recipe import RECIPES, Recipe, Window
from hlip.read.readers import read_scan
from hlip.read.rules import Rules
from hlip.read.scan import Volume

ANY = Rules(modalities=(), min_slices=1)
ORDERS = list(itertools.permutations(range(3)))


def reoriented(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(z, y, x) towards inferior, posterior and right, and its spacing."""
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    order = [int(np.abs(affine[world, :3] / spacing).argmax()) for world in range(3)]
    turned = array.transpose(order)
    for world, wanted in enumerate((1, -1, -1)):
        if affine[world, order[world]] * wanted < 0:
            turned = np.flip(turned, world)
    return turned.transpose(2, 1, 0), spacing[order][::-1]


def loaded(grey: np.ndarray) -> torch.Tensor:
    """What the loader makes of (D, H, W) grey levels: (48, 224, 224), 0 to 1."""
    scan = torch.from_numpy(np.ascontiguousarray(grey)).float() / 255
    _, height, width = scan.shape
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    scan = F.pad(scan, (left, side - width - left, top, side - height - top))
    scan = F.interpolate(scan[None], (256, 256), mode="bilinear", align_corners=False)
    scan = F.interpolate(scan[None], (48, 256, 256), mode="nearest-exact")[0, 0]
    return scan[:, 16:240, 16:240]


def cut_to_whole_levels(array: np.ndarray, low: float, high: float) -> np.ndarray:
    clipped = np.clip(array, low, high)
    return ((clipped - low) / (high - low + 1e-8) * 255).astype(np.uint8)


def thick_first(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    turned, spacing = reoriented(array, affine)
    return np.moveaxis(turned, int(np.argmax(spacing)), 0)


def brain_mri(array: np.ndarray, affine: np.ndarray) -> torch.Tensor:
    low, high = np.percentile(array, 0.5), np.percentile(array, 99.5)
    return loaded(cut_to_whole_levels(thick_first(array, affine), low, high))


def chest_ct(array: np.ndarray, spacing: tuple[float, float, float]) -> torch.Tensor:
    """(112, 336, 336), 0 to 1, of Hounsfield units as a file holds them; its spacing in the file's order."""
    scan = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 1, 0)).astype(np.float32))
    sizes = [int(n * mm / to) for n, mm, to in zip(scan.shape, spacing[::-1], (3, 1, 1), strict=True)]
    scan = F.interpolate(scan[None, None], sizes, mode="trilinear", align_corners=False)[0, 0]
    scan = ((scan + 1150) / 1500).clip(0, 1)
    for axis, size in enumerate((112, 336, 336)):
        count = scan.shape[axis]
        before = max(0, (size - count) // 2)
        around = [0] * 6
        around[4 - 2 * axis : 6 - 2 * axis] = before, max(0, size - count) - before
        scan = F.pad(scan, around).narrow(axis, max(0, (count - size) // 2), size)
    return scan


def check(image: torch.Tensor, released: torch.Tensor) -> None:
    """Grey levels equal to those of the release, rounded: half a level off at most."""
    assert torch.equal(image, (released * 255).round().to(torch.uint8))
    assert (image / 255 - released).abs().max() <= 0.5 / 255 + 1e-6


def image_of(recipe: Recipe, volume: Volume) -> torch.Tensor:
    (scan,) = replace(recipe, rules=ANY)(volume)
    return scan.image


def affine_of(case: int, spacing: np.ndarray, turn: float = 0.0) -> np.ndarray:
    """Storage axes along the world's, in the case's order and directions, maybe turned."""
    affine, signs = np.eye(4), [1 if case >> k & 1 else -1 for k in range(3)]
    affine[:3, :3] = 0
    for k, world in enumerate(ORDERS[case % 6]):
        affine[world, k] = signs[k] * spacing[k]
    around = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine[:3, :3] = around @ affine[:3, :3]
    return affine


def voxels(case: int, kind: type, shape: np.ndarray) -> np.ndarray:
    """Smooth structure with noise, so that interpolation and grey levels matter everywhere."""
    rng = np.random.default_rng(case)
    array = rng.normal(300, 200, shape) + 400 * np.sin(np.linspace(0, 9, shape[0]))[:, None, None]
    limits = (-np.inf, np.inf) if kind == np.float32 else (np.iinfo(kind).min, np.iinfo(kind).max)
    return np.clip(array if kind == np.float32 else array.round(), *limits).astype(kind)


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("case", range(12))
def test_brain_mri(case: int, kind: type) -> None:
    rng = np.random.default_rng(case)
    shape = rng.integers(7, 70, 3)
    spacing = rng.choice([0.5, 0.7, 1.0, 1.0, 3.3, 5.0], 3)
    array, affine = voxels(case, kind, shape), affine_of(case, spacing, 0.3 if case % 4 == 3 else 0.0)
    check(image_of(RECIPES["brain-mri"], Volume(array, affine, Path("scan.nii"))), brain_mri(array, affine))


def test_head_ct_has_the_loader_of_brain_mri() -> None:
    """How its files were made is not published: whole levels are assumed, as brain MRI's."""
    array, affine = voxels(3, np.int16, np.array([40, 61, 17])), affine_of(0, np.array([0.5, 0.5, 5.0]))
    scans = replace(RECIPES["head-ct"], rules=ANY)(Volume(array, affine, Path("scan.nii")))
    for scan, window in zip(scans, ((0, 120), (-20, 180), (-800, 2000)), strict=True):
        check(scan.image, loaded(cut_to_whole_levels(thick_first(array, affine), *map(float, window))))


@pytest.mark.parametrize("case", range(8))
def test_chest_ct(case: int) -> None:
    kind = np.float32 if case % 2 else np.int16
    rng = np.random.default_rng(case)
    shape = rng.integers([60, 60, 20], [420, 420, 60])
    spacing = np.array([*[rng.choice([0.6640625, 0.7, 0.9, 1.0, 1.1])] * 2, rng.choice([0.8, 3.0, 3.3, 7.5])])
    array = (voxels(case, np.float32, shape) * 3 - 1000).astype(kind)
    affine = affine_of(case, spacing, 0.3 if case % 4 == 3 else 0.0).astype(np.float32).astype(np.float64)
    image = image_of(RECIPES["chest-ct"], Volume(array, affine, Path("scan.nii")))
    released = (chest_ct(array, tuple(spacing.tolist())) * 255).round().to(torch.uint8)
    off = (image.int() - released.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-4


def test_files_of_the_release_are_left_as_they_are() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (48, 224, 224)).astype(np.uint8)
    volume = Volume(grey.transpose(2, 1, 0), np.diag([1.0, -1, -1, 1]), Path("scan.pt"), prepared=True)
    for name in ("brain-mri", "head-ct"):
        assert np.array_equal(image_of(RECIPES[name], volume), grey)
    hounsfield = np.random.default_rng(0).uniform(-1500, 800, (90, 350, 300)).astype(np.float32)
    scan = image_of(RECIPES["chest-ct"], replace(volume, array=hounsfield.transpose(2, 1, 0)))
    released = F.pad(((torch.from_numpy(hounsfield) + 1150) / 1500).clip(0, 1)[:, 7:343], (18, 18, 0, 0, 11, 11))
    check(scan, released)


def test_files_of_the_release_that_are_larger_go_through_its_loader() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (31, 70, 45)).astype(np.uint8)
    volume = Volume(grey.transpose(2, 1, 0), np.diag([1.0, -1, -1, 1]), Path("scan.pt"), prepared=True)
    check(image_of(RECIPES["brain-mri"], volume), loaded(grey))


def test_the_slices_of_twenty() -> None:
    """Each of one value: which come first among 48."""
    array = np.broadcast_to(np.arange(20, dtype=np.uint8), (30, 30, 20))
    window = (Window(0, 255),)
    volume = Volume(array, np.diag([1.0, 1, -4, 1]), Path("scan.nii"))
    recipe = replace(RECIPES["brain-mri"], percentiles=None, windows=window, rounding="round")
    assert image_of(recipe, volume)[:8, 112, 112].tolist() == [0, 0, 1, 1, 1, 2, 2, 3]


def test_sizes_are_cut_down() -> None:
    """97 slices of 3.3 mm are 106 of 3 mm; 100 voxels of 0.7 mm, which no header holds exactly, are 70; 512 of
    0.48828125 mm are 250; and 90 of 0.7 mm are 62, as they are in Python."""
    released, linear = RECIPES["chest-ct"], RECIPES["chest-ct-linear"]
    for spacing in ((3.3, 0.7, 0.7), tuple(np.float32([3.3, 0.7, 0.7]).astype(float))):
        sizes = [axis.resized for axis in released.axes((97, 100, 512), spacing, False)]
        assert sizes == [106, 70, 358]
        assert [axis.resized for axis in linear.axes((97, 100, 512), spacing, False)] == [107, 70, 358]
        assert released.axes((97, 90, 90), spacing, False)[1].resized == 62
    assert released.axes((97, 512, 512), (3.3, 0.48828125, 0.9765625), False)[1].resized == 250


def test_nearest_slices_are_pytorch_s() -> None:
    for n in range(1, 700):
        places = torch.arange(n, dtype=torch.float32)[None, None]
        for m in (48, 144, 7):
            want = F.interpolate(places, m, mode="nearest-exact")[0, 0]
            rows, got = Axis(n, 0, m, m, 1.0, nearest=True).sampled()
            assert rows.tolist() == list(range(m)) and got.tolist() == want.tolist(), (n, m)


def test_a_window_that_comes_last_is_of_interpolated_intensities() -> None:
    """A bright and a dark voxel, far out of the window, meet in its middle."""
    array = np.full((8, 8, 2), -3000, dtype=np.int16)
    array[..., 1] = 2200
    volume = Volume(array, np.diag([1.0, 1, -6, 1]), Path("scan.nii"))
    last = Recipe((4, 8, 8), None, None, (Window(-1150, 350),), (3.0, 1.0, 1.0), windowing="last")
    first = replace(last, windowing="first")
    assert image_of(last, volume)[:, 0, 0].tolist() == [0, 0, 255, 255]  # of -3000, -1700, 900, 2200
    assert image_of(first, volume)[:, 0, 0].tolist() == [0, 64, 191, 255]


@pytest.mark.parametrize("recipe", [RECIPES["chest-ct"], replace(RECIPES["brain-mri"], windowing="last")])
def test_black_stays_black_where_the_window_comes_last(recipe: Recipe) -> None:
    array = np.full((20, 31, 20), 100, dtype=np.int16)
    array[::2] = 340
    recipe = replace(recipe, percentiles=None, windows=(Window(-1150, 350),))
    image = image_of(recipe, Volume(array, np.diag([1.0, 1, -3, 1]), Path("scan.nii")))
    assert (image[image.shape[0] // 2, :, [0, -1]] == 0).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("view", ["axial", "feet first", "coronal", "sagittal", "oblique"])
def test_a_dicom_series_is_turned_as_dcm2niix_turns_it(view: str, reverse: bool, tmp_path: Path) -> None:
    """Columns as they are, rows from the bottom, slices along the normal of the image's rows and columns. (dcm2niix
    itself, 1.0.20260724, gave these arrays for all of these series.)"""
    columns, rows, slices = {
        "axial": ([-1, 0, 0], [0, -1, 0], [0, 0, 1]),
        "feet first": ([1, 0, 0], [0, -1, 0], [0, 0, 1]),
        "coronal": ([-1, 0, 0], [0, 0, -1], [0, 1, 0]),
        "sagittal": ([0, -1, 0], [0, 0, -1], [-1, 0, 0]),
        "oblique": ([-0.96, -0.28, 0], [0.224, -0.768, 0.6], [-0.168, 0.576, 0.8]),
    }[view]
    affine = np.eye(4)
    affine[:3, :3] = np.array([columns, rows, slices]).T * (0.9, 1.1, 3.3)
    array = np.random.default_rng(0).integers(0, 1000, (17, 13, 9)).astype(np.int16)
    files = write_series(tmp_path / "dicom", array, affine, reverse=reverse)
    (volume,) = read_scan(find_study(files).scans[0], ANY)
    normal = np.cross(np.array(columns) * (-1, -1, 1), np.array(rows) * (-1, -1, 1)) * (-1, -1, 1)
    written = array[:, ::-1] if normal @ slices > 0 else array[:, ::-1, ::-1]
    got, spacing, plane = through_plane_first(volume, reorient=False)
    np.testing.assert_array_equal(got, written.transpose(2, 1, 0))
    np.testing.assert_allclose(spacing, (3.3, 1.1, 0.9), rtol=1e-5)
    assert plane == ("axial" if view in ("feet first", "oblique") else view)
