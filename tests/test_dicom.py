"""DICOM in: series written from arrays come back as they were; what hospitals do to series is mended or refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hlip.read.readers import read_scan
from hlip.read.rules import Rules
from hlip.read.scan import ScanError, ScanSource, Volume

pytest.importorskip("pydicom")
pytest.importorskip("SimpleITK")
import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian, generate_uid

from dicom_files import SYNTAXES, write_enhanced, write_series

PYDICOM = Path(pydicom.__file__).parent / "data" / "test_files"
RULES = Rules(modalities=())
ONE_OF_ANY_TYPE = Rules(modalities=(), image_types=(), min_slices=1)
# An oblique grid; columns are perpendicular.
AFFINE = np.eye(4)
AFFINE[:3, :3] = np.linalg.qr(np.array([[-1.0, 0.2, 0.1], [0.1, 0.9, -0.3], [0.2, 0.3, 1.0]]))[0] * [0.7, 0.8, 3.0]
AFFINE[:3, 3] = 10, -20, 30


def voxels(shape: tuple[int, int, int] = (12, 10, 11), low: int = -1000) -> np.ndarray:
    return np.random.default_rng(0).integers(low, 2000, shape).astype(np.int16)


def read(files: Sequence[Path], rules: Rules = RULES, **source: Any) -> list[Volume]:
    return read_scan(ScanSource("scan", "dicom", tuple(files), **source), rules)


def assert_refused(files: Sequence[Path], rule: str, reason: str, rules: Rules = RULES, **source: Any) -> None:
    with pytest.raises(ScanError, match=reason) as caught:
        read(files, rules, **source)
    assert caught.value.rule == rule
    assert str(caught.value).startswith(tuple(f"{file}: " for file in files))


def edit(file: Path, change: Callable[[Any], object]) -> None:
    data = pydicom.dcmread(file)
    change(data)
    data.save_as(file)


def same_volume(volume: Volume, array: np.ndarray, affine: np.ndarray) -> bool:
    """Equal as images: the stack may run the other way."""
    for candidate in (volume.array, volume.array[:, :, ::-1]):
        if np.array_equal(candidate, array):
            flip = np.eye(4)
            if candidate is not volume.array:
                flip[2, 2], flip[2, 3] = -1, array.shape[2] - 1
            return np.allclose(volume.affine @ flip, affine, atol=1e-6)
    return False


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_voxels_and_places_come_back(syntax: str, unsigned: bool, tmp_path: Path) -> None:
    array = voxels(low=0).astype(np.uint16) * 16 if unsigned else voxels()
    files = write_series(tmp_path, array, AFFINE, transfer_syntax=syntax, description="T1", modality="MR")
    (volume,) = read(files)
    assert same_volume(volume, array, AFFINE)
    assert (volume.modality, volume.description, volume.part, volume.path) == ("MR", "T1", "", files[0])


def test_order_is_that_of_places(tmp_path: Path) -> None:
    array = voxels()
    (want,) = read(write_series(tmp_path / "a", array, AFFINE))
    (reverse,) = read(write_series(tmp_path / "b", array, AFFINE, reverse=True))
    files = write_series(tmp_path / "c", array, AFFINE)
    names = np.random.default_rng(1).permutation(len(files))
    for file, name in zip(files, names, strict=True):
        edit(file, lambda data, name=name: setattr(data, "InstanceNumber", int(name)))
        file.rename(file.with_name(f"x{name}.dcm"))
    (shuffled,) = read(sorted((tmp_path / "c").iterdir()))
    for volume in (reverse, shuffled):
        np.testing.assert_array_equal(volume.array, want.array)
        np.testing.assert_allclose(volume.affine, want.affine, atol=1e-6)


def test_intensities_are_rescaled_in_the_smallest_type(tmp_path: Path) -> None:
    for slope, intercept, kind in [(1, -24, np.int16), (1, -32000, np.int32), (0.5, 3, np.float32)]:
        files = write_series(tmp_path / str(intercept), voxels(), AFFINE, slope=slope, intercept=intercept)
        (volume,) = read(files)
        assert volume.array.dtype == kind
        assert same_volume(volume, voxels() * np.float32(slope) + intercept, AFFINE)


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    slopes, intercepts = np.linspace(1, 2, 11), np.arange(11)
    (volume,) = read(write_series(tmp_path, voxels(), AFFINE, slope=slopes, intercept=intercepts))
    want = voxels() * slopes + intercepts
    got = volume.array if np.allclose(volume.array, want, rtol=1e-6) else volume.array[:, :, ::-1]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("syntax", ["explicit", "rle", "jpeg2000", "jpeg_lossless"])
@pytest.mark.parametrize("slope", [1.0, 2.0])
def test_a_ct_in_hounsfield_units_is_not_rescaled_again(syntax: str, slope: float, tmp_path: Path) -> None:
    """A head with air of one exact value; its header asks for what has been done."""
    x, y, z = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in (40, 36, 11)], indexing="ij")
    r = x**2 + y**2 + z**2
    head = np.select([r < 0.93, r < 1], [30 + 40 * (x > 0), 900], -1000).astype(np.int16)
    options = {"modality": "CT", "transfer_syntax": syntax, "slope": slope, "intercept": -1024}
    rules = Rules(modalities=("CT",), hounsfield=True)
    (volume,) = read(write_series(tmp_path / "twice", head, AFFINE, **options), rules)
    assert same_volume(volume, head, AFFINE)
    stored = ((head.astype(float) + 1024) / slope).round().astype(np.int16)
    (volume,) = read(write_series(tmp_path / "once", stored, AFFINE, **options), rules)
    assert same_volume(volume, stored * slope - 1024, AFFINE)


def test_a_ct_of_slices_with_their_own_rescale(tmp_path: Path) -> None:
    """It is Hounsfield units already, or not, as a whole."""
    x, y, z = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in (40, 36, 11)], indexing="ij")
    r = x**2 + y**2 + z**2
    head = np.select([r < 0.93, r < 1], [30 + 40 * (x > 0), 900], -1000).astype(np.int16)
    slopes = np.linspace(0.5, 1, 11)
    options, rules = {"modality": "CT", "slope": slopes, "intercept": -1024}, Rules(modalities=("CT",), hounsfield=True)
    stored = ((head.astype(float) + 1024) / slopes).round().astype(np.int16)
    (volume,) = read(write_series(tmp_path / "once", stored, AFFINE, **options), rules)
    assert same_volume(volume, (stored * slopes - 1024).astype(np.float32), AFFINE)
    (volume,) = read(write_series(tmp_path / "twice", head, AFFINE, **options), rules)
    assert same_volume(volume, head, AFFINE)


@pytest.mark.parametrize("syntax", ["explicit", "big_endian", "rle", "jpeg2000", "jpeg_lossless"])
def test_frames_of_one_file_are_slices(syntax: str, tmp_path: Path) -> None:
    order = [3, 2, 1, 0, 4, 6, 5]
    array = voxels((12, 10, 7))
    file = write_enhanced(
        tmp_path / "a.dcm", array, AFFINE, order=order, transfer_syntax=syntax, slope=0.5, intercept=-7
    )
    (volume,) = read([file])
    assert same_volume(volume, array * np.float32(0.5) - 7, AFFINE)


def test_frames_without_places_are_refused(tmp_path: Path) -> None:
    file = write_enhanced(tmp_path / "a.dcm", voxels(), AFFINE)
    edit(file, lambda data: data.PerFrameFunctionalGroupsSequence.pop())
    assert_refused([file], "unreadable", "11 frames with places for 10")
    edit(file, lambda data: data.pop("PerFrameFunctionalGroupsSequence"))
    assert_refused([file], "unreadable", "11 frames without a place for each")


@pytest.mark.parametrize("syntax", ["explicit", "rle", "jpeg2000", "jpeg_lossless"])
def test_a_slice_sent_twice_counts_once(syntax: str, tmp_path: Path) -> None:
    array = voxels((320, 300, 11))  # so large that memory which is freed is given away
    files = write_series(tmp_path, array, AFFINE, transfer_syntax=syntax)
    shutil.copy(files[3], tmp_path / "again.dcm")
    shutil.copy(files[5], tmp_path / "new_uid.dcm")
    edit(tmp_path / "new_uid.dcm", lambda data: setattr(data, "SOPInstanceUID", generate_uid()))
    (volume,) = read(sorted(tmp_path.iterdir()))
    assert same_volume(volume, array, AFFINE)


def test_two_slices_at_one_place_are_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path, voxels(), AFFINE)
    shutil.copy(files[3], tmp_path / "other.dcm")

    def change(data: Any) -> None:
        data.SOPInstanceUID, data.PixelData = generate_uid(), data.PixelData[::-1]

    edit(tmp_path / "other.dcm", change)
    assert_refused(sorted(tmp_path.iterdir()), "duplicate_slices", "from 1 to 2 slices at one place")


def test_four_dimensions_by_rule(tmp_path: Path) -> None:
    uid, parts = generate_uid(), [voxels(), voxels() // 2, voxels() // 3]
    files = []
    for t, part in enumerate(parts):
        files += write_series(tmp_path / str(t), part, AFFINE, series_uid=uid, AcquisitionNumber=t + 1)
    assert_refused(files, "four_d", "expected one 3D volume, got 3")
    volumes = read(files, Rules(modalities=(), four_d="split"))
    assert [volume.part for volume in volumes] == ["t0", "t1", "t2"]
    for volume, part in zip(volumes, parts, strict=True):
        assert same_volume(volume, part, AFFINE)
    (first,) = read(files, Rules(modalities=(), four_d="first"))
    assert (first.part, same_volume(first, parts[0], AFFINE)) == ("", True)
    assert_refused(files, "four_d", "got 3", Rules(modalities=(), four_d="split", max_parts=2))


def test_missing_slices_by_rule(tmp_path: Path) -> None:
    files = write_series(tmp_path, voxels(), AFFINE, missing=[4])
    (volume,) = read(files)
    between = np.rint((voxels()[:, :, 3].astype(float) + voxels()[:, :, 5]) / 2)
    want = voxels()
    want[:, :, 4] = between
    assert same_volume(volume, want, AFFINE)
    assert_refused(files, "missing_slices", "1 of 11 slices are missing", Rules(modalities=(), max_missing=0.05))
    files = write_series(tmp_path / "more", voxels(), AFFINE, missing=[2, 5])
    assert_refused(files, "missing_slices", "2 of 11 slices are missing")
    assert len(read(files, Rules(modalities=(), max_missing=0.2))) == 1


@pytest.mark.parametrize(("shift", "good"), [(0.05, True), (0.4, False)])
def test_slices_must_be_even(shift: float, good: bool, tmp_path: Path) -> None:
    files = write_series(tmp_path, voxels(), np.diag([0.7, 0.8, 3.0, 1.0]))

    def move(data: Any) -> None:
        x, y, z = data.ImagePositionPatient
        data.ImagePositionPatient = [x, y, z + 3 * shift]

    edit(files[4], move)
    if good:
        assert len(read(files)) == 1
    else:
        assert_refused(files, "uneven_slices", "uneven slices: from 1.8")


def test_a_scout_within_a_series_is_left_out(tmp_path: Path) -> None:
    uid = generate_uid()
    files = write_series(tmp_path / "a", voxels(), AFFINE, series_uid=uid)
    turned = AFFINE[:, [1, 2, 0, 3]]
    scout = write_series(tmp_path / "b", voxels((12, 10, 2)), turned, series_uid=uid)
    (volume,) = read([*scout, *files])
    assert same_volume(volume, voxels(), AFFINE)
    other = write_series(tmp_path / "c", voxels((12, 10, 8)), turned, series_uid=uid)
    assert_refused([*files, *other], "mixed_orientations", "2 orientations or sizes in one series")
    assert_refused([*scout, *files[:3]], "few_slices", "2 and 3 slices, expected at least 5")


def test_few_slices(tmp_path: Path) -> None:
    files = write_series(tmp_path, voxels((12, 10, 5)), AFFINE)
    assert len(read(files)) == 1
    assert_refused(files[:4], "few_slices", "4 slices, expected at least 5")
    (volume,) = read(files[:1], Rules(modalities=(), min_slices=1))
    assert volume.array.shape == (12, 10, 1)


@pytest.mark.parametrize(("degrees", "good"), [(20, True), (40, False)])
def test_gantry_tilt(degrees: float, good: bool, tmp_path: Path) -> None:
    affine = np.diag([0.7, 0.8, 3.0, 1.0])
    affine[1, 2] = 3 * np.tan(np.deg2rad(degrees))
    files = write_series(tmp_path, voxels(), affine)
    if good:
        (volume,) = read(files)
        assert same_volume(volume, voxels(), affine)
    else:
        assert_refused(files, "sheared", "cosine 0.64")


@pytest.mark.parametrize(
    ("image_type", "rule"),
    [
        (("ORIGINAL", "PRIMARY", "AXIAL"), None),
        (("DERIVED", "PRIMARY", "DIFFUSION", "ADC"), None),
        (("ORIGINAL", "PRIMARY", "LOCALIZER"), "localiser"),
        (("DERIVED", "SECONDARY", "MPR"), "derived"),
    ],
)
def test_image_types(image_type: tuple[str, ...], rule: str | None, tmp_path: Path) -> None:
    files = write_series(tmp_path, voxels(), AFFINE, image_type=image_type)
    if rule is None:
        assert len(read(files)) == 1
    else:
        assert_refused(files, rule, "image type")
        assert len(read(files, Rules(modalities=(), image_types=()))) == 1


def test_modality(tmp_path: Path) -> None:
    files = write_series(tmp_path, voxels(), AFFINE, modality="PT")
    assert_refused(files, "modality", "modality PT, expected MR", Rules())
    assert len(read(files, Rules(modalities=("MR", "PT")))) == 1


def test_headers_that_ask_to_rescale_twice(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 40)
    body = np.hypot.outer(x, x)[:, :, None] < 0.7
    noise = np.random.default_rng(0).normal(0, 10, (40, 40, 8))
    hounsfield = (np.where(body, 40, -1000) + noise).astype(np.int16)
    rules = Rules(modalities=("CT",), hounsfield=True)
    for intercept in (-1024, -8192):
        files = write_series(tmp_path / f"{intercept}", hounsfield, AFFINE, modality="CT", intercept=intercept)
        (volume,) = read(files, rules)
        assert same_volume(volume, hounsfield, AFFINE)
    files = write_series(tmp_path / "stored", hounsfield + 1024, AFFINE, modality="CT", intercept=-1024)
    (volume,) = read(files, rules)
    assert same_volume(volume, hounsfield, AFFINE)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def deflate(file: Path) -> None:
    data = pydicom.dcmread(file)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(file)


def set_to(**values: object) -> Callable[[Path], None]:
    def change(data: Any) -> None:
        for keyword, value in values.items():
            if value is None:
                del data[keyword]
            else:
                setattr(data, keyword, value)

    return lambda file: edit(file, change)


@pytest.mark.parametrize(
    ("damage", "rule", "reason"),
    [
        (cut, "unreadable", "truncated or corrupt pixels"),
        (deflate, "unreadable", "deflated"),
        (lambda file: file.write_bytes(b""), "unreadable", "empty file"),
        (lambda file: file.write_text("name,age\n" * 100), "unreadable", "not a DICOM file"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "unreadable", "corrupt|damaged|MONO|grey"),
        (lambda file: file.unlink(), "missing", "no such file"),
        (set_to(PixelData=None), "unreadable", "pixels"),
        (set_to(Rows=11), "unreadable", "pixels|slices"),
        (set_to(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "not_grey", "one grey value"),
        (set_to(ImagePositionPatient=None), "localiser", "no ImagePositionPatient"),
        (set_to(ImageOrientationPatient=None), "localiser", "no ImageOrientationPatient"),
        (set_to(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "sheared", "same way"),
        (set_to(ImagePositionPatient=[0, 0]), "unreadable", "damaged header"),
        (set_to(PixelSpacing=None), "spacing", "no PixelSpacing"),
        (set_to(SeriesInstanceUID="1.2.3"), "unreadable", "of another series"),
        (set_to(Modality="SR"), "modality", "modality SR"),
    ],
)
def test_damaged_files_are_named(damage: Callable[[Path], Any], rule: str, reason: str, tmp_path: Path) -> None:
    files = write_series(tmp_path, voxels((12, 10, 6)), AFFINE)
    rules = Rules(min_slices=6)
    assert len(read(files, rules)) == 1
    damage(files[2])
    if reason == "pixels|slices":  # one of six has another size
        rule, reason = "few_slices", "5 and 1 slices"
    assert_refused(files, rule, reason, rules)


@pytest.mark.parametrize("between", [0.0, -1.0, 200.0])
def test_absurd_pixel_spacing(between: float, tmp_path: Path) -> None:
    files = write_series(tmp_path, voxels((12, 10, 6)), AFFINE)
    for file in files:
        set_to(PixelSpacing=[between, 0.7])(file)
    assert_refused(files, "spacing", "voxel size" if between > 0 else "PixelSpacing")


def test_constant_pixels(tmp_path: Path) -> None:
    files = write_series(tmp_path, np.full((12, 10, 6), 7), AFFINE)
    assert_refused(files, "constant", "every voxel is 7")


def test_too_large(tmp_path: Path) -> None:
    files = write_series(tmp_path, voxels((12, 10, 6)), AFFINE)
    assert len(read(files, Rules(max_voxels=720))) == 1
    assert_refused(files, "too_large", "more than 719 voxels", Rules(max_voxels=719))


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm"])
def test_real_slices(name: str) -> None:
    file = PYDICOM / name
    (volume,) = read([file], ONE_OF_ANY_TYPE)
    data = pydicom.dcmread(file)
    want = data.pixel_array.T.astype(float) * data.get("RescaleSlope", 1) + data.get("RescaleIntercept", 0)
    np.testing.assert_array_equal(volume.array[:, :, 0], want)


def test_real_jpeg_ls() -> None:
    (got,) = read([PYDICOM / "MR_small_jpeg_ls_lossless.dcm"], ONE_OF_ANY_TYPE)
    (want,) = read([PYDICOM / "MR_small.dcm"], ONE_OF_ANY_TYPE)
    np.testing.assert_array_equal(got.array, want.array)


@pytest.mark.parametrize("name", ["rtplan.dcm", "reportsi.dcm", "examples_rgb_color.dcm", "waveform_ecg.dcm"])
def test_real_files_that_are_no_scans(name: str) -> None:
    with pytest.raises(ScanError, match=re.escape(name)):
        read([PYDICOM / name])
