"""From prepared scans back to the voxels of their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dicom_files import write_series
from hlip.prepare.discover import find_study
from hlip.prepare.grid import Axis
from hlip.prepare.recipe import Recipe, Window
from hlip.prepare.studies import load_study, load_study_on_grids
from hlip.read.nifti import read_nifti
from hlip.read.readers import read_scan

TURN = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1.0]]) @ np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
# Columns: where a file's three axes point to (x to the right, y anterior, z superior); the third has the thick slices.
VIEWS = {
    "axial": np.diag([-1.0, -1.0, 1.0]),
    "coronal": np.array([[-1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]]).T,
    "sagittal": np.array([[0, 1.0, 0], [0, 0, -1.0], [-1.0, 0, 0]]).T,
    "oblique": TURN @ np.diag([1.0, 1.0, -1.0]),
}
WINDOWED = Recipe(percentiles=None, windows=(Window(0, 100),))
RECIPES = {
    "squares": replace(WINDOWED, size=(24, 68, 68), crop=(60, 60)),
    "native": replace(WINDOWED, native=(2, 3, 3)),
    "spacing": replace(WINDOWED, size=(40, 60, 60), crop=None, spacing=(2.5, 1.5, 1.5)),
}
RECIPES["squares as released"] = replace(RECIPES["squares"], depth="nearest-exact", rounding="truncate")
RECIPES["spacing as released"] = replace(RECIPES["spacing"], lengths="floor", windowing="last", reorient=False)


def save(path: Path, view: str, order: tuple[int, ...], marked: tuple[slice, ...]) -> Path:
    """40 x 52 x 20 voxels of 1.6 x 1.3 x 4 mm, grey but for the marked ones; axes stored in another order."""
    array = np.full((40, 52, 20), 20, dtype=np.int16)
    array[0] = 0
    array[marked] = 100
    affine = np.eye(4)
    affine[:3, :3] = VIEWS[view] * (1.6, 1.3, 4.0)
    affine[:3, 3] = -affine[:3, :3] @ np.array([22.0, 25.0, 9.0])
    affine[:3, :3] = affine[:3, :3][:, order]
    nibabel.save(nibabel.Nifti1Image(array.transpose(order), affine), path)
    return path


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("view", VIEWS)
def test_a_marked_place_goes_there_and_back(view: str, order: tuple[int, ...], recipe: Recipe, tmp_path: Path) -> None:
    marked = (slice(24, 29), slice(13, 19), slice(6, 9))
    file = save(tmp_path / "scan.nii.gz", view, order, marked)
    study, (grid,) = load_study_on_grids([file], recipe)
    source = nibabel.load(file)
    assert grid.array.shape == source.shape
    assert grid.array.base is not None and grid.array.strides == (0, 0, 0)  # no voxels in memory
    np.testing.assert_allclose(grid.affine, source.affine, atol=1e-4)

    bright = (study.scans[0] > 150).float()
    assert bright.any()
    back = recipe.on_source(grid, bright.numpy())
    assert back.shape == source.shape and back.dtype == np.float32
    truth = np.asarray(source.dataobj) == 100
    assert (back[truth] > 0.5).mean() > 0.6
    assert (back[~truth] > 0.5).mean() < 0.005

    def middle(weights: np.ndarray) -> np.ndarray:
        places = np.argwhere(weights > 0)
        return nibabel.affines.apply_affine(source.affine, np.average(places, axis=0, weights=weights[weights > 0]))

    assert np.linalg.norm(middle(back) - middle(truth)) < 1.0  # mm


@pytest.mark.parametrize("view", VIEWS)
def test_the_patch_that_holds_it_covers_it(view: str, tmp_path: Path) -> None:
    recipe = RECIPES["squares"]
    marked = (slice(24, 27), slice(13, 17), slice(6, 8))
    study, (grid,) = load_study_on_grids([save(tmp_path / "scan.nii", view, (1, 2, 0), marked)], recipe)
    patches = F.max_pool3d(study.scans[0][None].float(), (4, 10, 10))[0]
    back = recipe.on_source(grid, (patches == patches.max()).float().numpy())
    truth = np.asarray(nibabel.load(tmp_path / "scan.nii").dataobj) == 100
    assert back.max() <= 1 and back[truth].mean() > 0.4
    assert back[~truth].mean() < 0.1


def test_all_of_a_scan_that_was_kept_and_nothing_else(tmp_path: Path) -> None:
    recipe = RECIPES["squares"]
    _, (grid,) = load_study_on_grids([save(tmp_path / "scan.nii", "axial", (0, 1, 2), np.s_[3:5, 3:5, 3:5])], recipe)
    back = recipe.on_source(grid, np.ones((6, 6, 6), dtype=np.float32))
    assert set(np.unique(back)) == {0.0, 1.0}
    kept = 52 * 60 / 68  # of the padded square, in voxels
    assert back.any((1, 2)).sum() == 40  # the padding is cut off first
    assert abs(back.any((0, 2)).sum() - kept) <= 1
    assert back.any((0, 1)).all()


@pytest.mark.parametrize(
    "axis",
    [
        Axis(20, 0, 24, 24, 1.0),
        Axis(40, 12, 68, 60, 1.0),
        Axis(41, 11, 68, 60, 1.0),
        Axis(30, 0, 30, 44, 1.0),
        Axis(90, 0, 31, 20, 1.0),
    ],
    ids=str,
)
def test_an_axis_undoes_its_resize(axis: Axis) -> None:
    """Places of the source, resized as PyTorch resizes, padded and cut, come back where they were."""
    padded = torch.arange(axis.length + axis.black, dtype=torch.float64) - axis.black // 2
    resized = F.interpolate(padded[None, None], axis.resized, mode="linear", align_corners=False)[0, 0]
    result = F.pad(resized, axis.margins, value=torch.nan).numpy()
    weights = axis.back(axis.kept)
    assert weights.shape == (axis.length, axis.kept)
    back = np.nansum(weights * result, axis=1)
    known = (weights.sum(1) > 0) & ~(weights @ np.isnan(result).astype(np.float32) > 0)
    step = (axis.length + axis.black) / axis.resized
    inside = known & (np.arange(axis.length) > step) & (np.arange(axis.length) < axis.length - 1 - step)
    inside &= (weights[:, 0] == 0) & (weights[:, -1] == 0)
    assert inside.sum() > 5
    np.testing.assert_allclose(back[inside], np.arange(axis.length)[inside], atol=1e-4)
    np.testing.assert_allclose(weights.sum(1)[known], 1, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_marked_place_of_a_dicom_series_that_is_not_turned(reverse: bool, tmp_path: Path) -> None:
    array = np.full((40, 52, 20), 20, dtype=np.int16)
    array[0], array[24:29, 13:19, 6:9] = 0, 100
    affine = np.eye(4)
    affine[:3, :3] = VIEWS["coronal"] * (1.6, 1.3, 4.0)
    files = write_series(tmp_path / "dicom", array, affine, reverse=reverse)
    recipe = RECIPES["spacing as released"]
    study, (grid,) = load_study_on_grids(files, recipe)
    back = recipe.on_source(grid, (study.scans[0] > 150).numpy())
    (volume,) = read_scan(find_study(files).scans[0], recipe.rules)
    truth = volume.array == 100
    assert (back[truth] > 0.5).mean() > 0.6
    assert (back[~truth] > 0.5).mean() < 0.005


def test_loads_what_load_study_loads(nifti_study: list[Path]) -> None:
    recipe = Recipe(
        size=(8, 18, 18), crop=(16, 16), percentiles=None, windows=(Window(0, 500, "a"), Window(0, 900, "b"))
    )
    study, grids = load_study_on_grids(nifti_study, recipe)
    alone = load_study(nifti_study, recipe)
    assert study.names == alone.names == [f"scan_{m}.nii.gz:{w}" for m in range(3) for w in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(study.scans, alone.scans, strict=True))
    assert [grid.array.shape[0] for grid in grids] == [12, 12, 13, 13, 14, 14]
    assert [grid.path for grid in grids[::2]] == nifti_study
    np.testing.assert_array_equal(read_nifti(nifti_study[0]).affine, grids[0].affine)


def test_one_patch_covers_all_that_was_kept() -> None:
    assert Axis(7, 0, 1, 1, 1.0).back(1).tolist() == [[1.0]] * 7
    assert Axis(6, 0, 6, 4, 1.0).back(1).ravel().tolist() == [0, 1, 1, 1, 1, 0]
