"""The quality gate: every rule lets pass what it should and names itself when it does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hlip import HLIPModel
from hlip.prepare.recipe import Recipe, load_recipe
from hlip.read.readers import read_scan
from hlip.read.rules import Rules, check_image_type, is_hounsfield, is_rescaled
from hlip.read.scan import ScanError, ScanSource, Volume

nibabel = pytest.importorskip("nibabel")
nilearn_datasets = pytest.importorskip("nilearn.datasets")
MNI = Path(nilearn_datasets.__file__).parent / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
DATA = Path(nibabel.__file__).parent / "tests" / "data"


def brain_ct(noise: float = 15.0) -> np.ndarray:
    """The MNI brain in Hounsfield units: air, tissue, and a shell as bright as bone."""
    brain = np.asarray(nibabel.load(MNI).dataobj)[::3, ::3, ::3].astype(float)
    units = np.where(brain > 0, brain * 0.3, -1000)
    units[(brain > 0) & (brain < 40)] = 900
    return (units + np.random.default_rng(0).normal(0, noise, units.shape)).astype(np.int16)


def volume(array: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    return Volume(array, np.diag([3.0, 3, 3, 1]) if affine is None else affine, Path("scan.nii"))


def save(path: Path, array: np.ndarray, slope: float = 1, intercept: float = 0, spacing: float = 3.0) -> ScanSource:
    """A file of these STORED numbers, with a header that asks to rescale them."""
    image = nibabel.Nifti1Image(array, np.diag([spacing, spacing, spacing, 1]))
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)
    if (slope, intercept) != (1, 0):  # saving has applied the inverse
        content = bytearray(path.read_bytes())
        content[352:] = array.tobytes(order="F")
        path.write_bytes(content)
    return ScanSource(path.name, "nifti", (path,))


def rule_of(recipe: Recipe, source: ScanSource) -> str | None:
    try:
        recipe.prepare(source)
    except ScanError as error:
        assert str(source.files[0]) in str(error)
        return error.rule
    return None


def test_slices_are_counted_along_the_through_plane_axis(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 100, (5, 20, 20)).astype(np.int16)
    for shape, rule in [((5, 20, 20), None), ((4, 20, 20), "few_slices")]:
        image = nibabel.Nifti1Image(array[: shape[0]], np.diag([4.0, 1, 1, 1]))
        nibabel.save(image, tmp_path / "scan.nii")
        assert rule_of(Recipe(), ScanSource("scan", "nifti", (tmp_path / "scan.nii",))) == rule


@pytest.mark.parametrize(
    ("name", "description", "rule"),
    [
        ("scan", "T2 FLAIR axial", None),
        ("t1_calibrated", "recalibration of nothing", None),
        ("3-plane loc", "", "localiser"),
        ("scan", "Survey_SHC", "localiser"),
        ("sub-01_localizer", "", "localiser"),
        ("scan", "LOCALISER sag", "localiser"),
        ("scan", "Topogram 0.6", "localiser"),
        ("scan", "Dose Report", "localiser"),
        ("scan", "Screen Save", "localiser"),
    ],
)
def test_names_and_descriptions(name: str, description: str, rule: str | None) -> None:
    source = ScanSource(name, "nifti", (MNI,), "", description)
    assert rule_of(Recipe(), source) == rule
    assert rule_of(Recipe(rules=Rules(descriptions=())), source) is None


@pytest.mark.parametrize(("modality", "rule"), [("MR", None), ("", None), ("CT", "modality"), ("US", "modality")])
def test_modality(modality: str, rule: str | None) -> None:
    assert rule_of(Recipe(), ScanSource("scan", "nifti", (MNI,), modality)) == rule


@pytest.mark.parametrize(("modality", "rule"), [("", "modality"), ("MR", None)])
def test_a_ct_is_known_by_its_intensities_where_the_file_names_no_modality(modality: str, rule: str | None) -> None:
    for array, expected in [
        (brain_ct(), rule),
        (brain_ct() + 1024, None),
        (np.asarray(nibabel.load(MNI).dataobj), None),
    ]:
        try:
            Recipe()(dataclasses.replace(volume(array), modality=modality))
            assert expected is None
        except ScanError as error:
            assert error.rule == expected
    assert load_recipe("head-ct")(volume(brain_ct()))


def test_the_recipe_of_a_model(model_folder: Path, tmp_path: Path) -> None:
    assert load_recipe(str(model_folder)) == HLIPModel.from_pretrained(model_folder).config.recipe != Recipe()
    for content, message in (({}, "saved without a recipe"), ({"recipe": {"sizes": 1}}, "unknown field 'sizes'")):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: .*{message}"):
            load_recipe(str(tmp_path))


def test_four_dimensions_by_rule() -> None:
    source = ScanSource("epi", "nifti", (DATA / "example4d.nii.gz",))
    assert rule_of(Recipe(), source) == "four_d"
    whole = np.asarray(nibabel.load(source.files[0]).dataobj)
    volumes = read_scan(source, Rules(four_d="split"))
    assert [v.part for v in volumes] == ["t0", "t1"]
    for t, part in enumerate(volumes):
        np.testing.assert_array_equal(part.array, whole[..., t])
    (first,) = read_scan(source, Rules(four_d="first"))
    np.testing.assert_array_equal(first.array, whole[..., 0])
    assert rule_of(Recipe(rules=Rules(four_d="split", max_parts=1)), source) == "four_d"


def test_too_large(tmp_path: Path) -> None:
    source = save(tmp_path / "scan.nii", brain_ct())
    assert rule_of(Recipe(rules=Rules((), max_voxels=brain_ct().size)), source) is None
    assert rule_of(Recipe(rules=Rules((), max_voxels=brain_ct().size - 1)), source) == "too_large"


@pytest.mark.parametrize(("spacing", "rule"), [(0.02, None), (99.0, None), (0.005, "spacing"), (150.0, "spacing")])
def test_spacing(spacing: float, rule: str | None, tmp_path: Path) -> None:
    assert rule_of(Recipe(rules=Rules(())), save(tmp_path / "scan.nii", brain_ct(), spacing=spacing)) == rule


def test_shear() -> None:
    for cosine, rule in [(0.5, None), (0.65, "sheared")]:
        affine = np.diag([3.0, 3, 3, 1])
        affine[:2, 1] = 3 * cosine, 3 * np.sqrt(1 - cosine**2)
        try:
            Recipe(rules=Rules(()))(volume(brain_ct(), affine))
            assert rule is None
        except ScanError as error:
            assert error.rule == rule
    flat = np.eye(4)
    flat[:3, :3] = np.array([[1, 0, 0], [0, 1, 0], [0.6, 0.6, 1e-9]]).T * 3
    with pytest.raises(ScanError, match="sheared axes"):
        Recipe(rules=Rules(max_shear=0.8))(volume(brain_ct(), flat))


@pytest.mark.parametrize(("share", "rule"), [(0.4, None), (0.6, "not_finite"), (1.0, "not_finite")])
def test_mostly_not_a_number(share: float, rule: str | None, tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(100, 20, (20, 20, 10)).astype(np.float32)
    array[: int(share * 20)] = np.nan
    assert rule_of(Recipe(), save(tmp_path / "scan.nii", array)) == rule


def test_constant_and_without_contrast(tmp_path: Path) -> None:
    array = np.full((20, 20, 10), 7, dtype=np.int16)
    assert rule_of(Recipe(), save(tmp_path / "a.nii", array)) == "constant"
    array[0, 0, 0] = 9
    assert rule_of(Recipe(), save(tmp_path / "b.nii", array)) == "no_contrast"
    array[:10] = 9
    assert rule_of(Recipe(), save(tmp_path / "c.nii", array)) is None


def test_no_contrast_in_a_window(tmp_path: Path) -> None:
    head_ct = load_recipe("head-ct")
    source = save(tmp_path / "scan.nii", brain_ct())
    assert rule_of(head_ct, source) is None
    bright = dataclasses.replace(head_ct.windows[0], low=3000.0, high=3100.0, name="metal")
    assert rule_of(dataclasses.replace(head_ct, windows=(bright,)), source) == "no_contrast"


@pytest.mark.parametrize("noise", [0.0, 15.0, 60.0])
@pytest.mark.parametrize("padding", [None, -2000, -3024, -8192])
def test_hounsfield_units_are_known(noise: float, padding: int | None) -> None:
    array = brain_ct(noise)
    if padding is not None:
        x = np.arange(array.shape[0]) - array.shape[0] / 2
        y = np.arange(array.shape[1]) - array.shape[1] / 2
        array[np.hypot.outer(x, y) > 36] = padding
    assert is_hounsfield(array)
    stored = np.where(array == array.min() if padding else False, array, array + 1024)
    assert not is_hounsfield(stored)
    assert not is_hounsfield(array, 1, -8192)
    assert not is_hounsfield(array, 0.01)
    for intercept in (-1024.0, -8192.0):
        assert is_rescaled(array, 1, intercept)
        assert not is_rescaled(array.astype(np.int32) - int(intercept), 1, intercept)
    assert not is_rescaled(array, 1, 0.5)


@pytest.mark.parametrize(
    ("shift", "slope", "intercept", "rule"),
    [
        (0, 1, 0, None),
        (1024, 1, -1024, None),  # as it should be
        (0, 1, -8192, None),  # converted already: left as it is
        (0, 1, -1024, None),
        (1024, 1, 0, "hounsfield"),  # never converted
        (-7192, 1, 0, "hounsfield"),  # converted twice
        (0, 2, 0, None),
        (0, 0.5, 0, None),
        (512, 2, 0, "hounsfield"),
    ],
)
def test_hounsfield_units_by_rule(shift: int, slope: float, intercept: float, rule: str | None, tmp_path: Path) -> None:
    head_ct = load_recipe("head-ct")
    source = save(tmp_path / "scan.nii", brain_ct() + np.int16(shift), slope, intercept)
    assert rule_of(head_ct, source) == rule
    if rule is None:
        (want, *_) = head_ct(volume(brain_ct()))
        assert torch.equal(head_ct.prepare(source)[0].image, want.image)


def test_real_mri_is_not_in_hounsfield_units() -> None:
    assert rule_of(load_recipe("head-ct"), ScanSource("scan", "nifti", (MNI,))) == "hounsfield"
    assert rule_of(load_recipe("chest-ct"), ScanSource("scan", "nifti", (MNI,))) == "hounsfield"


@pytest.mark.parametrize(
    "settings",
    [
        {"min_slices": 0},
        {"max_voxels": 0},
        {"max_parts": 0},
        {"max_shear": 1.5},
        {"max_missing": -0.1},
        {"min_finite": float("nan")},
        {"spacing": (0.0, 100.0)},
        {"spacing": (5.0, 1.0)},
        {"descriptions": ("(",)},
    ],
)
def test_refuses_bad_rules(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Rules(**settings)


@pytest.mark.parametrize("intercept", [-1000, -1024, -8192])
def test_a_masked_ct_is_not_rescaled_twice(intercept: int, tmp_path: Path) -> None:
    """Air of one exact value, in Hounsfield units as stored, under a header that asks to rescale it."""
    clean = brain_ct(noise=0)
    source = save(tmp_path / "scan.nii", clean, 1, intercept)
    assert read_scan(source, Rules((), hounsfield=True))[0].array.min() == -1000
    stored = save(tmp_path / "stored.nii", (clean - intercept).clip(0), 1, intercept)
    assert read_scan(stored, Rules((), hounsfield=True))[0].array.min() == max(-1000, intercept)
    twice = save(tmp_path / "twice.nii", clean + intercept)
    assert rule_of(load_recipe("head-ct"), twice) == "hounsfield"


def test_bone_may_be_a_quarter_of_a_head() -> None:
    units = brain_ct()
    body = np.flatnonzero(units > -500)
    units.flat[np.random.default_rng(0).choice(body, len(body) // 4, replace=False)] = 1200
    assert is_hounsfield(units)
    units.flat[body] = 1200
    assert not is_hounsfield(units)


@pytest.mark.parametrize(
    ("image_type", "rule"),
    [
        (["DERIVED", "PRIMARY", "MIP_SAG"], "derived"), (["DERIVED", "PRIMARY", "MPR"], "derived"),
        (["DERIVED", "PRIMARY", "SUBTRACTION"], "derived"), (["DERIVED", "PRIMARY", "PROJECTION IMAGE"], "derived"),
        (["ORIGINAL", "PRIMARY", "LOCALIZER"], "localiser"), (["DERIVED", "PRIMARY", "DIFFUSION", "ADC"], None),
        (["ORIGINAL", "PRIMARY", "M_FFE", "AXIAL"], None), (["ORIGINAL", "PRIMARY", "COMPRESSED"], None),
    ],
)  # fmt: skip
def test_image_types(image_type: list[str], rule: str | None) -> None:
    try:
        check_image_type("scan", image_type, Rules())
        assert rule is None
    except ScanError as error:
        assert error.rule == rule
