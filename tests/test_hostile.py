"""Damaged and hostile input through the real command: what is bad is named and left out, all the rest is prepared, and
nothing is written but the store."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nibabel")
pytest.importorskip("pydicom")
pytest.importorskip("SimpleITK")
pytest.importorskip("pyarrow")

import torch

import hostile_files as bad
from commands import run
from hlip.prepare.recipe import load_recipe
from hlip.read.scan import ScanSource
from hlip.store.store import Store
from hlip.store.tools import verify

REPOSITORY = Path(__file__).parents[1]
MR = "size: [8, 24, 24]\ncrop: null\n"
CT = """
size: [8, 24, 24]
crop: null
percentiles: null
windows: [{low: 0, high: 120, name: brain}, {low: -800, high: 2000, name: bone}]
rules: {modalities: [CT], hounsfield: true}
"""


@dataclass(frozen=True)
class Case:
    """make: writes it. rule, reason: of its one rejection; empty if there is none. more: scans beside the good one."""

    make: bad.Make
    rule: str = ""
    reason: str = ""
    more: int = 0
    recipe: str = MR


def wrong(make: bad.Make, rule: str, reason: str = "", **settings: Any) -> Case:
    return Case(make, rule, reason, **settings)


real = bad.real_volume
nan = np.float32(np.nan)
mostly_nan = np.where(np.arange(12) < 4, real().astype(np.float32), nan)
sheared = np.array([[2.0, 1.9, 0, 0], [0, 0.3, 0, 0], [0, 0, 4.0, 0], [0, 0, 0, 1]])
rgb = np.zeros((20, 24, 12), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))

CASES = {
    # Files that are not what they claim
    "gzip cut in the voxels": wrong(bad.cut("bad.nii.gz", 0.5), "unreadable", "the compressed data end early"),
    "gzip cut in the header": wrong(bad.cut("bad.nii.gz", 0.005), "unreadable", "not a readable NIfTI"),
    "voxels cut": wrong(bad.cut("bad.nii", 0.7), "unreadable", "shorter than its header says"),
    "no voxels": wrong(bad.cut("bad.nii", 0.03), "unreadable", "shorter than its header says"),
    "wrong checksum": wrong(bad.wrong_checksum, "unreadable", "incorrect data check"),
    "bomb by its header": wrong(bad.bomb(shape=(2000, 2000, 2000)), "too_large", r"\(2000, 2000, 2000\)"),
    "bomb behind the voxels": wrong(bad.bomb(), "unreadable", "more data than its header says"),
    "bomb in the header": wrong(bad.bomb(extension=True), "unreadable", "voxels begin at byte 2.1"),
    "text called gzip": wrong(bad.named("bad.nii.gz", b"patient,age\n" * 99), "unreadable", "not a readable NIfTI"),
    "text called NIfTI": wrong(bad.named("bad.nii", b"patient,age\n" * 99), "unreadable", "wrong size of the header"),
    "empty file": wrong(bad.named("bad.nii.gz", b""), "unreadable", "empty file"),
    "header's size": wrong(bad.patched(0, "<i", 349), "unreadable", "wrong size of the header"),
    "magic": wrong(bad.patched(344, "4s", b"bad\0"), "unreadable", "not a NIfTI|not a readable"),
    "datatype": wrong(bad.patched(70, "<h", 999), "unreadable", "not a readable NIfTI"),
    "offset within the header": wrong(bad.patched(108, "<f", 10.0), "unreadable", "not a readable|corrupt"),
    "offset is no number": wrong(bad.patched(108, "<f", nan), "unreadable", "voxels begin at byte nan"),
    # Grids
    "zero spacing": wrong(bad.spacing(2, 0, 4), "spacing", r"\[2.0, 0.0, 4.0\] mm"),
    "negative spacing": wrong(bad.spacing(2, 2, -4), "spacing", r"\[2.0, 2.0, -4.0\] mm"),
    "spacing is no number": wrong(bad.patched(280, "<f", nan), "spacing", "nan"),
    "huge spacing": wrong(bad.volume(real(), np.diag([2.0, 2.0, 4e6, 1.0])), "spacing", "4000000"),
    "sheared": wrong(bad.volume(real(), sheared), "sheared", "cosine 0.98"),
    "endless 4D": wrong(bad.patched(40, "<5h", 4, 20, 24, 12, 32767), "four_d", "32767"),
    "real 4D": wrong(bad.volume(np.stack([real(), real()], 3)), "four_d", "expected one 3D volume, got 4D"),
    "5D": wrong(bad.patched(40, "<6h", 5, 20, 24, 3, 2, 2), "four_d", "got 5D"),
    "an axis of nothing": wrong(bad.patched(40, "<4h", 3, 20, 0, 12), "unreadable", "no voxels|not a readable"),
    "too few slices": wrong(bad.volume(real()[..., :3]), "few_slices", "3 slices, expected at least 5"),
    # Voxels
    "constant": wrong(bad.volume(np.full((20, 24, 12), 7, np.int16)), "constant", "every voxel is 7"),
    "nothing but NaN": wrong(bad.volume(np.full((20, 24, 12), nan)), "not_finite", "no finite voxel"),
    "mostly NaN": wrong(bad.volume(mostly_nan), "not_finite", "33% of the voxels"),
    "infinite": wrong(bad.volume(np.full((20, 24, 12), np.float32(np.inf))), "not_finite", "no finite voxel"),
    "slope is no number": wrong(bad.patched(112, "<2f", 2.0, nan), "unreadable|not_finite"),
    "one bright voxel": wrong(bad.volume((np.arange(5760) == 9).reshape(20, 24, 12) * np.int16(99)), "no_contrast"),
    "colours": wrong(bad.volume(rgb), "not_grey", "one number a voxel"),
    "complex": wrong(bad.volume(real().astype(np.complex64)), "not_grey", "one number a voxel"),
    # Names, links and what is no file
    "folder called NIfTI": Case(bad.directory),
    "link to nowhere": wrong(bad.link("nowhere"), "link", "nowhere"),
    "link to itself": wrong(bad.link("bad.nii.gz"), "link", "nowhere"),
    "link to a device": wrong(bad.link("/dev/zero"), "link", "out of the folder"),
    "link out of the folder": wrong(bad.link_outside, "link", "out of the folder"),
    "ring of links": wrong(bad.link_ring, "link", "to a folder"),
    "pipe": wrong(bad.pipe("bad.nii.gz"), "unreadable", "not a regular file"),
    "pipe without a suffix": wrong(bad.pipe("IM0001"), "unreadable", "not a regular file"),
    "socket": wrong(bad.socket_file, "unreadable", "not a regular file"),
    "device": wrong(bad.device, "unreadable", "not a regular file"),
    "unreadable folder": wrong(bad.too_deep, "unreadable", "the folder cannot be read"),
    "odd names": Case(bad.odd_names(b"-rf.nii.gz", b"a\nb.nii.gz", b"\xff.nii.gz", "Schädel.nii".encode()), more=4),
    "long name": Case(bad.odd_names(b"x" * 240 + b".nii.gz"), more=1),
    "names like a shell": Case(bad.odd_names(b"$(touch executed).nii.gz", b";touch executed;.nii.gz"), more=2),
    "scout by its name": wrong(bad.odd_names(b"scout.nii.gz"), "localiser", "scout"),
    "the same image twice": wrong(bad.copied, "duplicate", "the same image as good.nii.gz"),
    "derivative": wrong(bad.derivative, "derived"),
    # Tensors
    "pickle of code": wrong(bad.tensor(bad.Code()), "unreadable", "not a readable tensor"),
    "old pickle of code": wrong(bad.tensor(bad.Code(), old=True), "unreadable", "not a readable tensor"),
    "raw pickle of code": wrong(bad.pickled, "unreadable", "not a readable tensor"),
    "no tensor": wrong(bad.tensor({"scan": torch.zeros(8, 8, 8)}), "unreadable", "expected a dense tensor, got dict"),
    "tensor of a slice": wrong(bad.tensor(torch.rand(20, 20)), "four_d", r"got shape \(20, 20\)"),
    "complex tensor": wrong(bad.tensor(torch.rand(8, 8, 8, dtype=torch.complex64)), "not_grey"),
    "tensor without data": wrong(bad.tensor(torch.rand(8, 8, 8, device="meta")), "unreadable", "more than weights"),
    "one number stretched": wrong(bad.tensor(torch.ones(1).expand(2**11, 2**11, 2**11)), "unreadable", "larger than"),
    "tensor cut": wrong(bad.cut_tensor, "unreadable", "not a readable tensor"),
    # DICOM
    "two series": Case(bad.two_series, more=2),
    "no pixels": wrong(bad.series(bad.each_file(bad.with_values(PixelData=None))), "unreadable", "corrupt pixels"),
    "pixels cut": wrong(bad.series(bad.cut_files), "unreadable", "corrupt pixels"),
    "header cut": wrong(bad.series(bad.cut_headers), "no_uid|unreadable"),
    "text called DICOM": wrong(bad.named("bad.dcm", b"hello" * 99), "unreadable", "not a DICOM file"),
    "JPEG 2000 scrambled": wrong(
        bad.series(bad.scrambled_pixels, transfer_syntax="jpeg2000"), "unreadable", "corrupt pixels"
    ),
    "JPEG 2000 bomb": wrong(bad.series(bad.huge_code_stream, transfer_syntax="jpeg2000"), "unreadable", "pixels"),
    "JPEG scrambled": wrong(
        bad.series(bad.scrambled_pixels, transfer_syntax="jpeg_lossless"), "unreadable", "corrupt pixels"
    ),
    "unknown transfer syntax": wrong(bad.series(bad.other_syntax("1.2.3.4.5.6.7")), "unreadable"),
    "wrong compression": wrong(bad.series(bad.other_syntax("1.2.840.10008.1.2.5")), "unreadable", "corrupt pixels"),
    "bits": wrong(bad.series(bad.each_file(bad.with_values(BitsAllocated=13))), "unreadable", "corrupt pixels"),
    "more bits": wrong(bad.series(bad.each_file(bad.with_values(BitsAllocated=32))), "unreadable", "corrupt pixels"),
    "photometric RGB": wrong(
        bad.series(bad.each_file(bad.with_values(PhotometricInterpretation="RGB"))), "not_grey", "RGB"
    ),
    "three samples": wrong(bad.series(bad.each_file(bad.with_values(SamplesPerPixel=3))), "not_grey", "3 samples"),
    "no position": wrong(bad.series(ImagePositionPatient=None), "localiser", "no ImagePositionPatient"),
    "no orientation": wrong(bad.series(ImageOrientationPatient=None), "localiser", "no ImageOrientationPatient"),
    "no pixel spacing": wrong(bad.series(PixelSpacing=None), "spacing", "no PixelSpacing"),
    "pixel spacing of zero": wrong(bad.series(PixelSpacing=[0, 2]), "spacing", r"PixelSpacing \(0.0, 2.0\)"),
    "position is no number": wrong(
        bad.series(bad.one_file(bad.with_values(ImagePositionPatient=["nan", "0", "1"]))),
        "unreadable",
        "damaged header",
    ),
    "rows along columns": wrong(bad.series(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "sheared", "the same way"),
    "an endless number of frames": wrong(
        bad.series(bad.each_file(bad.with_values(NumberOfFrames=10**9))), "unreadable", "1000000000 frames"
    ),
    "instances twice": Case(bad.series(bad.again), "copy", "1 files repeat an instance", more=1),
    "slices of two sizes": wrong(bad.series(bad.mixed_sizes), "mixed_orientations", "2 orientations or sizes"),
    "missing slices": wrong(bad.series(missing=(3, 4, 5, 6)), "missing_slices", "4 of 12"),
    "all slices at one place": wrong(bad.series(ImagePositionPatient=[0, 0, 0]), "four_d|few_slices"),
    "localiser": wrong(bad.series(image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")), "localiser", "LOCALIZER"),
    "derived": wrong(bad.series(image_type=("DERIVED", "SECONDARY")), "derived", "SECONDARY"),
    "scout by its description": wrong(bad.series(description="3-plane loc"), "localiser", "3-plane"),
    "CT among MR": wrong(bad.series(modality="CT"), "modality", "modality CT, expected MR"),
    "a slice of another modality": wrong(bad.series(bad.one_file(bad.with_values(Modality="PT"))), "modality", "PT"),
    "no study's UID": wrong(bad.series(bad.one_file(bad.with_values(StudyInstanceUID=""))), "no_uid", more=1),
    "deep sequences": wrong(bad.series(bad.deep_sequences), "unreadable", "header|corrupt"),
    "contours": wrong(bad.series(bad.structure_set), "no_image", "without rows of pixels"),
    # CT
    "MR among CT": wrong(bad.series(), "modality", "modality MR, expected CT", recipe=CT),
    "CT without air": wrong(bad.volume(bad.head(air=40)), "hounsfield", "not in Hounsfield", recipe=CT),
    "CT times ten": wrong(bad.volume(bad.head(scale=10)), "hounsfield", "not in Hounsfield", recipe=CT),
    "CT to be rescaled twice": Case(bad.rescaled_twice, more=2, recipe=CT),
    "stored CT that is not rescaled": wrong(
        bad.series(array=bad.head() + 3000, modality="CT"), "hounsfield", "not in Hounsfield", recipe=CT
    ),
}


@dataclass
class Sandbox:
    """A folder with the input, a home, a place for temporary files and one to stand in; and a store beside it."""

    root: Path
    out: Path
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path) -> Sandbox:
        for name in ("input", "home", "tmp", "here"):
            (folder / "box" / name).mkdir(parents=True)
        box = folder / "box"
        env = {**os.environ, "HOME": str(box / "home"), "TMPDIR": str(box / "tmp"), "PYTHONPATH": str(REPOSITORY)}
        return cls(box, folder / "store", {**env, "PYTHONDONTWRITEBYTECODE": "1"})

    def listing(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of everything in the box."""
        found = {}
        for folder, folders, files, handle in os.fwalk(self.root):
            for name in [".", *folders, *files]:
                status = os.stat(name, dir_fd=handle, follow_symlinks=False)
                found[f"{folder}/{name}"] = (status.st_size, status.st_mtime_ns)
        return found

    def prepare(self, given: Path, recipe: str, *options: str) -> subprocess.CompletedProcess[str]:
        """The command in a process of its own."""
        command = [sys.executable, "-m", "hlip.cli", "prepare", given, "--out", self.out, "--recipe", recipe, *options]
        return subprocess.run(
            list(map(str, command)), cwd=self.root / "here", env=self.env, capture_output=True, text=True, timeout=300
        )


