"""NIfTI and tensors in: real files as they are; what cannot be used raises an error that names file and reason."""

from __future__ import annotations

import gzip
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dipy
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from hlip.read.nifti import read_nifti
from hlip.read.readers import read_scan
from hlip.read.rules import Rules
from hlip.read.scan import ScanError, ScanSource, Volume

nibabel = pytest.importorskip("nibabel")
NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"
EXTENSIONS = (".nii", ".nii.gz")


def voxels(shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(0).integers(-500, 500, shape).astype(np.int16)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def patched(path: Path, offset: int, layout: str, *values: object) -> Path:
    """A good file with some bytes of its header replaced (offsets: the NIfTI-1 standard)."""
    content = bytearray(save(path, voxels()).read_bytes())
    struct.pack_into("<" + layout, content, offset, *values)
    path.write_bytes(content)
    return path


def nilearn_file(name: str) -> Path:
    datasets = pytest.importorskip("nilearn.datasets")
    return Path(datasets.__file__).parent / "data" / name


def assert_refused(path: Path, reason: str) -> None:
    with pytest.raises(ScanError, match=reason) as caught:
        read_nifti(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.path == str(path)


def test_reads_the_mni_template() -> None:
    path = nilearn_file("mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    volume = read_nifti(path)
    assert volume.array.shape == (197, 233, 189)
    assert volume.array.dtype == np.uint8
    assert (volume.array.min(), volume.array.max()) == (0, 255)
    assert volume.affine.dtype == np.float64
    assert volume.affine.tolist() == [[1, 0, 0, -98], [0, 1, 0, -134], [0, 0, 1, -72], [0, 0, 0, 1]]
    assert volume.path == path
    center = np.rint(np.linalg.inv(volume.affine) @ [0, -18, 6, 1]).astype(int)[:3]
    assert volume.array[tuple(center)] > 0  # mm of the standard space: inside the brain


def test_reads_a_statistic_map() -> None:
    volume = read_nifti(nilearn_file("image_10426.nii.gz"))
    assert volume.array.shape == (53, 63, 46)
    assert np.diag(volume.affine).tolist() == [-3, 3, 3, 1]
    assert volume.array.min() < 0 < volume.array.max()


def test_reads_scaled_integers_as_intensities() -> None:
    volume = read_nifti(NIBABEL / "anatomical.nii")
    expected = nibabel.load(NIBABEL / "anatomical.nii").get_fdata()
    assert volume.array.shape == (33, 41, 25)
    np.testing.assert_array_equal(volume.array, expected.astype(np.float32))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_applies_slope_and_intercept(tmp_path: Path, extension: str) -> None:
    image = nibabel.Nifti1Image(voxels(), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    path = tmp_path / f"scaled{extension}"
    nibabel.save(image, path)
    stored = nibabel.load(path).dataobj.get_unscaled()
    np.testing.assert_array_equal(read_nifti(path).array, stored.astype(np.float32) * 0.5 + 10)
    assert read_nifti(str(path)).path == path


@pytest.mark.parametrize("name", ["example4d.nii.gz", "example_nifti2.nii.gz", "functional.nii"])
def test_refuses_real_4d_files(name: str) -> None:
    assert_refused(NIBABEL / name, "expected one 3D volume, got 4D")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test.mgz", "wrong size of the header"),
        ("analyze.hdr", "not a NIfTI image but "),
        ("row_major.dconn.nii", "not a NIfTI image but "),
    ],
)
def test_refuses_real_files_of_other_formats(name: str, reason: str) -> None:
    assert_refused(NIBABEL / name, reason)


def test_refuses_a_header_without_its_image() -> None:
    assert_refused(NIBABEL / "nifti1.hdr", r"truncated or corrupt .*nifti1\.img")


@pytest.mark.parametrize("extra", [(1,), (1, 1)])
def test_accepts_trailing_singleton_axes(tmp_path: Path, extra: tuple[int, ...]) -> None:
    array = voxels()
    path = save(tmp_path / "scan.nii.gz", array.reshape(*array.shape, *extra))
    np.testing.assert_array_equal(read_nifti(path).array, array)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1, 7), (5, 6, 7, 2)])
