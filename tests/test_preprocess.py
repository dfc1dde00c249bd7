"""From volume to scan: orientation against volumes filled voxel by voxel, intensities against integer arithmetic."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hlip.prepare.grid import percentiles, through_plane_first
from hlip.prepare.recipe import RECIPES, Recipe, Window, load_recipe
from hlip.read.nifti import read_nifti
from hlip.read.rules import Rules, later, plain_values
from hlip.read.scan import ScanError, Volume
from hlip.study import PreparedScan

nibabel = pytest.importorskip("nibabel")

# Anatomical axes: 0 right, 1 posterior, 2 inferior, as directions in mm (x right, y anterior, z superior).
DIRECTIONS = np.array([[1.0, 0, 0], [0, -1.0, 0], [0, 0, -1.0]])
# What (depth, row, column) of a scan run along.
PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
SPACINGS = {"axial": (1.0, 1.0, 3.0), "coronal": (0.9, 4.0, 1.1), "sagittal": (1.2, 1.0, 1.0), "isotropic": (1.0,) * 3}
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


def axial(array: np.ndarray, path: str = "scan.nii") -> Volume:
    """A volume whose (D, H, W) is `array`."""
    stored = np.ascontiguousarray(array.transpose(2, 1, 0), dtype=np.float32)
    return Volume(stored, np.diag([1.0, -1.0, -4.0, 1.0]), Path(path))


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


@pytest.mark.parametrize(
    "settings",
    [
        {"size": (0, 256, 256)},
        {"size": (48, 200, 256)},
        {"size": (48, 256, 200)},
        {"crop": (0, 224)},
        {"crop": (224, 300)},
        {"percentiles": (-1, 99)},
        {"percentiles": (1, 101)},
        {"percentiles": (50, 50)},
        {"percentiles": (99.5, 0.5)},
        {"percentiles": (float("nan"), 99)},
        {"percentiles": None},
        {"windows": (Window(0, 1),), "percentiles": (1, 99)},
        {"percentiles": None, "windows": (Window(0, 1), Window(1, 2))},
        {"spacing": (3.0, 0.0, 1.0)},
        {"spacing": (3.0, 1.0, 1.0), "native": (8, 16, 16)},
        {"native": (8, 0, 16)},
    ],
)
def test_refuses_bad_settings(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"size|crop|percentiles|windows|spacing|native"):
        Recipe(**settings)


def scans_of(made: Recipe, volume: Volume) -> list[PreparedScan]:
    return dataclasses.replace(made, rules=Rules(min_slices=1))(volume)


def test_names_recipes_shapes_and_windows() -> None:
    shapes = [load_recipe(name).shape for name in ("brain-mri", "head-ct", "chest-ct")]
    assert shapes == [(48, 224, 224), (48, 224, 224), (112, 336, 336)]
    windows = [(window.low, window.high) for window in load_recipe("head-ct").windows]
    assert windows == [(0, 120), (-20, 180), (-800, 2000)]
    assert [(window.low, window.high) for window in load_recipe("chest-ct").windows] == [(-1150, 350)]
    assert load_recipe("chest-ct").spacing == (3, 1, 1)


def test_every_window_is_a_scan() -> None:
    made = Recipe((4, 8, 8), (8, 8), None, (Window(0, 255, "all"), Window(0, 51, "dark")))
    ramp = np.arange(256).reshape(4, 8, 8)
    scans = scans_of(made, axial(ramp))
    assert [scan.name for scan in scans] == ["all", "dark"]
    assert scans[0].image.tolist() == ramp.tolist()
    assert scans[1].image.tolist() == np.clip(ramp * 5, 0, 255).tolist()
    (part, _) = scans_of(made, dataclasses.replace(axial(ramp), part="t1"))
    assert part.name == "t1-all"


@pytest.mark.parametrize("name", ["axial", "coronal", "sagittal"])
def test_spacing_and_plane_are_those_of_the_result(name: str) -> None:
    volume = store((1, 2, 0), (True, False, True), SPACINGS[name], turn=0.2)
    voxels = [anatomy().shape[axis] for axis in PLANES[name]]
    between = [SPACINGS[name][axis] for axis in PLANES[name]]
    (scan,) = scans_of(Recipe(native=(2, 2, 2)), volume)
    assert scan.plane == name
    want = [n * mm / m for n, mm, m in zip(voxels, between, scan.image.shape, strict=True)]
    assert scan.spacing == pytest.approx(want)
    (scan,) = scans_of(Recipe((12, 16, 16), (8, 8)), volume)
    side = max(voxels[1:])
    assert scan.spacing == pytest.approx([voxels[0] * between[0] / 12, side * between[1] / 16, side * between[2] / 16])


@pytest.mark.parametrize(
    ("shape", "want"), [((3, 15, 50), (8, 16, 48)), ((12, 24, 25), (16, 32, 32)), ((20, 7, 40), (16, 16, 32))]
)
def test_native_grids_are_whole_patches(shape: tuple[int, int, int], want: tuple[int, int, int]) -> None:
    (scan,) = scans_of(Recipe(native=(8, 16, 16)), axial(np.random.default_rng(0).normal(size=shape)))
    assert tuple(scan.image.shape) == want


def test_resampling_crops_and_pads_the_middle() -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 10)).astype(np.float32)
    made = Recipe((6, 6, 4), None, None, (Window(0, 255),), (4.0, 1.0, 1.0))
    (scan,) = scans_of(made, axial(array))  # its grid is 4 x 1 x 1 mm already
    want = np.zeros((6, 6, 4))
    want[1:5] = array[:, :, 3:7]
    assert scan.image.tolist() == want.tolist()
    assert scan.spacing == (4, 1, 1)


def test_prepared_scans_are_left_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 224, 224)).astype(np.uint8)
    volume = Volume(image.transpose(2, 1, 0), np.diag([1.0, -1, -1, 1]), Path("scan.pt"), prepared=True)
    for made in (load_recipe("brain-mri"), load_recipe("head-ct"), Recipe(native=(8, 16, 16))):
        (scan,) = made(volume)
        assert np.array_equal(scan.image, image)
        assert (scan.name, scan.plane) == ("", "axial")
        assert np.isnan(scan.spacing).all()
    larger = np.pad(image, ((0, 0), (16, 16), (16, 16)))
    (scan,) = load_recipe("brain-mri")(dataclasses.replace(volume, array=larger.transpose(2, 1, 0)))
    assert np.array_equal(scan.image, image)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32])
def test_percentiles_are_numpy_s(kind: type) -> None:
    rng = np.random.default_rng(0)
    for low, high in ((0, 3), (-100, 100), (-30000, 30000)):
        limits = (-1e9, 1e9) if kind == np.float32 else (np.iinfo(kind).min, np.iinfo(kind).max)
        array = np.clip(rng.integers(low, high, (11, 12, 13)), *limits).astype(kind)
        for wanted in ((0.5, 99.5), (0, 100), (33.3, 66.6), (1, 50)):
            np.testing.assert_allclose(percentiles(array, wanted), np.percentile(array, wanted), rtol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json_and_yaml(name: str, tmp_path: Path) -> None:
    made = load_recipe(name)
    again = Recipe.from_dict(json.loads(json.dumps(made.to_dict())))
    assert (again, again.hash) == (made, made.hash)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made.to_dict()))
    assert load_recipe(str(tmp_path / "r.yaml")) == made
    assert hash(made) == hash(again)


def test_a_recipe_file_says_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("native: [8, 16, 16]\nrules: {min_slices: 8, four_d: split, spacing: [1, 20]}\n")
    made = load_recipe(str(path))
    assert made == Recipe(native=(8, 16, 16), rules=Rules(min_slices=8, four_d="split", spacing=(1.0, 20.0)))
    assert made.shape is None
    path.write_text("percentiles:\nwindows: [{low: 0, high: 80, name: brain}]\nrules: {hounsfield: true}\n")
    assert load_recipe(str(path)).windows == (Window(0.0, 80.0, "brain"),)


def test_published_recipes_keep_their_hash() -> None:
    """Stores and models carry these: a change makes new ones of all."""
    assert {name: recipe.hash for name, recipe in RECIPES.items()} == {
        "brain-mri": "9e376eeb7d0855a6094a23e010e5818c",
        "head-ct": "4f936bf63fb683868c99234191e36dd0",
        "chest-ct": "1c20f9781095da015586f6c6ee4f655b",
        # as three published recipes were before they had `depth`, `rounding`, `lengths`, `windowing` and `reorient`
        "brain-mri-linear": "a43baf40db79338946529dd7dc00069c",
        "head-ct-linear": "049648943b948b784f2978084b4ed4ad",
        "chest-ct-linear": "1466653737389ee5caac2631c5688918",
    }


def test_a_later_rule_at_its_default_is_as_if_it_were_not_there() -> None:
    @dataclass(frozen=True)
    class More(Rules):
        min_side: int = later(1)

    assert plain_values(More()) == plain_values(Rules())
    assert plain_values(More(min_side=2)) == {**plain_values(Rules()), "min_side": 2}


def test_what_came_later_is_left_out_at_its_default() -> None:
    later_fields = {"depth", "rounding", "lengths", "windowing", "reorient"}
    linear = load_recipe("chest-ct-linear")
    assert not later_fields & linear.to_dict().keys()
    explicit = {"depth": "linear", "rounding": "round", "lengths": "round", "windowing": "first", "reorient": True}
    assert Recipe.from_dict({**linear.to_dict(), **explicit}) == linear
    assert later_fields & load_recipe("chest-ct").to_dict().keys() == {"lengths", "windowing", "reorient"}
    assert later_fields & load_recipe("brain-mri").to_dict().keys() == {"depth", "rounding"}


def test_every_field_changes_the_hash() -> None:
    changed = [
        Recipe(),
        Recipe(size=(64, 256, 256)),
        Recipe(crop=None),
        Recipe(percentiles=(1, 99)),
        Recipe(percentiles=None, windows=(Window(0, 1),)),
        Recipe(spacing=(3, 1, 1), crop=None),
        Recipe(native=(8, 16, 16)),
        Recipe(rules=Rules(min_slices=6)),
        Recipe(depth="nearest-exact"),
        Recipe(rounding="truncate"),
        Recipe(lengths="floor"),
        Recipe(windowing="last"),
        Recipe(reorient=False),
    ]
    assert len({made.hash for made in changed}) == len(changed)
    assert Recipe(percentiles=(1, 99)).hash == Recipe(percentiles=(1.0, 99.0)).hash


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sise: [1, 2, 3]", "unknown field 'sise'; did you mean size"),
        ("rules: {min_slice: 3}", "recipe.rules: unknown field 'min_slice'; did you mean min_slices"),
        ("size: [48, 256]", r"recipe.size: expected .*, got \[48, 256\]"),
        ("size: [48, 256, big]", r"recipe.size\[2\]: expected a whole number, got 'big'"),
        ("size: [48, 256, true]", r"recipe.size\[2\]: expected a whole number, got True"),
        ("rules: {four_d: some}", "recipe.rules.four_d: expected .*, got 'some'"),
        ("rules: 3", "recipe.rules: expected fields, got 3"),
        ("depth: nearest", "recipe.depth: expected one of linear, nearest-exact, got 'nearest'"),
        ("reorient: 0", "recipe.reorient: expected true or false, got 0"),
        ("percentiles: [0, .nan]", r"recipe.percentiles\[1\]: expected a finite number, got '.nan'"),
        ("windows: [{low: 0}]", r"recipe.windows\[0\].high: is missing"),
        ("- 1", r"recipe: expected fields"),
        ("", r"recipe: expected fields"),
        ("a: b: c", "not a readable recipe"),
        ("!!python/object/apply:os.system [touch executed]", "not a readable recipe"),
    ],
)
def test_refuses_bad_recipe_files(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_unknown_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown recipe 'brain_mri': expected brain-mri, head-ct, chest-ct, a file"):
        load_recipe("brain_mri")
    with pytest.raises(ValueError, match=r"absent\.yaml: not a readable recipe"):
        load_recipe(str(tmp_path / "absent.yaml"))


PEAK = """
import resource, sys
from pathlib import Path
import torch
from hlip.prepare.recipe import load_recipe
from hlip.prepare.discover import ScanSource