def rejections(store: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (store / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


# A study of each case has its number as id, so that DICOM series can be of it too.
NUMBERS = {name: f"1.2.{number}" for number, name in enumerate(CASES)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sandbox]:
    """All cases of each recipe, prepared by one run of the command; nothing but the store was written."""
    return {text: prepare_cases(text, tmp_path_factory.mktemp("hostile")) for text in (MR, CT)}


def prepare_cases(text: str, folder: Path) -> Sandbox:
    box = Sandbox.make(folder)
    recipe = recipe_file(box.root, text)
    for name, case in CASES.items():
        if case.recipe == text:
            folder = box.root / "input" / NUMBERS[name]
            bad.save(folder / "good.nii.gz", real() if case.recipe == MR else bad.head())
            case.make(folder)
    before = box.listing()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(box.root / "here")
        for key in ("HOME", "TMPDIR", "PYTHONDONTWRITEBYTECODE"):
            patch.setenv(key, box.env[key])
        for out, workers in ((box.out, 1), (box.out.with_name("again"), 2)):
            arguments = [box.root / "input", "--out", out, "--recipe", recipe, "--workers", workers]
            assert run("prepare", *arguments) == 3
    assert box.listing() == before
    assert verify(box.out) == []
    assert files_of(box.out) == files_of(box.out.with_name("again"))
    return box


def files_of(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in sorted(store.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_hostile_scans(prepared: dict[str, Sandbox], name: str) -> None:
    case, uid = CASES[name], NUMBERS[name]
    box = prepared[case.recipe]
    store = Store(box.out)
    study = store.study(int(store.indices([uid])[0]))
    good = ScanSource("good.nii.gz", "nifti", (box.root / "input" / uid / "good.nii.gz",))
    for scan in load_recipe(str(box.root / "recipe.yaml")).prepare(good):
        assert torch.equal(study.scans[study.names.index(scan.of(good).name)], scan.image)
    windows = 1 if case.recipe == MR else 2
    assert len(study.scans) == windows + case.more
    mine = [r for r in rejections(box.out) if r["study"] == uid or r["scan"].startswith(f"{uid}/")]
    assert len(mine) == bool(case.rule), mine
    for rejection in mine:
        assert re.fullmatch(case.rule, rejection["rule"]), rejection
        assert re.search(case.reason, rejection["reason"]), rejection
        assert str(box.root) not in json.dumps(rejection)


def listed(text: str) -> bad.Make:
    return bad.named("list.json", text.encode())


def table(text: str) -> bad.Make:
    return bad.named("table.csv", text.encode())


def into_a_folder_in_use(folder: Path) -> None:
    (folder.parents[1] / "store").mkdir()
    (folder.parents[1] / "store" / "thesis.txt").write_text("mine")


def into_a_file(folder: Path) -> None:
    (folder.parents[1] / "store").write_text("mine")


def into_another_store(folder: Path) -> None:
    (folder.parents[1] / "store" / "shards").mkdir(parents=True)
    (folder.parents[1] / "store" / "store.json").write_text('{"format": 99}')


def a_recipe_of_code(folder: Path) -> None:
    recipe_file(folder.parent, "!!python/object/apply:os.system ['touch executed']")


def settings(text: str) -> bad.Make:
    return lambda folder: bad.void(recipe_file(folder.parent, MR + text))


# What is refused as a whole: how to make it, the input, further options, and what the command says.
REFUSED: dict[str, tuple[bad.Make, str, list[str], str]] = {
    "a study twice": (listed('{"a": {"scans": []}, "a": {"scans": []}}'), "list.json", [], "'a' occurs twice"),
    "no JSON": (listed("{"), "list.json", [], "not a readable study list"),
    "deep JSON": (listed("[" * 100_000), "list.json", [], "not a readable study list"),
    "not UTF-8": (bad.named("list.json", b"\xff\xfe{}"), "list.json", [], "not a readable study list"),
    "a list of lists": (listed("[[]]"), "list.json", [], "expected an object"),
    "another form": (listed('{"a": {"files": []}}'), "list.json", [], "study a: expected an object with a list"),
    "numbers for paths": (listed('{"a": {"scans": [7]}}'), "list.json", [], "'scans' must be file names"),
    "a zero byte in a path": (listed('{"a": {"scans": ["a\\u0000b.nii"]}}'), "list.json", [], "file names"),
    "half a character in a path": (listed('{"a": {"scans": ["\\ud800.nii"]}}'), "list.json", [], "file names"),
    "a zero byte in a table": (table("study,path\na,a\0.nii\n"), "table.csv", [], "line 2: no path|NUL"),
    "a scan twice": (listed('{"a": {"scans": ["x.nii", "x.nii"]}}'), "list.json", [], "the same scan is given twice"),
    "a table without studies": (table("name,path\na,b\n"), "table.csv", [], "needs a column of study"),
    "a column twice": (table("study,x,x\na,1,2\n"), "table.csv", [], "column 'x' occurs twice"),
    "a ragged table": (table("study,path\na\n"), "table.csv", [], "line 2: expected 2 cells"),
    "labels in words": (
        table("study,path,x\na,a.nii,?\n"), "table.csv", ["--label_columns", "x"], "'x' of labels: expected a number"
    ),
    "no such label": (
        table("study,path,x\na,a.nii,1\n"), "table.csv", ["--label_columns", "y"], "no column 'y' of labels"
    ),
    "no such input": (bad.void, "absent", [], "absent: no such file or folder"),
    "an input of no kind": (bad.named("notes.txt", b"hello"), "notes.txt", [], "expected a folder, a study list"),
    "a folder without scans": (bad.void, "", [], "no scans"),
    "nothing that can be used": (bad.named("a.dcm", b"x"), "", [], r"\(1 rejected, such as a.dcm: not a DICOM file"),
    "reports of others": (
        listed('{"z": "Normal."}'), "..", ["--reports", "list.json"], "none of its 1 studies was found"
    ),
    "a pipe for reports": (bad.pipe("r.json"), "..", ["--reports", "r.json"], "not a regular file"),
    "a pipe for a table": (bad.pipe("table.csv"), "table.csv", [], "not a regular file"),
    "a pipe for a list": (bad.pipe("list.json"), "list.json", [], "not a regular file"),
    "a pipe among reports": (bad.pipe("1.txt"), "..", ["--reports", "."], "1.txt: not a readable report"),
    "a salt that is no file": (bad.void, "..", ["--hash_ids", "salt.txt"], "salt.txt"),
    "a short salt": (bad.named("salt.txt", b"grain\n"), "..", ["--hash_ids", "salt.txt"], "can be guessed"),
    "sections": (bad.named("s.yaml", b"findings: [BEFUND]"), "..", ["--sections", "s.yaml"], "words in lower case"),
    "a recipe of code": (a_recipe_of_code, "..", [], "recipe.yaml: not a readable recipe"),
    "a recipe's unknown field": (settings("colour: red"), "..", [], "unknown field 'colour'"),
    "a rule that is none": (settings("rules: {descriptions: ['(']}"), "..", [], "no regular expression"),
    "no time": (bad.void, "..", ["--timeout", "0"], "must be positive"),
    "a folder in use": (into_a_folder_in_use, "..", [], "neither empty nor a store"),
    "a file in the way": (into_a_file, "..", [], "store: is a file"),
    "a store of the future": (into_another_store, "..", [], "a store of format 99"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_input_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, given, options, message = REFUSED[name]
    box = Sandbox.make(tmp_path)
    box.out = box.root / "store"  # within what is watched
    recipe = recipe_file(box.root / "input", MR)
    bad.save(box.root / "input" / "good" / "scan.nii.gz")
    folder = box.root / "input" / "bad"
    folder.mkdir()
    make(folder)
    monkeypatch.chdir(folder)
    before = box.listing()
    arguments = [folder / given, "--out", box.out, "--recipe", recipe, "--workers", "1", *options]
    assert run("prepare", *arguments) == 2
    errors = capsys.readouterr().err
    assert re.search(f"hlip prepare: error: .*{message}", errors), errors
    assert box.listing() == before


def test_hostile_entries_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Sandbox.make(tmp_path)
    recipe = recipe_file(box.root, MR)
    good, secret = box.root / "input" / "good.nii.gz", box.root / "home" / "secret.nii.gz"
    bad.save(good)
    bad.save(secret)
    os.mkfifo(box.root / "input" / "pipe.nii.gz")
    entries = {
        "climbs": ["../home/secret.nii.gz"],
        "climbs further on": ["a/../../home/secret.nii.gz"],
        "missing": ["missing.nii.gz", "missing/", "missing.dcm"],
        "pipe": ["pipe.nii.gz"],
        "device": ["/dev/zero", "/dev/tty"],
        "too long": ["x" * 300 + ".nii.gz", "y" * 300],
        "no image": ["list.json"],
    }
    content = {uid: {"scans": ["good.nii.gz", *scans]} for uid, scans in entries.items()}
    content["../../home"] = {"series": {"secret": {}}}
    (box.root / "input" / "list.json").write_text(json.dumps(content))
    before = box.listing()
    monkeypatch.chdir(box.root / "here")
    arguments = [box.root / "input" / "list.json", "--out", box.out, "--recipe", recipe, "--workers", 1]
    assert run("prepare", *arguments) == 3
    assert box.listing() == before
    store = Store(box.out)
    assert store.uids.tolist() == sorted(entries) and store.num_scans.tolist() == [1] * len(entries)
    rules = sorted((r["study"], r["rule"]) for r in rejections(box.out))
    assert rules == [
        ("../../home", "no_scans"),
        ("../../home", "outside"),
        ("climbs", "outside"),
        ("climbs further on", "outside"),
        ("device", "missing"),
        ("device", "missing"),
        ("missing", "missing"),
        ("missing", "missing"),
        ("missing", "missing"),
        ("no image", "unreadable"),
        ("pipe", "unreadable"),
        ("too long", "missing"),
        ("too long", "unreadable"),
    ]


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files may not grow: the store says so, keeps what it has, and is finished by the next run."""
    box = Sandbox.make(tmp_path)
    recipe = recipe_file(box.root, MR)
    for k in range(3):
        bad.save(box.root / "input" / f"{k}" / "scan.nii.gz")
    before = box.listing()
    arguments = ["prepare", *map(str, [box.root / "input", "--out", box.out, "--recipe", recipe, "--workers", 1])]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        assert run(*arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "no space left" in capsys.readouterr().err
    assert not Store(box.out).info and not list((box.out / "work").glob("*.tmp"))
    assert run(*arguments) == 0
    assert len(Store(box.out)) == 3 and box.listing() == before


def test_a_scan_that_never_ends(tmp_path: Path) -> None:
    """A rule of the recipe that takes for ever on one scan's name: the scan is left out, the rest is prepared."""
    box = Sandbox.make(tmp_path)
    recipe = recipe_file(box.root, MR + "rules: {descriptions: ['(a+)+$']}\n")
    bad.save(box.root / "input" / "one" / f"{'a' * 60}.nii.gz")
    bad.save(box.root / "input" / "one" / "good.nii.gz", np.roll(real(), 1, axis=0))
    before = box.listing()
    done = box.prepare(box.root / "input", str(recipe), "--workers", "1", "--timeout", "3")
    assert done.returncode == 3 and "rejected by timeout: 1" in done.stdout, done.stderr
    assert Store(box.out).study(0).names == ["good.nii.gz"] and box.listing() == before
    reason = "it took more than 3 s"
    assert rejections(box.out) == [{"study": "one", "scan": f"{'a' * 60}.nii.gz", "rule": "timeout", "reason": reason}]
