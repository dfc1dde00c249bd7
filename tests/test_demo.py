"""The demo data set: repeatable, varied as scanners are, and without a hint of the finding in its contrasts."""

from __future__ import annotations

import collections
import csv
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("nibabel")
pytest.importorskip("nilearn")
import nibabel

from hlip import demo
from hlip.prepare.discover import find_studies
from hlip.prepare.recipe import Recipe
from hlip.prepare.studies import load_study
from hlip.study import StudyRecord

CLASSES = ("normal", "stroke", "glioma", "meningioma", "metastases")
SEEN_IN = {
    "stroke": {"dwi"},
    "glioma": {"t1", "t2", "flair"},
    "meningioma": {"t1c", "dwi"},
    "metastases": {"t1c"},
}
CONTRASTS = ("t1", "t1c", "t2", "flair", "dwi")
PLANES = ("axial", "coronal", "sagittal")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "demo"
    assert demo.make_demo(out, train=10, test=5, seed=3, workers=1) == out
    return out


def scan_kind(path: Path) -> tuple[str, str]:
    """Contrast and plane in a scan's file name."""
    _, contrast, plane = path.name.removesuffix(".nii.gz").split("_")
    return contrast, plane


def listed(made: Path, split: str) -> list[StudyRecord]:
    return find_studies(made / f"{split}.json").studies


def all_studies(made: Path) -> list[StudyRecord]:
    return listed(made, "train") + listed(made, "test")


def all_scans(made: Path) -> list[Path]:
    return [file for study in all_studies(made) for scan in study.scans for file in scan.files]


