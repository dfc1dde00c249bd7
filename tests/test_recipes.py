"""Recipes: their settings, grids, hashes and files."""

from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from hlip.prepare.grid import percentiles
from hlip.prepare.recipe import RECIPES, Recipe, Window, load_recipe
from hlip.read.rules import Rules, later, plain_values
from hlip.read.scan import Volume
from hlip.study import PreparedScan
from preprocess_cases import PLANES, SPACINGS, anatomy, axial, nibabel, store


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
