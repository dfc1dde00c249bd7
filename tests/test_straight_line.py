"""Recipes against a straight-line implementation, on real images: within one grey level, voxel by voxel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dipy
import nibabel
import nilearn.datasets
import numpy as np
import pytest
import SimpleITK as sitk

import straight_line
from dicom_files import write_series
from hlip.prepare.recipe import Recipe, load_recipe
from hlip.read.rules import Rules
from hlip.read.scan import ScanSource

MNI = Path(nilearn.datasets.__file__).parent / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
STATISTIC_MAP = MNI.with_name("image_10426.nii.gz")
EXAMPLE_4D = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
DIPY = Path(dipy.__file__).parent / "data" / "files"
# Directions of the slice grid's x, y, z in mm (x left, y posterior, z superior), as scanners lay them.
VIEWS = {
    "axial": np.eye(3),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]]),
    "sagittal": np.array([[0, 0, -1.0], [1.0, 0, 0], [0, -1.0, 0]]),
}
TURN = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1.0]]) @ np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
VIEWS["oblique"] = TURN @ VIEWS["axial"]


def seen(view: str, spacing: tuple[float, float, float] = (1.1, 0.9, 4.7)) -> sitk.Image:
    """The MNI brain as a scanner would image it: thick slices, int16, a grid that starts anywhere."""
    template = sitk.ReadImage(str(MNI), sitk.sitkFloat32)
    directions = VIEWS[view]
    size = [int(200 / spacing[0]), int(220 / spacing[1]), int(190 / spacing[2])]
    center = np.array(template.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in template.GetSize()]))
    origin = center - directions @ ((np.array(size) - 1) / 2 * spacing)
    image = sitk.Resample(
        template, size, sitk.Transform(), sitk.sitkLinear, origin, spacing, directions.ravel(), 0, sitk.sitkFloat32
    )
    return sitk.Cast(image * 7.3 + 11, sitk.sitkInt16)


def array_and_affine(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """As a NIfTI file has them: (X, Y, Z), and millimetres to the right, anterior, superior."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), affine


def prepare(recipe: Recipe, files: Sequence[Path], modality: str = "") -> list[np.ndarray]:
    source = ScanSource("scan", "dicom" if files[0].suffix == ".dcm" else "nifti", tuple(files), modality)
    return [scan.image.numpy() for scan in recipe.prepare(source)]