def test_refuses_other_numbers_of_axes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert_refused(save(tmp_path / "scan.nii", voxels(shape)), f"expected one 3D volume, got {len(shape)}D")


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.nii.gz", "no such file")


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"a", "not a readable NIfTI file"),
        (b"patient,age\n1,50\n" * 100, "not a readable NIfTI file"),
        (bytes(4096), "not a readable NIfTI file"),
        (gzip.compress(b""), "not a readable NIfTI file"),
    ],
    ids=["empty", "short", "text", "zeros", "gzip of nothing"],
)
def test_refuses_what_is_not_nifti(tmp_path: Path, extension: str, content: bytes, reason: str) -> None:
    path = tmp_path / f"scan{extension}"
    path.write_bytes(content)
    assert_refused(path, reason)


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("left", [0.5, 0.9])
def test_refuses_truncated_voxels(tmp_path: Path, extension: str, left: float) -> None:
    path = save(tmp_path / f"scan{extension}", voxels((20, 21, 22)))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])
    assert_refused(path, "truncated or corrupt")


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("left", [1, 20, 200])
def test_refuses_truncated_headers(tmp_path: Path, extension: str, left: int) -> None:
    path = save(tmp_path / f"scan{extension}", voxels())
    path.write_bytes(path.read_bytes()[:left])
    whole = (left, extension) == (200, ".nii.gz")  # of the header
    assert_refused(path, "truncated or corrupt" if whole else "not a readable NIfTI file")


@pytest.mark.parametrize(
    ("offset", "layout", "values"),
    [
        (70, "h", (999,)),  # datatype: no such code
        (70, "h", (1,)),  # datatype: bits
        (108, "f", (10.0,)),  # vox_offset: within the header
        (108, "f", (float("nan"),)),
        (108, "f", (float("inf"),)),
        (108, "f", (1e19,)),
        (0, "i", (349,)),  # sizeof_hdr
        (108, "f", (1e6,)),  # beyond the file's end
        (112, "2f", (2.0, float("nan"))),  # slope and intercept
        (40, "h", (9,)),  # number of axes
        (344, "4s", (b"bad\0",)),  # magic
    ],
)
def test_refuses_corrupt_headers(tmp_path: Path, offset: int, layout: str, values: tuple) -> None:
    assert_refused(patched(tmp_path / "scan.nii", offset, layout, *values), "truncated or corrupt|not a readable")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((32767, 32767, 32767), r"shape \(32767, 32767, 32767\) has more than \d+ voxels"),
        ((200, 200, 200), "truncated or corrupt"),
        ((0, 6, 7), "an axis has no voxels"),
        ((-5, -6, 7), "an axis has no voxels"),
    ],
)
def test_refuses_shapes_that_cannot_be(tmp_path: Path, shape: tuple[int, ...], reason: str) -> None:
    assert_refused(patched(tmp_path / "scan.nii", 40, "8h", 3, *shape, 1, 1, 1, 1), reason)


def zero_column(affine: np.ndarray) -> None:
    affine[:3, 1] = 0


def not_a_number(affine: np.ndarray) -> None:
    affine[0, 3] = np.nan


def shear(affine: np.ndarray) -> None:
    affine[0, 1] = 1.0


@pytest.mark.parametrize(
    ("break_affine", "reason"),
    [(zero_column, "voxel size"), (not_a_number, "voxel size"), (shear, "sheared axes")],
)
def test_refuses_unusable_axes(tmp_path: Path, break_affine: Callable[[np.ndarray], None], reason: str) -> None:
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    break_affine(affine)
    # Offset 280: the affine's three rows, which writers refuse to set to these values.
    assert_refused(patched(tmp_path / "scan.nii", 280, "12f", *affine[:3].ravel()), reason)


