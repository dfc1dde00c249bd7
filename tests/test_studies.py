"""One study from its files."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import hlip
from dicom_files import write_series
from hlip.prepare.recipe import RECIPES, Recipe, Window
from hlip.prepare.studies import load_study
from hlip.read.nifti import read_nifti
from hlip.read.scan import ScanError

RECIPE = Recipe(size=(2, 4, 4), crop=(4, 4))


def write_scan(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 1000, (6, 7, 5)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 4.0, 1.0])), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of three scans, written in another order than the sorted one."""
    study = tmp_path / "p7"
    for seed, name in enumerate(["c.nii.gz", "a.nii", "sub/b.nii.gz"]):
        write_scan(study / name, seed)
    (study / "report.txt").write_text("No stroke.")
    (study / "a.json").write_text("{}")
    return study


def test_files_are_read_in_sorted_order(folder: Path) -> None:
    files = [folder / "a.nii", folder / "c.nii.gz", folder / "sub" / "b.nii.gz"]
    for paths in (files, [str(file) for file in files[::-1]], iter(files)):
        study = load_study(paths, RECIPE, impression="No stroke.")
        assert [name.split()[-1] for name in study.names] == ["a.nii", "c.nii.gz", "b.nii.gz"]
        assert (study.uid, study.impression) == ("a.nii", "No stroke.")
        for scan, file in zip(study.scans, files, strict=True):
            assert torch.equal(scan, RECIPE(read_nifti(file))[0].image)


def test_a_folder_is_read_in_sorted_order(folder: Path) -> None:
    study = load_study(folder, RECIPE)
    assert study.names == ["a.nii", "c.nii.gz", "sub b.nii.gz"]
    assert (study.uid, study.impression) == ("p7", "")
    assert load_study(str(folder), RECIPE, uid="other").uid == "other"


def test_the_error_is_a_public_name() -> None:
    assert hlip.ScanError is ScanError


def test_a_scan_given_twice_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a.nii.* given twice"):
        load_study([folder / "a.nii", folder / "c.nii.gz", folder / "a.nii"], RECIPE)


def test_hidden_files_are_no_scans_and_case_is_free(folder: Path) -> None:
    (folder / "._a.nii").write_bytes(b"resource fork")
    (folder / "c.nii.gz").rename(folder / "C.NII.GZ")
    assert load_study(folder, RECIPE).names == ["C.NII.GZ", "a.nii", "sub b.nii.gz"]


def test_a_folder_by_a_relative_path_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load_study(".", RECIPE).uid == "p7"


def test_a_single_file_is_a_study(folder: Path) -> None:
    study = load_study(folder / "a.nii")
    assert (study.uid, study.names) == ("a.nii", ["a.nii"])
    assert tuple(study.scans[0].shape) == Recipe().shape


def test_a_recipe_may_be_given_by_its_name_or_file(folder: Path, tmp_path: Path) -> None:
    def shown(recipe: Recipe | str | Path) -> list[np.ndarray]:
        return [scan.numpy() for scan in load_study(folder, recipe).scans]

    for name in ("brain-mri", "brain-mri-linear"):
        np.testing.assert_array_equal(shown(name), shown(RECIPES[name]))
    assert (shown("brain-mri")[0] != shown("brain-mri-linear")[0]).any()
    (tmp_path / "mine.yaml").write_text("size: [2, 4, 4]\ncrop: [4, 4]\n")
    for file in (tmp_path / "mine.yaml", str(tmp_path / "mine.yaml")):
        np.testing.assert_array_equal(shown(file), shown(RECIPE))
    with pytest.raises(ValueError, match="unknown recipe 'brain_mri'"):
        load_study(folder, "brain_mri")


def test_every_window_is_a_scan(folder: Path) -> None:
    recipe = Recipe((2, 4, 4), (4, 4), None, (Window(0, 500, "low"), Window(400, 1000, "high")))
    assert load_study([folder / "a.nii"], recipe).names == ["a.nii:low", "a.nii:high"]


def test_dicom_series_are_scans(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 1000, (6, 7, 5)).astype(np.int16)
    for number in (1, 2):
        options = {"study_uid": "1.2.3", "series_uid": f"1.2.3.{number}", "modality": "MR"}
        write_series(tmp_path / str(number), array + number, np.diag([1.0, 1.0, 4.0, 1.0]), **options)
    write_series(tmp_path / "3", array, np.eye(4), study_uid="1.2.3", series_uid="1.2.3.3", modality="CT")
    study = load_study(tmp_path, RECIPE)
    assert [tuple(scan.shape) for scan in study.scans] == [RECIPE.shape] * 2
    assert [(each.study, each.rule) for each in study.left_out] == [(tmp_path.name, "modality")]
    write_series(tmp_path / "other", array, np.eye(4), study_uid="1.2.4", series_uid="1.2.4.1", modality="MR")
    with pytest.raises(ValueError, match=r"DICOM files of 2 studies: 1\.2\.3, 1\.2\.4"):
        load_study(tmp_path, RECIPE)


def test_a_study_needs_scans(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("No stroke.")
    with pytest.raises(ValueError, match=f"{tmp_path}: no scans"):
        load_study(tmp_path)
    with pytest.raises(ValueError, match="at least one scan file"):
        load_study([])


def test_an_unusable_scan_is_named_or_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "c.nii.gz").write_bytes(b"not an image")
    with pytest.raises(ScanError, match=r"c.nii.gz: not a readable NIfTI file"):
        load_study([folder / "a.nii", folder / "c.nii.gz"], RECIPE)
    with caplog.at_level(logging.WARNING):
        study = load_study(folder, RECIPE)
    assert study.names == ["a.nii", "sub b.nii.gz"]
    assert [(each.study, each.scan, each.rule) for each in study.left_out] == [(folder.name, "c.nii.gz", "unreadable")]
    assert "left out a scan: " in caplog.text
    for file in ("a.nii", "sub/b.nii.gz"):
        (folder / file).unlink()
    with pytest.raises(ScanError, match="not a readable NIfTI file"):
        load_study(folder, RECIPE)