def assert_equal(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype == np.uint8
    assert np.abs(got.astype(int) - want).max() <= 1
    assert (got != want).mean() < 0.01  # and it is a matter of rounding
    assert want.std() > 10


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("view", VIEWS)
def test_brain_mri_from_nifti(view: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"scan{suffix}"
    sitk.WriteImage(seen(view), str(file))
    (got,) = prepare(load_recipe("brain-mri-linear"), [file])
    assert_equal(got, straight_line.brain_mri([file]))


@pytest.mark.parametrize("file", [MNI, STATISTIC_MAP, DIPY / "aniso_vox.nii.gz"], ids=lambda file: file.name)
def test_brain_mri_of_a_real_file(file: Path) -> None:
    (got,) = prepare(load_recipe("brain-mri-linear"), [file])
    want = straight_line.brain_mri([file])
    assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize("part", [0, 1])
def test_brain_mri_of_a_real_oblique_epi(part: int, tmp_path: Path) -> None:
    scans = Recipe(rules=Rules(four_d="split")).prepare(ScanSource("epi", "nifti", (EXAMPLE_4D,)))
    assert [(scan.name, scan.plane) for scan in scans] == [("t0", "axial"), ("t1", "axial")]
    file = tmp_path / "part.nii.gz"
    image = nibabel.load(EXAMPLE_4D).slicer[..., part]
    nibabel.save(image, file)
    assert_equal(scans[part].image.numpy(), straight_line.brain_mri([file]))


def test_brain_mri_of_a_real_sheared_file(tmp_path: Path) -> None:
    """SimpleITK refuses its header; the voxels are those of the same file with plain axes."""
    file = DIPY / "S0_10slices.nii.gz"
    with pytest.raises(RuntimeError, match="orthonormal"):
        straight_line.brain_mri([file])
    image = nibabel.load(file)
    plain = nibabel.Nifti1Image(image.dataobj[..., 0], np.diag([*image.header.get_zooms()[:3], 1]))
    nibabel.save(plain, tmp_path / "plain.nii.gz")
    (got,) = prepare(load_recipe("brain-mri-linear"), [file])
    assert_equal(got, straight_line.brain_mri([tmp_path / "plain.nii.gz"]))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_brain_mri_from_dicom(view: str, reverse: bool, tmp_path: Path) -> None:
    image = seen(view)
    files = write_series(tmp_path / "series", *array_and_affine(image), reverse=reverse)
    (got,) = prepare(load_recipe("brain-mri-linear"), files)
    assert_equal(got, straight_line.brain_mri(files))
    sitk.WriteImage(image, str(tmp_path / "scan.nii"))
    assert_equal(got, straight_line.brain_mri([tmp_path / "scan.nii"]))


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big_endian", "rle", "jpeg2000", "jpeg_lossless"])
def test_brain_mri_in_every_transfer_syntax(syntax: str, tmp_path: Path) -> None:
    array, affine = array_and_affine(seen("oblique", (2.2, 1.8, 4.7)))
    files = write_series(tmp_path / "series", array, affine, transfer_syntax=syntax, slope=0.5, intercept=-20)
    (got,) = prepare(load_recipe("brain-mri-linear"), files)
    assert_equal(got, straight_line.brain_mri(files))


@pytest.mark.parametrize("missing", [[7], [3, 20], [11, 12]])
def test_missing_slices_are_interpolated(missing: list[int], tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", *array_and_affine(seen("coronal")), missing=missing)
    (got,) = prepare(load_recipe("brain-mri-linear"), files)
    assert_equal(got, straight_line.brain_mri(files))


def test_a_rescale_of_every_slice_its_own(tmp_path: Path) -> None:
    array, affine = array_and_affine(seen("axial"))
    slopes = np.linspace(0.5, 2, array.shape[2]).round(3)
    files = write_series(tmp_path / "series", array, affine, slope=slopes, intercept=-slopes)
    (got,) = prepare(load_recipe("brain-mri-linear"), files)
    assert_equal(got, straight_line.brain_mri(files))


def hounsfield(image: sitk.Image) -> sitk.Image:
    """The brain image as if it were of a CT: air around, tissue, something as bright as bone."""
    array = sitk.GetArrayFromImage(image).astype(np.int32)
    result = sitk.GetImageFromArray(
        np.where(array < 200, -1000, array // 12 - 40 + 900 * (array > 1780)).astype(np.int16)
    )
    result.CopyInformation(image)
    return result


@pytest.mark.parametrize("view", ["axial", "coronal", "oblique"])
def test_head_ct(view: str, tmp_path: Path) -> None:
    array, affine = array_and_affine(hounsfield(seen(view)))
    files = write_series(tmp_path / "series", array + 1024, affine, modality="CT", intercept=-1024)
    got = prepare(load_recipe("head-ct-linear"), files)
    for scan, want in zip(got, straight_line.head_ct(files), strict=True):
        assert_equal(scan, want)


@pytest.mark.parametrize(
    "spacing",
    [(0.8, 0.7, 1.5), (1.6, 1.4, 5.0), (0.45, 0.45, 3.1), (0.9, 0.9, 0.7)],
    ids=["thin", "thick", "fine", "thinner than wide"],
)
def test_chest_ct(spacing: tuple[float, float, float], tmp_path: Path) -> None:
    file = tmp_path / "scan.nii.gz"
    sitk.WriteImage(hounsfield(seen("axial", spacing)), str(file))
    (got,) = prepare(load_recipe("chest-ct-linear"), [file])
    assert_equal(got, straight_line.chest_ct([file]))


def test_chest_ct_is_axial_however_it_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "scan.nii.gz"
    sitk.WriteImage(hounsfield(seen("coronal")), str(file))
    (scan,) = load_recipe("chest-ct-linear").prepare(ScanSource("scan", "nifti", (file,)))
    assert (scan.plane, tuple(scan.image.shape)) == ("axial", (112, 336, 336))
    assert scan.spacing == pytest.approx((3, 1, 1), rel=0.02)
    assert_equal(scan.image.numpy(), straight_line.chest_ct([file]))


@pytest.mark.parametrize("view", VIEWS)
def test_native_grid(view: str, tmp_path: Path) -> None:
    file = tmp_path / "scan.nii.gz"
    sitk.WriteImage(seen(view), str(file))
    (got,) = prepare(Recipe(native=(8, 16, 16)), [file])
    assert_equal(got, straight_line.native_mri([file], (8, 16, 16)))