def test_accepts_shear_from_rounding(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.005
    path = patched(tmp_path / "scan.nii", 280, "12f", *affine[:3].ravel())
    np.testing.assert_allclose(read_nifti(path).affine, affine, rtol=1e-6)


def rgb() -> np.ndarray:
    array = np.zeros((5, 6, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    array["R"] = voxels() % 256
    return array


@pytest.mark.parametrize("array", [rgb(), voxels().astype(np.complex64)], ids=["rgb", "complex"])
def test_refuses_voxels_that_are_not_one_number(tmp_path: Path, array: np.ndarray) -> None:
    assert_refused(save(tmp_path / "scan.nii.gz", array), "expected one number a voxel")


@pytest.mark.parametrize(
    ("value", "reason"),
    [(np.nan, "no finite voxel"), (-np.inf, "no finite voxel"), (3.0, "constant: every voxel is 3")],
)
def test_refuses_volumes_without_content(tmp_path: Path, value: float, reason: str) -> None:
    assert_refused(save(tmp_path / "scan.nii", np.full((5, 6, 7), value, dtype=np.float32)), reason)


def test_refuses_one_finite_value_among_others(tmp_path: Path) -> None:
    array = np.full((5, 6, 7), 3, dtype=np.float32)
    array[0] = np.nan
    assert_refused(save(tmp_path / "scan.nii", array), "constant: every voxel is 3")


def test_replaces_voxels_that_are_not_finite(tmp_path: Path) -> None:
    array = voxels((8, 6, 7)).astype(np.float32)
    expected = array.copy()
    for x, value in enumerate([np.nan, np.inf, -np.inf]):
        array[x] = value
    expected[:3] = expected[3:].min()
    np.testing.assert_array_equal(read_nifti(save(tmp_path / "scan.nii", array)).array, expected)


def test_readers_load_their_libraries_when_they_read() -> None:
    lines = (
        "import importlib, pkgutil, sys, hlip.read",
        "[importlib.import_module(f'hlip.read.{module.name}') for module in pkgutil.iter_modules(hlip.read.__path__)]",
        "assert not {'nibabel', 'pydicom', 'SimpleITK'} & set(sys.modules), sys.modules.keys()",
    )
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ScanError(Path("a.nii"), "broken")))
    assert isinstance(error, ScanError)
    assert (str(error), error.path, error.reason) == ("a.nii: broken", "a.nii", "broken")


def test_volume_cannot_be_reassigned(tmp_path: Path) -> None:
    volume = read_nifti(save(tmp_path / "scan.nii", voxels()))
    assert isinstance(volume, Volume)
    with pytest.raises(AttributeError):
        volume.array = np.zeros(3)  # type: ignore[misc]


def test_sheared_axes_are_read_as_nibabel_has_them() -> None:
    """A real header that SimpleITK refuses."""
    path = Path(dipy.__file__).parent / "data" / "files" / "S0_10slices.nii.gz"
    volume, image = read_nifti(path), nibabel.load(path)
    np.testing.assert_array_equal(volume.array, np.asarray(image.dataobj)[..., 0])
    np.testing.assert_array_equal(volume.affine, image.affine)


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("kind", [">i2", ">f4", "<i8", ">f8", "<u2", "<i4", "i1"])
def test_every_stored_type_is_read(tmp_path: Path, kind: str, extension: str) -> None:
    array = (voxels() % 100).astype(kind)
    image = nibabel.Nifti1Image(array, np.eye(4), nibabel.Nifti1Header(endianness=kind[0] if kind[0] in "<>" else "<"))
    image.set_data_dtype(array.dtype)
    nibabel.save(image, tmp_path / f"scan{extension}")
    got = read_nifti(tmp_path / f"scan{extension}").array
    assert got.dtype == (np.float32 if array.dtype.itemsize > 4 else array.dtype.newbyteorder("="))
    np.testing.assert_array_equal(got, array)


def test_a_pair_of_files(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(voxels(), np.eye(4)), tmp_path / "scan.hdr")
    np.testing.assert_array_equal(read_nifti(tmp_path / "scan.hdr").array, voxels())
    (tmp_path / "scan.img").unlink()
    assert_refused(tmp_path / "scan.hdr", "truncated or corrupt|not a readable")


def test_gzip_members_and_padding(tmp_path: Path) -> None:
    content = save(tmp_path / "scan.nii", voxels()).read_bytes()
    path = tmp_path / "scan.nii.gz"
    for raw in (
        gzip.compress(content[:100]) + gzip.compress(content[100:]),
        gzip.compress(content) + bytes(512),
        gzip.compress(content + bytes(1000)),
    ):
        path.write_bytes(raw)
        np.testing.assert_array_equal(read_nifti(path).array, voxels())


def test_refuses_other_compression_and_folders(tmp_path: Path) -> None:
    save(tmp_path / "scan.nii.bz2", voxels())
    assert_refused(tmp_path / "scan.nii.bz2", "not a readable NIfTI file")
    (tmp_path / "folder.nii").mkdir()
    assert_refused(tmp_path / "folder.nii", "not a regular file")


def test_refuses_a_wrong_checksum(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", voxels((20, 21, 22)))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    assert_refused(path, "truncated or corrupt .*incorrect data check")


def test_refuses_a_gzip_bomb(tmp_path: Path) -> None:
    """A small header before much more than it says; and a header that says more than any volume holds."""
    content = save(tmp_path / "scan.nii", voxels()).read_bytes()
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(content + bytes(2**26)))
    assert path.stat().st_size < 2**17
    assert_refused(path, "more data than its header says")
    huge = bytearray(content)
    struct.pack_into("<8h", huge, 40, 3, 2000, 2000, 2000, 1, 1, 1, 1)
    path.write_bytes(gzip.compress(bytes(huge) + bytes(2**26)))
    assert_refused(path, r"shape \(2000, 2000, 2000\) has more than")
    extended = bytearray(content[:352])
    struct.pack_into("<f", extended, 108, 2.0**31)
    path.write_bytes(gzip.compress(bytes(extended[:348]) + struct.pack("<4B2i", 1, 0, 0, 0, 2**31 - 16, 6)))
    assert_refused(path, r"its voxels begin at byte 2.14748e\+09")


def read_tensor(path: Path, content: object, rules: Rules | None = None) -> Volume:
    torch.save(content, path)
    (volume,) = read_scan(ScanSource("scan", "tensor", (path,)), rules or Rules())
    return volume


def test_released_tensors(tmp_path: Path) -> None:
    scan = torch.randint(0, 256, (6, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for tensor in (scan, scan[..., None], scan.float() / 255, (scan / 255).half()):
        volume = read_tensor(tmp_path / "scan.pt", tensor)
        assert volume.prepared
        assert volume.array.dtype == np.uint8
        assert np.array_equal(volume.array.transpose(2, 1, 0), scan.numpy())
    units = scan.float() * 10 - 1000
    volume = read_tensor(tmp_path / "hu.pt", units)
    assert volume.prepared
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array.transpose(2, 1, 0), units.numpy())
    torch.save(scan, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (volume,) = read_scan(ScanSource("scan", "tensor", (tmp_path / "old.pt",)), Rules())
    assert np.array_equal(volume.array.transpose(2, 1, 0), scan.numpy())


class Code:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Code(), "not a readable tensor"),
        ({"scan": torch.zeros(2, 2, 2)}, "expected a dense tensor, got dict"),
        (torch.zeros(2, 2), "expected a tensor"),
        (torch.zeros(2, 2, 2, 3), "expected a tensor"),
        (torch.zeros(6, 8, 10), "constant"),
        (torch.full((6, 8, 10), torch.nan), "no finite voxel"),
        (torch.zeros(6, 8, 10, dtype=torch.complex64), "one number a voxel"),
        (torch.zeros(1).expand(2**12, 2**12, 2**12), "larger than its data"),
        (torch.eye(4).to_sparse(), "more than weights, torch._utils._rebuild_sparse_tensor"),
        (torch.zeros(0, 2, 2), "an axis has no voxels"),
    ],
)
def test_refuses_other_tensors(content: object, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScanError, match=reason):
        read_tensor(tmp_path / "scan.pt", content)
    assert not (tmp_path / "executed").exists()