def labels(made: Path) -> dict[str, str]:
    with (made / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert sorted(row[name] for name in CLASSES) == ["0"] * 4 + ["1"]
    return {row["study"]: next(name for name in CLASSES if row[name] == "1") for row in rows}


def test_leaves_these_files(made: Path) -> None:
    names = ["README.txt", "demo.json", "labels.csv", "prompts.yaml", "studies", "test.json", "train.json"]
    assert sorted(path.name for path in made.iterdir()) == names
    assert [path.name for path in made.parent.iterdir()] == ["demo"]
    assert "SYNTHETIC" in (made / "README.txt").read_text()


def test_study_lists_name_every_scan_once(made: Path) -> None:
    assert [study.uid for study in listed(made, "train")] == [f"train-{i:04d}" for i in range(10)]
    assert [study.uid for study in listed(made, "test")] == [f"test-{i:04d}" for i in range(5)]
    scans = all_scans(made)
    assert sorted(scans) == sorted((made / "studies").rglob("*.nii.gz"))
    assert len(set(scans)) == len(scans)


def test_labels_and_prompts_agree(made: Path) -> None:
    with (made / "labels.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["study", *CLASSES]
    prompts = yaml.safe_load((made / "prompts.yaml").read_text())
    assert list(prompts["classes"]) == list(CLASSES)
    assert all(names and all(isinstance(name, str) for name in names) for names in prompts["classes"].values())
    assert all(template.count("{}") == 1 for template in prompts["templates"])
    by_study = labels(made)
    assert list(by_study) == [study.uid for study in all_studies(made)]
    for split, each in (("train", 2), ("test", 1)):
        counts = collections.Counter(name for uid, name in by_study.items() if uid.startswith(split))
        assert counts == dict.fromkeys(CLASSES, each)


def test_studies_can_be_loaded(made: Path) -> None:
    source = all_studies(made)[0]
    study = load_study([scan.files[0] for scan in source.scans], Recipe((24, 48, 48), (48, 48)), source.uid)
    assert len(study.scans) == len(source.scans)
    assert {tuple(scan.shape) for scan in study.scans} == {(24, 48, 48)}
    assert all(scan.float().std() > 20 for scan in study.scans)


def test_every_study_holds_the_contrasts_that_matter(made: Path) -> None:
    for study in all_studies(made):
        contrasts = {scan_kind(scan.files[0])[0] for scan in study.scans}
        assert 3 <= len(study.scans) <= 8
        assert {"dwi", "t1c"} <= contrasts <= set(CONTRASTS)
        assert contrasts & {"t2", "flair"}


def test_scans_vary_in_geometry_and_storage(made: Path) -> None:
    scans = all_scans(made)
    slices, in_plane, between, codes = set(), set(), set(), set()
    through = {"axial": 2, "coronal": 1, "sagittal": 0}
    for scan in scans:
        image = nibabel.load(scan)
        spacing = np.array(image.header.get_zooms())
        axis = int(np.argmax(spacing))
        orientation = nibabel.io_orientation(image.affine)
        assert orientation[axis, 0] == through[scan_kind(scan)[1]]
        np.testing.assert_allclose(nibabel.affines.voxel_sizes(image.affine), spacing, rtol=1e-5)
        slices.add(image.shape[axis])
        between.add(round(float(spacing[axis]), 2))
        in_plane.add(round(float(spacing.min()), 2))
        codes.add(nibabel.aff2axcodes(image.affine))
    assert len(slices) >= 8
    assert len(between) > len(scans) / 2
    assert len(in_plane) > len(scans) / 2
    assert len(codes) > len(scans) / 4  # of 48
    assert {axes.index("S") if "S" in axes else axes.index("I") for axes in codes} == {0, 1, 2}


def test_existing_set_is_kept(made: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(made.rglob("*"))}
    assert demo.make_demo(made, train=10, test=5, seed=3, workers=1) == made
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(made.rglob("*"))} == before


@pytest.mark.parametrize("settings", [(11, 5, 3), (10, 6, 3), (10, 5, 4)])
def test_other_settings_do_not_overwrite_a_set(made: Path, settings: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{made} exists and does not hold this demo set"):
        demo.make_demo(made, *settings, workers=1)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=f"{tmp_path} exists"):
        demo.make_demo(tmp_path, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_no_partial_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], existing: bool
) -> None:
    out = tmp_path / "demo"
    if existing:
        out.mkdir()

    def fail(*_: object, **__: object) -> str:
        assert list(tmp_path.glob(".demo.*.tmp"))  # the work was under way
        raise error("disk full")

    monkeypatch.setattr(demo.json, "dumps", fail)
    with pytest.raises(error, match="disk full"):
        demo.make_demo(out, 0, 0, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"] * existing


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    entries, contents = [], []
    for name, seed in (("first", (1, 0, 5)), ("again", (1, 0, 5)), ("other", (1, 0, 6))):
        entries.append(demo.make_study(tmp_path / name, "p7", "glioma", seed))
        contents.append([(tmp_path / name / scan).read_bytes() for scan in entries[-1]["scans"]])
    assert entries[0] == entries[1]
    assert contents[0] == contents[1]
    assert not set(contents[0]) & set(contents[2])


def test_made_set_follows_from_its_seed(made: Path, tmp_path: Path) -> None:
    uid = "train-0007"
    entry = demo.make_study(tmp_path, uid, labels(made)[uid], (3, 0, 7))
    assert entry == json.loads((made / "train.json").read_text())[uid]
    for scan in entry["scans"]:
        assert (tmp_path / scan).read_bytes() == (made / scan).read_bytes()


def test_labels_and_seeds_follow_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, ...]] = []

    def make_study(folder: Path, uid: str, finding: str, seed: tuple[int, ...]) -> dict:
        seeds.append(seed)
        return {"scans": [], "impressions": [finding]}

    monkeypatch.setattr(demo, "make_study", make_study)
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))
    first, again, other = (
        demo.make_demo(tmp_path / name, 30, 20, seed, workers=1) for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )
    for name in ("labels.csv", "train.json", "test.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()
    assert seeds[:50] == seeds[50:100]
    assert len(set(seeds[:50] + seeds[100:])) == 100
    entries = [json.loads((first / f"{split}.json").read_text()) for split in ("train", "test")]
    assert {uid: entry["impressions"][0] for each in entries for uid, entry in each.items()} == labels(first)


def test_choice_of_contrasts() -> None:
    rng = np.random.default_rng(0)
    draws = [demo.choose_contrasts(rng) for _ in range(200)]
    for draw in draws:
        contrasts = {contrast for contrast, _ in draw}
        assert 3 <= len(draw) <= 8
        assert {"dwi", "t1c"} <= contrasts <= set(CONTRASTS)
        assert contrasts & {"t2", "flair"}
    scans = list(itertools.chain.from_iterable(draws))
    assert {plane for _, plane in scans} == set(PLANES)
    assert {contrast for contrast, _ in scans} == set(CONTRASTS)
    assert {len(draw) for draw in draws} == set(range(3, 9))
    assert {draw[0][0] for draw in draws} == set(CONTRASTS)  # in random order


def test_contrasts_say_nothing_of_the_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number of scans and contrasts of whole studies, not only of the function that draws them."""
    stats = pytest.importorskip("scipy.stats")
    monkeypatch.setattr(demo, "make_scan", lambda *_: (np.zeros((1, 1, 1), dtype=np.int16), np.eye(4)))
    monkeypatch.setattr(nibabel, "save", lambda *_: None)
    tables: dict[str, list[list[int]]] = collections.defaultdict(list)
    for part, finding in enumerate(CLASSES):
        studies = [demo.make_study(tmp_path, "p", finding, (5, part, i))["scans"] for i in range(150)]
        kinds = [[scan_kind(Path(scan)) for scan in scans] for scans in studies]
        counts = collections.Counter(len(study) for study in kinds)
        tables["scans"].append([counts[3], counts[4], counts[5], sum(counts[n] for n in (6, 7, 8))])
        for contrast in ("t1", "t2", "flair"):
            there = sum(any(kind[0] == contrast for kind in study) for study in kinds)
            tables[contrast].append([there, 150 - there])
        first = collections.Counter(study[0][0] for study in kinds)
        tables["first scan"].append([first[contrast] for contrast in CONTRASTS])
    for name, table in tables.items():
        assert stats.chi2_contingency(table).pvalue > 1e-3, f"{name} depend on the finding: {table}"


def render(contrast: str, finding: str, lesion: demo.Shape | None, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    head = demo.Warp(np.random.default_rng(0), 1.0)
    return demo.make_scan(contrast, "axial", finding, lesion, head, rng)[0].astype(np.float32)


def nothing(points: np.ndarray) -> np.ndarray:
    return np.zeros(len(points))


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("finding", CLASSES[1:])
def test_lesion_shows_in_its_contrasts_only(finding: str, contrast: str) -> None:
    lesion, _ = demo.make_lesion(finding, np.random.default_rng(7), demo.load_template())
    if contrast not in SEEN_IN[finding]:
        np.testing.assert_array_equal(render(contrast, finding, lesion, 1), render(contrast, finding, None, 1))
        return
    without, with_lesion = render(contrast, finding, nothing, 1), render(contrast, finding, lesion, 1)
    changed = np.abs(with_lesion - without) > 0.1 * without.max()
    assert 0.002 < changed.mean() < 0.2  # a part of the head, and not all of it
    brighter = (with_lesion - without)[changed].mean() > 0
    assert brighter == (contrast != "t1")
    if contrast != "t1" and (finding, contrast) != ("meningioma", "dwi"):
        assert with_lesion[changed].mean() > np.percentile(without, 95)  # stands out of the healthy head


@pytest.mark.parametrize("finding", CLASSES[1:])
def test_lesions_lie_within_the_brain(finding: str) -> None:
    template = demo.load_template()
    axis = np.arange(-90.0, 91.0, 6.0)
    points = np.stack(np.meshgrid(axis, axis - 18, axis + 6, indexing="ij"), -1).reshape(-1, 3)
    inside = template.sample(points.astype(np.float32)).sum(0) > 0.5
    sides = set()
    for seed in range(12):
        lesion, center = demo.make_lesion(finding, np.random.default_rng(seed), template)
        weight = lesion(points)
        assert weight.min() >= 0 and weight.max() <= 1
        assert 5 < (weight[inside] > 0.5).sum() < 0.3 * inside.sum()
        assert np.abs(center - demo.CENTER).max() < 110
        sides.add(center[0] > 0)
    assert sides == {False, True}


def test_no_lesion_of_an_unknown_finding() -> None:
    with pytest.raises(ValueError, match="abscess"):
        demo.make_lesion("abscess", np.random.default_rng(0), demo.load_template())


def reports(finding: str, center: tuple[float, float, float] | None) -> list[str]:
    where = None if center is None else np.array(center)
    draws = (demo.make_report(finding, where, np.random.default_rng(seed))[0] for seed in range(60))
    return [" ".join(sentences) for sentences in draws]


WORDS = {
    "normal": ("no ", "normal", "unremarkable"),
    "stroke": ("infarct", "stroke", "ischemi"),
    "glioma": ("glioma", "glial", "infiltrative"),
    "meningioma": ("meningioma",),
    "metastases": ("metasta",),
}


@pytest.mark.parametrize("finding", CLASSES)
def test_reports_name_the_finding(finding: str) -> None:
    texts = reports(finding, None if finding == "normal" else (30.0, 20.0, 20.0))
    assert len(set(texts)) >= 15  # five phrasings, four prefixes
    for text in texts:
        assert any(word in text.lower() for word in WORDS[finding]), text
        assert "{" not in text and "  " not in text
        if finding != "normal":
            assert not any(word in text.lower() for name in set(CLASSES[1:]) - {finding} for word in WORDS[name]), text


@pytest.mark.parametrize("finding", CLASSES[1:])
@pytest.mark.parametrize(("x", "side", "other"), [(30.0, "right", "left"), (-30.0, "left", "right")])
def test_reports_name_the_side(finding: str, x: float, side: str, other: str) -> None:
    texts = [text.lower() for text in reports(finding, (x, 20.0, 20.0))]
    assert any(side in text for text in texts)
    assert not any(other in text for text in texts)
    if finding != "metastases":  # whose reports may speak of both hemispheres
        assert all(f"{side} frontal" in text for text in texts)


@pytest.mark.parametrize(
    ("center", "lobe"),
    [
        ((30.0, 30.0, 20.0), "frontal"),
        ((20.0, -85.0, 5.0), "occipital"),
        ((-50.0, -20.0, -15.0), "temporal"),
        ((30.0, -40.0, 45.0), "parietal"),
    ],
)
def test_reports_name_the_lobe(center: tuple[float, float, float], lobe: str) -> None:
    assert all(lobe in text for text in reports("stroke", center))


def test_normal_reports_name_no_place() -> None:
    assert not any(word in text.lower() for text in reports("normal", None) for word in ("left", "right", "lobe"))


def test_lesion_lies_on_the_side_its_report_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The brightest part of a stroke in a study's diffusion scan, found through the file's affine."""
    checked = set()
    for seed in range(8):
        entry = demo.make_study(tmp_path / str(seed), "p", "stroke", (11, 0, seed))
        path = next(tmp_path / str(seed) / scan for scan in entry["scans"] if scan_kind(Path(scan))[0] == "dwi")
        image = nibabel.load(path)
        voxels = np.asarray(image.dataobj, dtype=np.float32)
        bright = np.argwhere(voxels > 0.8 * np.percentile(voxels, 99.8))
        x = nibabel.affines.apply_affine(image.affine, bright)[:, 0].mean()
        side = "right" if x > 0 else "left"
        assert f" {side} " in f" {entry['impressions'][0].lower()}"
        checked.add(side)
    assert checked == {"left", "right"}
