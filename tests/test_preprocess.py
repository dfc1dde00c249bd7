"""From volume to scan: orientation against volumes filled voxel by voxel, intensities against integer arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hlip.prepare.grid import through_plane_first
from hlip.prepare.recipe import Recipe
from hlip.read.nifti import read_nifti
from hlip.read.rules import Rules
from hlip.read.scan import ScanError, Volume
from preprocess_cases import DIRECTIONS, PLANES, SPACINGS, anatomy, axial, nibabel, store

STORAGE_ORDERS = list(itertools.product(itertools.permutations(range(3)), itertools.product([False, True], repeat=3)))


def oriented(volume: Volume) -> np.ndarray:
    return through_plane_first(volume)[0]


def recipe(*settings: object, **more: object) -> Callable[[Volume], torch.Tensor]:
    """What a recipe for volumes of any number of slices makes of one."""
    made = Recipe(*settings, rules=Rules(min_slices=1), **more)  # type: ignore[arg-type]

    def prepare(volume: Volume) -> torch.Tensor:
        (scan,) = made(volume)
        return scan.image

    return prepare


def expected(plane: str) -> np.ndarray:
    world, (depth, row, column) = anatomy(), PLANES[plane]
    scan = np.empty([world.shape[axis] for axis in (depth, row, column)], dtype=np.float32)
    for index in np.ndindex(*scan.shape):
        place = [0, 0, 0]
        for axis, step in zip((depth, row, column), index, strict=True):
            place[axis] = step
        scan[index] = world[tuple(place)]
    return scan


@pytest.mark.parametrize("name", SPACINGS)
def test_orientation_does_not_depend_on_storage(name: str) -> None:
    want = expected("axial" if name == "isotropic" else name)
    assert len(STORAGE_ORDERS) == 48
    for order, reverse in STORAGE_ORDERS:
        got = oriented(store(order, reverse, SPACINGS[name]))
        np.testing.assert_array_equal(got, want, err_msg=f"stored along {order}, reversed {reverse}")


@pytest.mark.parametrize("name", SPACINGS)
def test_orientation_of_an_oblique_head(name: str) -> None:
    want = expected("axial" if name == "isotropic" else name)
    for turn in (-0.5, 0.3):
        volume = store((1, 2, 0), (True, False, True), SPACINGS[name], turn)
        np.testing.assert_array_equal(oriented(volume), want)


def test_rounding_of_a_header_does_not_choose_the_plane() -> None:
    volume = store((0, 1, 2), (False, False, False), (1.00001, 1.00002, 1.0))
    np.testing.assert_array_equal(oriented(volume), expected("axial"))


@pytest.mark.parametrize(
    ("plane", "directions"),
    [
        ("axial", ("inferior", "posterior", "right")),
        ("coronal", ("posterior", "inferior", "right")),
        ("sagittal", ("right", "inferior", "posterior")),
    ],
)
def test_a_marker_lies_where_it_should(plane: str, directions: tuple[str, ...]) -> None:
    away = {"right": DIRECTIONS[0], "posterior": DIRECTIONS[1], "inferior": DIRECTIONS[2]}
    spacing = np.array(SPACINGS[plane])
    for axis, direction in enumerate(directions):
        array = np.zeros((5, 5, 5), dtype=np.float32)
        marker = 2 + 2 * away[direction]  # of a volume stored to the right, anterior, superior
        array[tuple(marker.astype(int))] = 1
        scan = oriented(Volume(array, np.diag([*spacing, 1]), Path("scan.nii")))
        want = [2, 2, 2]
        want[axis] = 4
        assert np.argwhere(scan).tolist() == [want], direction


@pytest.mark.parametrize("plane", PLANES)
def test_orientation_agrees_with_simpleitk(plane: str, tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    datasets = pytest.importorskip("nilearn.datasets")
    source = Path(datasets.__file__).parent / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    step = [6 if axis == PLANES[plane][0] else 3 for axis in range(3)]
    template = nibabel.load(source).slicer[:: step[0], :: step[1], :: step[2]]
    turn = np.array([[np.cos(0.2), -np.sin(0.2), 0, 3], [np.sin(0.2), np.cos(0.2), 0, -4], [0, 0, 1, 5], [0, 0, 0, 1]])
    array, affine = np.asarray(template.dataobj), turn @ template.affine
    stored = array.transpose(1, 2, 0)[::-1, :, ::-1]
    # x runs along the last storage axis, from its end; y along the first, from its end; z along the second.
    to_source = np.zeros((4, 4))
    to_source[1, 0], to_source[2, 1], to_source[0, 2], to_source[3, 3] = -1, 1, -1, 1
    to_source[:2, 3] = array.shape[0] - 1, array.shape[1] - 1
    image = nibabel.Nifti1Image(np.ascontiguousarray(stored), affine @ to_source)
    image.set_qform(image.affine, code=1)
    path = tmp_path / "scan.nii.gz"
    nibabel.save(image, path)

    inferior_posterior_right = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "RPI"))
    want = inferior_posterior_right.transpose([2 - axis for axis in PLANES[plane]])
    got = oriented(read_nifti(path))
    assert got.shape[0] == min(got.shape)
    np.testing.assert_array_equal(got, want)


def test_default_shape_and_type() -> None:
    (scan,) = (prepared.image for prepared in Recipe()(axial(np.random.default_rng(0).normal(size=(9, 60, 50)))))
    assert Recipe().shape == tuple(scan.shape) == (48, 224, 224)
    assert scan.dtype == torch.uint8
    assert scan.is_contiguous()


@pytest.mark.parametrize("name", ["axial", "coronal", "sagittal"])
def test_recipe_leaves_the_volume_alone(name: str) -> None:
    prepare = recipe((4, 8, 8), (8, 8))
    want = prepare(store((0, 1, 2), (False, False, False), SPACINGS[name]))
    for order, reverse in STORAGE_ORDERS:
        volume = store(order, reverse, SPACINGS[name])
        before = volume.array.copy()
        assert torch.equal(prepare(volume), want)
        np.testing.assert_array_equal(volume.array, before, err_msg=f"stored along {order}, reversed {reverse}")


def test_recipe_leaves_a_file_s_volume_alone(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(8, 8, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, -1.0, -4.0, 1.0])), tmp_path / "scan.nii")
    volume, prepare = read_nifti(tmp_path / "scan.nii"), recipe((4, 8, 8), (8, 8))
    assert torch.equal(prepare(volume), prepare(volume))
    np.testing.assert_array_equal(volume.array, array)


@pytest.mark.parametrize("offset", [0, -600])
@pytest.mark.parametrize("gain", [1, 4])
def test_full_window_keeps_a_ramp(offset: int, gain: int) -> None:
    ramp = np.arange(256).reshape(4, 8, 8)
    scan = recipe((4, 8, 8), (8, 8), (0, 100))(axial(ramp * gain + offset))
    assert scan.tolist() == ramp.tolist()


def test_window_clips_at_the_percentiles() -> None:
    ramp = np.random.default_rng(0).permutation(256).reshape(4, 8, 8)
    scan = recipe((4, 8, 8), (8, 8), (20, 80))(axial(ramp))
    # 20% and 80% of 0..255 are 51 and 204, so v becomes (v - 51) * 255 / 153 = (v - 51) * 5 / 3.
    assert scan.tolist() == np.clip((10 * (ramp - 51) + 3) // 6, 0, 255).tolist()


@pytest.mark.parametrize("shape", [(4, 4, 8), (4, 8, 4)])
def test_pads_to_square_with_black(shape: tuple[int, int, int]) -> None:
    ramp = np.arange(128).reshape(shape) - 1000
    scan = recipe((4, 8, 8), (8, 8), (0, 100))(axial(ramp))
    inside = np.rint((ramp + 1000) * 255 / 127).astype(int)
    pad = [(0, 0), *[((8 - n) // 2, (8 - n) // 2) for n in shape[1:]]]
    assert scan.tolist() == np.pad(inside, pad).tolist()


@pytest.mark.parametrize(("shape", "other_axes"), [((2, 5, 8), (0, 2)), ((2, 8, 5), (0, 1))])
def test_odd_padding_differs_by_one_voxel(shape: tuple[int, int, int], other_axes: tuple[int, int]) -> None:
    scan = recipe((2, 8, 8), (8, 8), (0, 100))(axial(np.arange(1, 81).reshape(shape)))
    assert np.flatnonzero(scan.numpy().any(other_axes)).tolist() in ([1, 2, 3, 4, 5], [2, 3, 4, 5, 6])


def test_resize_interpolates_between_voxel_centers() -> None:
    slices = np.array([0.0, 255.0]).reshape(2, 1, 1) * np.ones((1, 4, 4))
    scan = recipe((4, 4, 4), (4, 4), (0, 100))(axial(slices))
    # The new centers lie a quarter of a slice before and behind the old ones; ends repeat.
    assert scan[:, 0, 0].tolist() == [0, 64, 191, 255]
    assert (scan == scan[:, :1, :1]).all()


def test_pads_before_it_resizes() -> None:
    array = np.full((2, 4, 8), 255.0)
    array[0, 0, 0] = 0
    scan = recipe((2, 16, 16), (16, 16), (0, 100))(axial(array))
    bright = scan[1] > 127
    assert bright.any(1).nonzero().flatten().tolist() == list(range(4, 12))  # half as high as it is wide, as before
    assert bright.any(0).all()


def test_crops_the_middle() -> None:
    ramp = np.arange(128).reshape(2, 8, 8)
    whole = recipe((2, 8, 8), (8, 8))(axial(ramp))
    part = recipe((2, 8, 8), (4, 6))(axial(ramp))
    assert torch.equal(part, whole[:, 2:6, 1:7])
    assert part.is_contiguous()


@pytest.mark.parametrize("bright_voxels", [0, 1])
def test_refuses_a_volume_without_contrast(bright_voxels: int) -> None:
    array = np.full((4, 16, 16), 7.0)
    array.reshape(-1)[:bright_voxels] = 1000
    with pytest.raises(ScanError, match=r"flat\.nii: no contrast"):
        recipe()(axial(array, "flat.nii"))