def test_refuses_a_damaged_tensor(tmp_path: Path) -> None:
    path = tmp_path / "scan.pt"
    torch.save(torch.arange(480).reshape(6, 8, 10), path)
    for content in (path.read_bytes()[:-300], b"x" * 1000, b""):
        path.write_bytes(content)
        with pytest.raises(ScanError, match=r"scan.pt: (not a readable tensor|empty file)"):
            read_scan(ScanSource("scan", "tensor", (path,)), Rules())


@pytest.mark.parametrize("qform", range(5))
@pytest.mark.parametrize("sform", range(5))
def test_of_two_orientations_that_is_taken_which_itk_takes(qform: int, sform: int, tmp_path: Path) -> None:
    turned = np.array([[0, -1.5, 0, 5], [2.0, 0, 0, 6], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), None)
    image.header.set_zooms((2.0, 1.5, 3.0))
    image.header.set_qform(np.diag([2.0, 1.5, 3.0, 1.0]), qform)
    image.header.set_sform(turned, sform)
    nibabel.save(image, tmp_path / "x.nii")
    seen = sitk.ReadImage(str(tmp_path / "x.nii"))
    directions = np.diag([-1, -1, 1]) @ np.array(seen.GetDirection()).reshape(3, 3) @ np.diag(seen.GetSpacing())
    np.testing.assert_allclose(read_nifti(tmp_path / "x.nii").affine[:3, :3], directions, atol=1e-5)