torch.set_num_threads(1)
kind, where = sys.argv[1], Path(sys.argv[2])
source = ScanSource("ct", kind, tuple(sorted(where.iterdir())))
for name in ("head-ct", "chest-ct"):
    print([tuple(scan.image.shape) for scan in load_recipe(name).prepare(source)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_a_long_ct_needs_little_memory(kind: str, tmp_path: Path) -> None:
    """512 x 512 x 1600, in a process of its own."""
    x = np.linspace(-1, 1, 512)
    body = np.where(np.hypot.outer(x, x) < 0.8, 40 + 20 * np.multiply.outer(x, x), -1000).astype(np.int16)
    if kind == "nifti":
        header = nibabel.Nifti1Header()
        header.set_data_shape((512, 512, 1600))
        header.set_data_dtype(np.int16)
        header.set_sform(np.diag([0.7, 0.7, 0.5, 1]), 1)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        with gzip.open(tmp_path / "ct.nii.gz", "wb", compresslevel=1) as file:
            file.write(header.binaryblock + bytes(4))
            for k in range(1600):
                file.write((body + np.int16(k % 7)).tobytes())
    else:
        pytest.importorskip("pydicom")
        from dicom_files import write_series

        stored = np.broadcast_to(body[:, :, None] + np.int16(1024), (512, 512, 1600))
        write_series(tmp_path, stored, np.diag([0.7, 0.7, 0.5, 1]), modality="CT", intercept=-1024)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, kind, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *shapes, peak = done.stdout.splitlines()
    assert shapes == ["[(48, 224, 224), (48, 224, 224), (48, 224, 224)]", "[(112, 336, 336)]"]
    assert int(peak) < 3 * 2**20  # KiB
