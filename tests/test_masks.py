from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from commands import run
from hlip.prepare.grid import Axis
from hlip.prepare.masks import lesion_slices
from hlip.prepare.recipe import Recipe, Window
from hlip.read.rules import Rules
from hlip.read.scan import Volume
from hlip.store.store import Store

SHAPE, SPACING = (20, 24, 12), (1.0, 1.0, 4.0)
LESION = slice(4, 6)  # of the twelve
# Axial, coronal with slices from the back, sagittal: which way the three axes of the file go.
AXES = {"axial": "RAS", "coronal": "RIP", "sagittal": "ASL"}
RECIPE = "size: [24, 32, 32]\ncrop: [32, 32]\nrules: {min_slices: 4}\n"


def affine_of(axes: str) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (letter, mm) in enumerate(zip(axes, SPACING, strict=True)):
        row = next(i for i, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[row, column] = mm if letter in "RAS" else -mm
    return affine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Study `ill` of three scans, bright where the mask is; `well` of one; and their store."""
    root = tmp_path_factory.mktemp("masks")
    random = np.random.default_rng(0)
    for study, names in (("ill", list(AXES)), ("well", ["axial"])):
        for name in names:
            array, mask = random.integers(0, 50, SHAPE).astype(np.int16), np.zeros(SHAPE, np.uint8)
            if study == "ill":
                mask[5:9, 6:12, LESION] = 3  # a label of several
                array[mask > 0] = 1000
            for kind, image in (("input", array), ("masks", mask)):
                path = root / kind / study / f"{name}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "input" or study == "ill":
                    nibabel.save(nibabel.Nifti1Image(image, affine_of(AXES[name])), path)
    (root / "recipe.yaml").write_text(RECIPE)
    (root / "masks" / "well").rmdir()
    args = ["--recipe", root / "recipe.yaml", "--out", root / "store", "--workers", 1]
    assert run("prepare", root / "input", *args) == 0
    return root


def test_the_slices_of_masks_are_those_that_are_bright(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "slices.json"
    assert run("store", "slices", folder / "masks", "--store", folder / "store", "--out", out) == 0
    assert "12 slices of 3 scans, 1 studies" in capsys.readouterr().out
    found = json.loads(out.read_text())
    store = Store(folder / "store")
    study = store.study(store.uids.tolist().index("ill"))
    assert list(found) == ["ill"] and sorted(found["ill"]) == sorted(study.names)
    planes = store.manifest.column("plane")[store.uids.tolist().index("ill")].as_py()
    assert sorted(planes) == sorted(AXES)
    for name, scan in zip(study.names, study.scans, strict=True):
        bright = np.flatnonzero((scan.numpy() > 150).any(axis=(1, 2)))  # interpolation darkens the outer slices
        assert found["ill"][name] == bright.tolist(), name


def test_masks_that_do_not_fit_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.zeros((4, 4, 5), np.uint8)
    image[1, 1, 1] = 1
    for path, array, message in (
        ("none/x.nii.gz", image, "the store has no study none"),
        ("ill/t9.nii.gz", image, "study ill has no scan of that name, only axial"),
        ("ill/axial.nii", image, "has 5 slices, the scan has 12"),
        ("ill/axial.nii.gz", image * 0, "no mask has a lesion that a prepared slice shows"),
    ):
        masks = tmp_path / path.replace("/", "-")
        (masks / path).parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 4.0, 1.0])), masks / path)
        assert run("store", "slices", masks, "--store", folder / "store", "--out", tmp_path / "s.json") == 2
        assert message in capsys.readouterr().err
    assert run("store", "slices", tmp_path, "--store", folder / "store", "--out", tmp_path / "s.json") == 2
    assert "has no masks STUDY/SCAN.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("of", ["ill", "ill/axial.nii.gz"], ids=["folder", "file"])
def test_a_mask_is_no_link_to_elsewhere(
    of: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "masks" / of
    link.parent.mkdir(parents=True)
    link.symlink_to(folder / "masks" / of)
    assert run("store", "slices", tmp_path / "masks", "--store", folder / "store", "--out", tmp_path / "s.json") == 2
    assert f"{tmp_path / 'masks' / 'ill' / 'axial.nii.gz'}: a link leads out" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("ways", [{}, {"depth": "nearest-exact"}, {"windowing": "last", "reorient": False}], ids=str)
def test_slices_thinned_out_show_what_is_listed(ways: dict[str, Any]) -> None:
    """Whatever the depths, a slice is listed if most of it is lesion, and no other."""
    recipe = Recipe((8, 16, 16), None, None, (Window(0, 100),), rules=Rules(min_slices=1), **ways)
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    for depth, first in itertools.product((6, 10, 13, 20, 31), range(5)):
        array = np.zeros((16, 16, depth), np.int16)
        array[4:12, 4:12, first : first + 2] = 100
        array[0, 0, :] = 100  # so that there is contrast, away from what is looked at
        mask = array.copy()
        mask[0, 0, :] = 0
        (scan,) = recipe(Volume(array, affine, Path("x")))
        shown = np.flatnonzero(scan.image[:, 8, 8].numpy() > 127).tolist()
        assert lesion_slices(Volume(mask, affine, Path("x")), recipe) == (shown, depth), (depth, first)


@pytest.mark.parametrize(
    ("axis", "voxels", "expected"),
    [
        (Axis(4, 0, 8, 8, 1.0), [0, 3], [0, 1, 6, 7]),
        (Axis(12, 0, 4, 4, 1.0), [3, 4], [1]),
        (Axis(12, 0, 4, 4, 1.0), [5, 6], []),  # between two that are seen
        (Axis(3, 0, 3, 3, 1.0), [0, 1, 2], [0, 1, 2]),
        (Axis(3, 0, 4, 4, 1.0), [1], [1, 2]),
        (Axis(10, 0, 10, 6, 1.0), [0, 1, 2, 9], [0]),  # two are cut off at either end
        (Axis(4, 0, 4, 8, 1.0), [0, 3], [2, 5]),  # two are put before and after
        (Axis(3, 0, 9, 9, 1.0), [], []),
    ],
)  # fmt: skip
def test_where_slices_come_to_lie(axis: Axis, voxels: list[int], expected: list[int]) -> None:
    assert axis.forward(np.array(voxels, dtype=np.int64)) == expected
