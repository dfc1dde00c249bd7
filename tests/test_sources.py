"""Studies are found wherever hospitals and data sets put them, and whatever cannot be used is named with its rule."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import random
import shutil
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hlip.data.files import walk
from hlip.data.readers import ScanError, read_nifti
from hlip.data.sources import Found, Rejection, StudySource, find_scans, find_studies
from hlip.data.tables import Table

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
DICOM = Path(pydicom.__file__).parent / "data" / "test_files"
ANATOMICAL = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"


def nifti(path: Path, seed: int | None = None) -> Path:
    """A NIfTI file: nibabel's own, or noise of the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.load(ANATOMICAL)
    if seed is not None:
        array = np.random.default_rng(seed).integers(0, 1000, (6, 5, 3)).astype(np.int16)
        image = nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 4.0, 1.0]))
    nibabel.save(image, path)
    return path


def dicom(path: Path, study: str = "1", series: str = "1.1", position: int = 1, **tags: Any) -> Path:
    """pydicom's MR image as an instance of a series; its pixels differ with study, series and position."""
    dataset = pydicom.dcmread(DICOM / "MR_small.dcm")
    instance = f"1.2.{study}.{series}.{position}"
    values = {
        "StudyInstanceUID": f"1.2.{study}",
        "SeriesInstanceUID": f"1.2.{series}",
        "SOPInstanceUID": instance,
        "SeriesNumber": int(series.rpartition(".")[2]),
        "InstanceNumber": position,
        "SeriesDescription": f"t{series.rpartition('.')[2]} tse",
        "PatientName": "Secret^Person",
        "AccessionNumber": "SECRET7",
        "PixelData": np.random.default_rng(zlib.crc32(instance.encode())).bytes(len(dataset.PixelData)),
        **tags,
    }
    for name, value in values.items():
        if value is None:
            dataset.pop(name, None)
        else:
            setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path)
    return path


def tensor(path: Path, seed: int) -> Path:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.randint(0, 255, (4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)), path)
    return path


def names(found: Found) -> dict[str, list[str]]:
    return {study.uid: [scan.name for scan in study.scans] for study in found.studies}


def rules(found: Found) -> dict[str, int]:
    return dict(Counter(rejection.rule for rejection in found.rejected))


def only(found: Found, rule: str) -> Rejection:
    [rejection] = [rejection for rejection in found.rejected if rejection.rule == rule]
    return rejection


# DICOM


def test_real_archives_are_grouped_by_their_uids() -> None:
    """dicomdirtests: three patients, files without suffix, three DICOMDIRs."""
    found = find_studies(DICOM / "dicomdirtests")
    prefix = "1.3.6.1.4.1.5962.1.1.0.0.0."
    assert {uid.removeprefix(prefix): scans for uid, scans in names(found).items()} == {
        "1194734704.16302.0.1": ["0004-Scout", "0005-SmartScore_-_Gated_0.5_sec"],
        "1196527414.5534.0.1": ["0001-Cervical_LAT", "0002-Cervical_OBLI_1", "0003-Cervical_OBLI_2"],
        "1196530851.28319.0.1": ["0002-Routine_Brain"],
        "1196533885.18148.0.1": ["0001-FAST_LOCALIZER", "0002-T_S_C_RF_FAST_PILOT", "0700-ANGIO_Projected_from_C"],
        "1196533885.18148.0.133": ["0001-FAST_LOCALIZER", "0002-T_S_C_RF_FAST_PILOT"],
        "1196533885.18148.0.427": ["0001-FAST_LOCALIZER", "0002-FAST_LOCALIZER"],
    }
    angio = next(scan for study in found.studies for scan in study.scans if "ANGIO" in scan.name)
    assert (angio.kind, angio.modality, angio.description, len(angio.files)) == (
        "dicom",
        "MR",
        "ANGIO Projected from C",
        7,
    )
    assert sum(len(scan.files) for study in found.studies for scan in study.scans) == 31
    # TINY_ALPHA: fifty files whose pixels were taken out
    assert (rules(found), only(found, "no_image").reason[:8]) == ({"no_image": 1, "no_scans": 1}, "50 files")


def test_all_of_pydicoms_odd_files_are_found_or_named() -> None:
    found = find_studies(DICOM)
    files = {file.name for study in found.studies for scan in study.scans for file in scan.files}
    assert {"CT_small.dcm", "ExplVR_BigEnd.dcm", "image_dfl.dcm", "693_J2KI.dcm"} <= files
    assert {r.scan for r in found.rejected if r.rule == "no_uid"} >= {"UN_sequence.dcm", "no_meta_group_length.dcm"}
    reasons = {r.reason for r in found.rejected if r.rule == "no_image"}
    assert {reason.partition(" without")[0] for reason in reasons} >= {
        "2 files of modality SR",
        "1 files of modality ECG",
    }
    small = next(s for s in found.studies if s.scans[0].files[0].name.startswith("MR_small"))
    assert len(small.scans[0].files) == 1  # the same slice in nine transfer syntaxes
    assert [r.reason[:7] for r in found.rejected if r.rule == "copy" and r.study == small.uid] == ["8 files"]


def archive(root: Path, order: Callable[[list], None] = lambda jobs: None) -> Path:
    """Two studies of three series and one, as an archive that cares for nothing leaves them."""
    jobs: list[tuple[str, str, str, int]] = [
        *((f"a/IM{i}", "1", "1.1", i) for i in (1, 2, 3)),
        *((f"b/c/{10 - i}.dcm", "1", "1.1", i) for i in (4, 5)),  # the same series elsewhere
        *((f"a/second{i}.x", "1", "1.2", i) for i in (1, 2)),  # another series in the same folder
        *((f"Größe 中/{i}", "1", "1.10", i) for i in (1, 2)),
        *((f"a/other{i}", "2", "2.1", i) for i in (1, 2)),
    ]
    order(jobs)
    for name, study, series, position in jobs:
        dicom(root / name, study, series, position)
    return root


def test_series_are_gathered_from_all_folders(tmp_path: Path) -> None:
    found = find_studies(archive(tmp_path))
    assert names(found) == {"1.2.1": ["0001-t1_tse", "0002-t2_tse", "0010-t10_tse"], "1.2.2": ["0001-t1_tse"]}
    first = found.studies[0].scans[0]
    assert [str(f.relative_to(tmp_path)) for f in first.files] == ["a/IM1", "a/IM2", "a/IM3", "b/c/6.dcm", "b/c/5.dcm"]
    assert found.rejected == []


def test_a_walk_is_sorted(tmp_path: Path) -> None:
    files, problems = walk(archive(tmp_path, random.Random(0).shuffle))
    assert (files, len(files), problems) == (sorted(files), 11, [])


def test_order_of_creation_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for seed in range(4):
        root = tmp_path / str(seed)
        archive(root, random.Random(seed).shuffle)
        dicom(root / f"copy{seed % 2}" / "IM1", "1", "1.1", 1)
        (root / "broken.dcm").write_bytes(b"x")
        monkeypatch.chdir(root)
        results.append(find_studies(".", workers=1 + seed % 2))
    monkeypatch.setattr("hlip.data.files.FILES_PER_JOB", 3)
    results.append(find_studies(".", workers=2))
    assert results[0].studies == results[1].studies == results[2].studies == results[3].studies == results[4].studies
    assert results[0].rejected == results[2].rejected
    assert results[1].rejected == results[3].rejected == results[4].rejected


def test_nothing_of_the_patient_is_kept(tmp_path: Path) -> None:
    dicom(tmp_path / "a")
    dicom(tmp_path / "b", series="1.2", SeriesInstanceUID=None)
    found = find_studies(tmp_path)
    assert (len(found.studies), len(found.rejected)) == (1, 1)
    assert "SECRET" not in repr(found).upper()


@pytest.mark.parametrize("name", ["IM1", "scan.dcm", "deep/er/and/deeper/x.foo"])
@pytest.mark.parametrize("preamble", [True, False])
@pytest.mark.parametrize(
    ("syntax", "implicit", "little"), [("", True, True), (".1", False, True), (".2", False, False)]
)
def test_dicom_is_known_by_its_content(
    tmp_path: Path, name: str, preamble: bool, syntax: str, implicit: bool, little: bool
) -> None:
    path = dicom(tmp_path / name)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2{syntax}"
    if not preamble:
        del dataset.file_meta, dataset.preamble
    pydicom.dcmwrite(path, dataset, implicit_vr=implicit, little_endian=little, enforce_file_format=preamble)
    assert (path.read_bytes()[128:132] == b"DICM") is preamble
    assert names(find_studies(tmp_path)) == {"1.2.1": ["0001-t1_tse"]}


def test_long_headers_are_read_to_their_end(tmp_path: Path) -> None:
    """Private elements of 20 kB lie before the series' description, others before its rows."""
    path = dicom(tmp_path / "a")
    dataset = pydicom.dcmread(path)
    for group in (0x0009, 0x0019, 0x0021, 0x0027):
        block = dataset.private_block(group, "TEST", create=True)
        block.add_new(1, "OB", bytes(20_000))
    dataset.save_as(path)
    assert (names(find_studies(tmp_path)), path.stat().st_size > 80_000) == ({"1.2.1": ["0001-t1_tse"]}, True)


def test_names_of_series_are_clean_and_unique(tmp_path: Path) -> None:
    for i, (number, description) in enumerate(
        [
            (3, "a/b\\c"),
            (3, "a/b\\c"),
            (None, ""),
            (None, None),
            (-5, "x" * 64),
            (12345, " T2\tFLAIR  Größe "),
            (7, "\x1b\0"),
        ]
    ):
        dicom(tmp_path / str(i), series=f"1.{i + 1}", SeriesNumber=number, SeriesDescription=description)
    assert names(find_studies(tmp_path))["1.2.1"] == [
        "-005-" + "x" * 64,
        "0000",
        "0000~2",
        "0003-a_b_c",
        "0003-a_b_c~2",
        "0007-_x1b",
        "12345-T2_FLAIR_Größe",
    ]


def test_copies_of_instances_are_kept_once(tmp_path: Path) -> None:
    files = [dicom(tmp_path / "a" / str(i), position=i) for i in (1, 2, 3)]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = find_studies(tmp_path)
    assert found.studies[0].scans[0].files == tuple(files)
    assert only(found, "copy").reason.startswith("3 files repeat an instance")


def test_slices_with_one_instance_uid_are_told_apart(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        dicom(tmp_path / str(i), position=i, SOPInstanceUID="1.2.3")
    for i in (4, 5):
        dicom(tmp_path / str(i), position=i, SOPInstanceUID=None)
    found = find_studies(tmp_path)
    assert (len(found.studies[0].scans[0].files), found.rejected) == (5, [])


def test_a_series_sent_twice_under_other_uids_is_a_duplicate(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        dicom(tmp_path / f"a{i}", series="1.1", position=i, PixelData=bytes([i]) * 8192)
        dicom(tmp_path / f"b{i}", series="1.2", position=i, PixelData=bytes([i]) * 8192)
        dicom(tmp_path / f"c{i}", series="1.3", position=i, PixelData=bytes([min(i, 2)]) * 8192)
        dicom(tmp_path / f"d{i}", "2", series="2.1", position=i, PixelData=bytes([i]) * 8192)
    found = find_studies(tmp_path)
    assert names(found) == {"1.2.1": ["0001-t1_tse", "0003-t3_tse"], "1.2.2": ["0001-t1_tse"]}
    assert only(found, "duplicate") == Rejection("1.2.1", "0002-t2_tse", "duplicate", "the same image as 0001-t1_tse")


def test_a_series_in_two_studies(tmp_path: Path) -> None:
    for i in (1, 2):
        dicom(tmp_path / f"a{i}", "1", "9.1", i, SOPInstanceUID=f"1.2.{i}")
        dicom(tmp_path / f"b{i}", "2", "9.1", i, SOPInstanceUID=f"1.2.{i}")  # the same instances
        dicom(tmp_path / f"c{i}", "3", "9.1", i, SOPInstanceUID=f"1.2.3.{i}")  # an image of its own
    dicom(tmp_path / "d", "2", "2.2")
    found = find_studies(tmp_path)
    assert names(found) == {"1.2.1": ["0001-t1_tse"], "1.2.2": ["0002-t2_tse"], "1.2.3": ["0001-t1_tse"]}
    assert only(found, "duplicate").study == "1.2.2"
    assert only(found, "duplicate").reason == "a series of study 1.2.1, with the same instances"


# Other layouts


def test_layouts_of_nifti_and_tensors(tmp_path: Path) -> None:
    for seed, name in enumerate(
        [
            "p1/t2.nii.gz",
            "p1/T1.nii",
            "p2/flair/image.nii.gz",
            "p2/dwi/img.pt",
            "p3/ct.pt",
            "loose.nii.gz",
            "sub-01/anat/sub-01_T1w.nii.gz",
            "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz",
            "sub-02/ses-a/dwi/sub-02_ses-a_dwi.nii.gz",
            "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz",
            "site/sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz",
            "valid/valid_1/valid_1_a/valid_1_a_1.nii.gz",
            "valid/valid_1/valid_1_a/valid_1_a_2.nii.gz",
            "valid/valid_1/valid_1_b/valid_1_b_1.nii.gz",
        ]
    ):
        path = tmp_path / name
        tensor(path, seed) if name.endswith(".pt") else nifti(path, seed)
    dicom(tmp_path / "p1" / "IM1")
    for name in ("p1/t2.json", "p1/notes.txt", "README", "dataset_description.json", "sub-01/anat/sub-01_T1w.json"):
        (tmp_path / name).write_text("{}")
    nifti(tmp_path / "derivatives" / "seg" / "sub-01" / "sub-01_T1w.nii.gz", 99)
    found = find_studies(tmp_path)
    assert names(found) == {
        "1.2.1": ["0001-t1_tse"],
        "loose": ["loose.nii.gz"],
        "p1": ["T1.nii", "t2.nii.gz"],
        "p2": ["dwi", "flair image.nii.gz"],
        "p3": ["ct.pt"],
        "site/sub-02_ses-b": ["sub-02_ses-b_T1w.nii.gz"],
        "sub-01": ["sub-01_T1w.nii.gz"],
        "sub-02_ses-a": ["sub-02_ses-a_T1w.nii.gz", "sub-02_ses-a_dwi.nii.gz"],
        "sub-02_ses-b": ["sub-02_ses-b_T1w.nii.gz"],
        "valid_1_a": ["valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz"],
        "valid_1_b": ["valid_1_b_1.nii.gz"],
    }
    assert rules(found) == {"derived": 1}
    assert {scan.kind for study in found.studies for scan in study.scans} == {"nifti", "tensor", "dicom"}


def test_repeated_files_are_found_by_their_content(tmp_path: Path) -> None:
    nifti(tmp_path / "p" / "a.nii", 0)
    shutil.copy(tmp_path / "p" / "a.nii", tmp_path / "p" / "b.nii")
    nifti(tmp_path / "p" / "c.nii", 1)  # as long, and other voxels
    content = (tmp_path / "p" / "c.nii").read_bytes()
    for name, level in (("d", 1), ("e", 9)):
        (tmp_path / "p" / f"{name}.nii.gz").write_bytes(gzip.compress(content, level))
    shutil.copytree(tmp_path / "p", tmp_path / "q")
    found = find_studies(tmp_path, workers=2)
    assert names(found) == {uid: ["a.nii", "c.nii"] for uid in ("p", "q")}
    assert [(r.scan, r.reason) for r in found.rejected if r.study == "p"] == [
        ("b.nii", "the same image as a.nii"),
        ("d.nii.gz", "the same image as c.nii"),
        ("e.nii.gz", "the same image as c.nii"),
    ]
    for name in ("a.nii", "b.nii", "c.nii"):
        (tmp_path / "q" / name).unlink()
    assert names(find_studies(tmp_path / "q")) == {"d": ["d.nii.gz"], "e": ["e.nii.gz"]}  # two studies by their place
    (tmp_path / "r").mkdir()
    shutil.move(tmp_path / "q", tmp_path / "r" / "s")
    assert names(find_studies(tmp_path / "r")) == {"s": ["d.nii.gz"]}


def test_a_folder_of_studies_that_is_taken_for_one_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        nifti(tmp_path / "raw" / f"p{seed % 2}" / f"s{seed}.nii", seed)
    assert list(names(find_studies(tmp_path))) == ["raw"]
    assert f"{tmp_path / 'raw'}: taken as one study of 4 files in 2 folders" in caplog.text
    caplog.clear()
    assert list(names(find_studies(tmp_path / "raw"))) == ["p0", "p1"]
    shutil.copytree(tmp_path / "raw", tmp_path / "other")
    find_studies(tmp_path)
    assert not caplog.text
    monkeypatch.setattr("hlip.data.sources.MANY_SCANS", 3)
    find_studies(tmp_path)
    assert caplog.text.count("taken as one study") == 2


def test_broken_volumes_of_ct_rate_are_left_out(tmp_path: Path) -> None:
    for seed, name in enumerate(["train_1267_a_3", "train_1267_a_4", "train_11755_a_3", "train_11755_a_4"]):
        nifti(tmp_path / f"{name}.nii.gz", seed)
    found = find_studies(tmp_path)
    assert names(found) == {"train_1267_a": ["train_1267_a_3.nii.gz"]}
    assert rules(found) == {"known_broken": 3, "no_scans": 1}


# Folders that a hospital, or an attacker, leaves behind


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """As a user who may not read everything, also where tests run as root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def link_loop(root: Path) -> None:
    (root / "loop").symlink_to(root)
    (root / "self.nii.gz").symlink_to(root / "self.nii.gz")


def deep_sequences(root: Path) -> None:
    """Ten thousand sequences, each in the last: more than a parser by recursion can follow."""
    nested = struct.pack("<HH2sHIHHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    (root / "deep.dcm").write_bytes(bytes(128) + b"DICM" + nested * 10_000)


def deflate_bomb(root: Path) -> None:
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    path = dicom(root / "bomb.dcm")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset)
    meta = path.read_bytes()
    meta = meta[: 144 + struct.unpack("<I", meta[140:144])[0]]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, 2**29) + bytes(2**22)
    path.write_bytes(
        meta + packer.compress(zeros) + b"".join(packer.compress(bytes(2**22)) for _ in range(80)) + packer.flush()
    )


HOSTILE: dict[str, tuple[Callable[[Path], Any], dict[str, int]]] = {
    "link to a file outside": (lambda root: (root / "x.nii").symlink_to(ANATOMICAL), {"link": 1}),
    "link to a folder outside": (lambda root: (root / "x").symlink_to(DICOM), {"link": 1}),
    "dead link": (lambda root: (root / "x.nii").symlink_to(root / "nowhere"), {"link": 1}),
    "loops of links": (link_loop, {"link": 2}),
    "link to a device": (lambda root: (root / "x.nii").symlink_to("/dev/zero"), {"link": 1}),
    "link to a file that is there": (lambda root: (root / "x.nii").symlink_to(root / "good" / "a.nii"), {}),
    "pipe": (lambda root: os.mkfifo(root / "x.dcm"), {"unreadable": 1}),
    "text called DICOM": (lambda root: (root / "x.dcm").write_text("hello"), {"unreadable": 1}),
    "empty file called DICOM": (lambda root: (root / "x.dcm").write_bytes(b""), {"unreadable": 1}),
    "empty file": (lambda root: (root / "x").write_bytes(b""), {}),
    "noise": (lambda root: (root / "x").write_bytes(np.random.default_rng(0).bytes(10_000)), {}),
    "noise behind the mark": (
        lambda root: (root / "x").write_bytes(bytes(128) + b"DICM" + np.random.default_rng(0).bytes(10_000)),
        {"no_uid": 1},
    ),
    "begins like DICOM by chance": (lambda root: (root / "x").write_bytes(b"\x08\0\0\0\4\0\0\0" + bytes(50)), {}),
    "DICOM cut in its header": (
        lambda root: (root / "x").write_bytes((DICOM / "MR_small.dcm").read_bytes()[:300]),
        {"no_uid": 1},
    ),
    "no uids": (lambda root: dicom(root / "x", StudyInstanceUID=None), {"no_uid": 1}),
    "deep sequences": (deep_sequences, {"unreadable": 1}),
    "deflate bomb": (deflate_bomb, {"unreadable": 1}),
    "report as DICOM": (lambda root: shutil.copy(DICOM / "test-SR.dcm", root / "x"), {"no_image": 1, "no_scans": 1}),
    "DICOMDIR": (lambda root: shutil.copy(DICOM / "dicomdirtests" / "DICOMDIR", root / "x"), {}),
    "hidden files": (lambda root: [(root / n).write_bytes(b"x") for n in (".DS_Store", "._a.nii", ".x.dcm")], {}),
    "hidden folder": (lambda root: nifti(root / ".git" / "a.nii"), {}),
    "folder called NIfTI": (lambda root: (root / "x.nii").mkdir(), {}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(tmp_path: Path, case: str) -> None:
    make, expected = HOSTILE[case]
    nifti(tmp_path / "good" / "a.nii")
    make(tmp_path)
    found = find_studies(tmp_path)
    assert names(found)["good"] == ["a.nii"]
    assert (rules(found), len(found.studies)) == (expected, 1)
    assert all(r.reason and len(r.reason) < 300 for r in found.rejected)


def test_a_deflate_bomb_is_not_unpacked(tmp_path: Path) -> None:
    deflate_bomb(tmp_path)
    assert only(find_studies(tmp_path), "unreadable").reason.endswith("bytes when inflated)")


def test_unreadable_folders_and_files_are_named() -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        root = Path(place)
        root.chmod(0o755)
        nifti(root / "good" / "a.nii")
        dicom(root / "open" / "IM1")
        dicom(root / "closed" / "IM1")
        (root / "open" / "IM1").chmod(0)
        (root / "closed").chmod(0)
        with without_rights():
            found = find_studies(root)
        (root / "closed").chmod(0o700)
    assert names(found) == {"good": ["a.nii"]}
    assert [(r.scan, r.rule) for r in found.rejected] == [("closed", "unreadable"), ("open/IM1", "unreadable")]
    assert all("permission denied" in r.reason for r in found.rejected)


def test_long_and_strange_names(tmp_path: Path) -> None:
    long = "x" * 240
    nifti(tmp_path / long / f"{long}.nii.gz", 0)
    nifti(tmp_path / long / f"{long}y.nii.gz", 1)
    for i, name in enumerate([b"\xff\xfe", b"\xff\xfd", "中 文".encode(), b"new\nline", "e\u0301".encode()]):
        nifti(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) / "a b.nii", i)
    found = find_studies(tmp_path)
    assert names(found) == {
        long: ["x" * 120, "x" * 112 + "~2"],
        "中 文": ["a_b.nii"],
        "new\\nline": ["a_b.nii"],
        "\\udcff\\udcfd": ["a_b.nii"],
        "\\udcff\\udcfe": ["a_b.nii"],
        "é": ["a_b.nii"],
    }
    json.dumps(names(found), ensure_ascii=False).encode()  # nothing that cannot be written
    assert all(read_nifti(scan.files[0]).array.size for study in found.studies for scan in study.scans)


def test_folders_whose_names_read_the_same_are_not_mixed(tmp_path: Path) -> None:
    nifti(tmp_path / "\u00e9" / "a.nii")
    nifti(tmp_path / "e\u0301" / "b.nii")
    found = find_studies(tmp_path)
    assert names(found) == {"\u00e9": ["b.nii"]}
    assert rules(found) == {"name_clash": 1}


def test_damaged_twins_are_left_to_their_reader(tmp_path: Path) -> None:
    content = bytearray(nifti(tmp_path / "p" / "a.nii.gz").read_bytes())
    content[len(content) // 2] ^= 255
    for name in ("a", "b"):
        (tmp_path / "p" / f"{name}.nii.gz").write_bytes(content)
        (tmp_path / "p" / f"{name}0.nii").write_bytes(b"")
    found = find_studies(tmp_path)
    assert (len(found.studies[0].scans), found.rejected) == (4, [])
    with pytest.raises(ScanError, match="truncated or corrupt"):
        read_nifti(found.studies[0].scans[0].files[0])


def test_a_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    nifti(tmp_path / "good" / "a.nii")
    inner = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):  # 5000 characters, which no call takes at once
        os.mkdir("y" * 250, dir_fd=inner)
        inner, outer = os.open("y" * 250, os.O_RDONLY, dir_fd=inner), inner
        os.close(outer)
    os.close(inner)
    found = find_studies(tmp_path)
    assert (names(found), rules(found)) == ({"good": ["a.nii"]}, {"unreadable": 1})
    assert "file name too long" in found.rejected[0].reason


def test_links_within_a_folder_stand_for_their_files(tmp_path: Path) -> None:
    """As git-annex keeps the files of BIDS data sets."""
    real = nifti(tmp_path / ".git" / "annex" / "abc.nii.gz")
    link = tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    link.parent.mkdir(parents=True)
    link.symlink_to(real)
    found = find_studies(tmp_path)
    assert (names(found), found.rejected) == ({"sub-01": ["sub-01_T1w.nii.gz"]}, [])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: None, "no scans .*DICOM.* in this folder"),
        (lambda root: (root / "notes.txt").write_text("hello"), "no scans"),
        (lambda root: root.rmdir(), "expected a folder, a study list"),
    ],
)
def test_nothing_to_be_found(tmp_path: Path, make: Callable[[Path], Any], reason: str) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    make(root)
    with pytest.raises(ValueError, match=f"^{root}: {reason}"):
        find_studies(root)


def test_progress_sees_every_file(tmp_path: Path) -> None:
    seen = []

    def progress(items: Iterable, total: int, desc: str, unit: str) -> Iterator:
        for count, item in enumerate(items, 1):
            seen.append((desc, unit, count, total))
            yield item

    find_studies(archive(tmp_path), workers=2, progress=progress)
    assert seen == [
        *(("reading headers", "file", i, 11) for i in range(1, 12)),
        *(("comparing scans", "study", i, 2) for i in (1, 2)),
    ]


# Study lists


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def test_a_list_of_scans(tmp_path: Path) -> None:
    path = write(
        tmp_path / "list.json",
        {
            "p7": {"scans": ["b.nii", "a.nii"], "impressions": [" No stroke. ", "Normal."], "findings": ["Clear."]},
            "p8": {"scans": ["/data/c.nii"]},
            "Пациент": {"scans": [], "findings": ["Ясно."]},
            "p9": {"scans": ["a-b/x.nii", "a/x.nii", "a/T1/img.pt"]},
            "p10": {"scans": ["T1/img.pt"]},
        },
    )
    found = find_studies(str(path))
    assert names(found) == {
        "p10": ["T1"],
        "p7": ["a.nii", "b.nii"],
        "p8": ["c.nii"],
        "p9": ["a T1", "a x.nii", "a-b x.nii"],  # as the folders are sorted
    }
    p7 = found.studies[1]
    assert (p7.impression, p7.findings) == ("No stroke. Normal.", "Clear.")
    assert p7.scans[0].files == (tmp_path / "a.nii",)
    assert found.studies[2].scans[0].files == (Path("/data/c.nii"),)
    assert found.rejected == [Rejection("Пациент", "", "no_scans", "no scan of it can be used")]


def test_a_list_of_series_below_a_root(tmp_path: Path) -> None:
    root = tmp_path / "data"
    tensor(root / "p7" / "T1.pt", 0)
    tensor(root / "p7" / "FLAIR" / "img.pt", 1)
    nifti(root / "p7" / "ct.nii.gz", 2)
    for i in (1, 2):
        dicom(root / "p7" / "DWI" / str(i), position=i)
    series = {name: {"plane": "axial"} for name in ("T1", "FLAIR", "ct", "DWI", "absent")}
    path = write(tmp_path / "l.json", {"p7": {"series": series, "report": ["FINDINGS: Clear.", "IMPRESSION: Normal."]}})
    found = find_studies(path, root=root)
    assert names(found) == {"p7": ["0001-t1_tse", "FLAIR", "T1", "ct"]}
    assert [len(scan.files) for scan in found.studies[0].scans] == [2, 1, 1, 1]
    assert (found.studies[0].impression, found.studies[0].findings) == ("Normal.", "Clear.")
    assert found.rejected == [Rejection("p7", "absent", "missing", "no such file")]


@pytest.mark.parametrize(
    "folder", ["", "valid/valid_1/valid_1_a", "valid_1/valid_1_a", "valid_fixed/valid_1/valid_1_a"]
)
def test_a_list_of_recons(tmp_path: Path, folder: str) -> None:
    for i in (1, 2):
        nifti(tmp_path / folder / f"valid_1_a_{i}.nii.gz", i)
    broken = ["train_11755_a_3.nii.gz", "train_11755_a_4.nii.gz"]
    content = {
        "valid_1_a": {
            "recons": ["valid_1_a_2.nii.gz", "valid_1_a_1.nii.gz"],
            "report": ["Findings: a.\nImpression: b."],
        },
        "train_11755_a": {"recons": broken, "report": []},
    }
    found = find_studies(write(tmp_path / "ct.json", content))
    assert names(found) == {"valid_1_a": ["valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz"]}
    assert [scan.files[0] for scan in found.studies[0].scans] == sorted((tmp_path / folder).glob("*.nii.gz"))
    assert (found.studies[0].impression, found.studies[0].findings) == ("b.", "a.")
    assert rules(found) == {"known_broken": 2, "no_scans": 1}


def test_lists_may_name_dicom_files_and_folders(tmp_path: Path) -> None:
    archive(tmp_path / "data")
    content = {
        "p7": {"scans": ["data/a/IM1", "data/a/IM2"]},
        "p8": {"scans": ["data"]},
        "p9": {"scans": ["list.json", "absent", "bad.dcm", "data/b"]},
    }
    (tmp_path / "bad.dcm").write_bytes(b"x")
    found = find_studies(write(tmp_path / "list.json", content), workers=2)
    assert names(found) == {
        "p7": ["0001-t1_tse"],
        "p8": ["0001-t1_tse", "0001-t1_tse~2", "0002-t2_tse", "0010-t10_tse"],
        "p9": ["0001-t1_tse"],
    }
    assert [(r.study, r.scan, r.rule) for r in found.rejected] == [
        ("p9", "absent", "missing"),
        ("p9", "bad.dcm", "unreadable"),
        ("p9", "list.json", "unreadable"),
    ]


SCANS = "study p7: expected an object with a list of 'scans'"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable study list"),
        (b"{", "not a readable study list"),
        (b"[" * 100_000, "not a readable study list"),
        ('{"Größe": {}}'.encode("latin-1"), "not a readable study list"),
        (b"[]", "expected an object"),
        (b'"p7"', "expected an object"),
        (b"{}", "expected an object"),
        (b'{"p7": ["a.nii"]}', SCANS),
        (b'{"p7": {}}', SCANS),
        (b'{"p7": {"scans": "a.nii"}}', SCANS),
        (b'{"p7": {"recons": {"a.nii": 1}}}', SCANS),
        (b'{"p7": {"series": ["a"]}}', SCANS),
        (b'{"p7": {"scans": ["a.nii"], "series": {"a": {}}}}', SCANS),
        (b'{"p7": {"scans": ["a.nii", 3]}}', "study p7: 'scans' must be file names"),
        (b'{"p7": {"series": {"": {}}}}', "study p7: 'series' must be file names"),
        (b'{"p7": {"scans": [], "impressions": "Normal."}}', "study p7: 'impressions' must be a list"),
        (b'{"p7": {"scans": [], "impressions": [1]}}', "study p7: 'impressions' must be a"),
        (b'{"p7": {"scans": [], "findings": null}}', "study p7: 'findings' must be a list"),
        (b'{"p7": {"scans": [], "report": {}}}', "study p7: 'report' must be a list"),
        (b'{"p7": {"scans": ["x.nii"]}, "p7": {"scans": ["y.nii"]}}', "not a readable study list .*'p7' occurs twice"),
        ('{"\u00e9": {"scans": []}, "e\u0301": {"scans": []}}'.encode(), "'\u00e9' occurs twice"),
        (b'{"p7": {"scans": ["x.nii", "x.nii"]}}', "study p7: .*x.nii: the same scan is given twice"),
    ],
)
def test_malformed_study_lists(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        find_studies(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_lists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json: not a readable study list"):
        find_studies(tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"absent\.csv: not a readable table"):
        find_studies(tmp_path / "absent.csv")


# Tables


def test_a_table_with_a_row_per_scan(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        "study_uid,path,Findings,impression,stroke,age_years,scanner,PatientID\n"
        'p7,b.nii,"Clear,\nand dry.",Normal.,0,61,A,1\n'
        'p7,a.nii,"Clear,\nand dry.",Normal.,0,61,A,1\n'
        "p8,/data/c.nii,,,1,,B,2\n",
    )
    found = find_studies(path)
    assert names(found) == {"p7": ["a.nii", "b.nii"], "p8": ["c.nii"]}
    p7, p8 = found.studies
    assert (p7.impression, p7.findings) == ("Normal.", "Clear, and dry.")
    assert p7.labels == (("stroke", 0.0), ("age_years", 61.0))
    assert p8 == StudySource("p8", p8.scans, labels=(("stroke", 1.0),))


def test_a_table_of_studies_in_a_folder(tmp_path: Path) -> None:
    for i, name in enumerate(["valid_1_a_1", "valid_1_a_2", "valid_2_a_1"]):
        nifti(tmp_path / "data" / f"{name}.nii.gz", i)
    path = write(
        tmp_path / "t.csv",
        "VolumeName,Findings_EN,Impressions_EN,Nodule\n"
        "valid_1_a_1.nii.gz,a,b,1\n"
        "valid_1_a_2.nii.gz,a,b,1\n"
        "valid_3_a_1.nii.gz,c,d,0\n",
    )
    nifti(tmp_path / "data" / "train_1267_a_4.nii.gz")  # rejected, but not asked for
    found = find_studies(path, root=tmp_path / "data")
    assert names(found) == {"valid_1_a": ["valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz"]}
    study = found.studies[0]
    assert (study.impression, study.findings, study.labels) == ("b", "a", (("Nodule", 1.0),))
    assert found.rejected == [Rejection("valid_3_a", "", "missing", "no scans of it in the folder")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a readable table .*needs a column of study, study_uid, VolumeName"),
        ("patient,path\nx,y\n", "not a readable table .*needs a column of study"),
        ("study,a,a\nx,1,2\n", "not a readable table .*no column twice"),
        ("study,path\n", "it has no rows"),
        ("study,path\np7\n", "line 2: expected 2 cells"),
        ("study,path\np7,a,b\n", "line 2: expected 2 cells"),
        ("study,path\n ,a.nii\n", "line 2: no study"),
        ("study,path\np7,\n", "line 2: no path"),
        ("study,path\np7,a.nii\np7,a.nii\n", "study p7: .*a.nii: the same scan is given twice"),
        ("study,path,x\np7,a.nii,1\np8,b.nii,one\n", "line 3: column 'x' has numbers, and 'one'"),
        ("study,path,x\np7,a.nii,1\np8,b.nii,nan\n", "line 3: column 'x' has numbers, and 'nan'"),
        ("study,path,x\np7,a.nii,1\np7,b.nii,2\n", "line 3: another labels of study p7"),
        ("study,path,report\np7,a.nii,one\np7,b.nii,two\n", "line 3: another report of study p7"),
        ("study,path\np7,\xff\n".encode("latin-1"), "not a readable table"),
    ],
)
def test_malformed_tables(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        find_studies(path)
    assert str(caught.value).startswith(f"{path}: ")


# Reports and labels


@pytest.fixture
def two(tmp_path: Path) -> Path:
    nifti(tmp_path / "in" / "p7" / "a.nii", 0)
    nifti(tmp_path / "in" / "p8" / "a.nii", 1)
    return tmp_path / "in"


def test_reports_and_labels_are_joined_by_study(two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reports = write(tmp_path / "r.json", {"p7": "IMPRESSION: Normal.", "p9": "FINDINGS: Gone.", "p10": "x"})
    labels = write(tmp_path / "l.csv", "study,stroke,mass\np8,1,0.5\np7,0,\n")
    with caplog.at_level(logging.WARNING):
        found = find_studies(two, reports=reports, labels=labels)
    assert [(s.uid, s.impression, s.findings, s.labels) for s in found.studies] == [
        ("p7", "Normal.", "", (("stroke", 0.0),)),
        ("p8", "", "", (("stroke", 1.0), ("mass", 0.5))),
    ]
    assert [r.getMessage() for r in caplog.records] == [f"{reports}: 2 of 3 studies were not found"]


def test_reports_of_quite_other_studies_are_an_error(two: Path, tmp_path: Path) -> None:
    reports = write(tmp_path / "r.json", {"x": "Normal."})
    with pytest.raises(ValueError, match=f"{reports}: none of its 1 studies was found; it has x, there is p7"):
        find_studies(two, reports=reports)
    labels = write(tmp_path / "l.csv", "study,stroke\nx,1\n")
    with pytest.raises(ValueError, match=f"{labels}: none of its 1 studies was found"):
        find_studies(two, labels=labels)


# One study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of three scans, written in another order than the sorted one."""
    study = tmp_path / "p7"
    for seed, name in enumerate(["c.nii.gz", "a.nii", "sub/b.nii.gz"]):
        nifti(study / name, seed)
    (study / "report.txt").write_text("No stroke.")
    (study / "a.json").write_text("{}")
    return study


def test_scans_of_a_study_are_those_of_its_folder_or_files(folder: Path) -> None:
    files = [folder / "a.nii", folder / "c.nii.gz", folder / "sub" / "b.nii.gz"]
    for paths in (folder, str(folder), files, [str(file) for file in files[::-1]], iter(files)):
        scans = find_scans(paths)
        assert [scan.files for scan in scans] == [(file,) for file in files]
        assert [scan.name for scan in scans] == ["a.nii", "c.nii.gz", "sub b.nii.gz"]
    assert [scan.name for scan in find_scans(folder / "a.nii")] == ["a.nii"]


def test_a_study_by_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [scan.name for scan in find_scans(".")] == ["a.nii", "c.nii.gz", "sub b.nii.gz"]


def test_hidden_files_are_no_scans_and_case_is_free(folder: Path) -> None:
    (folder / "._a.nii").write_bytes(b"resource fork")
    (folder / "c.nii.gz").rename(folder / "C.NII.GZ")
    assert [scan.name for scan in find_scans(folder)] == ["C.NII.GZ", "a.nii", "sub b.nii.gz"]


def test_a_study_of_dicom_files(tmp_path: Path) -> None:
    archive(tmp_path)
    (tmp_path / "a" / "other1").unlink()
    (tmp_path / "a" / "other2").unlink()
    shutil.copy(DICOM / "dicomdirtests" / "DICOMDIR", tmp_path)
    scans = find_scans(tmp_path)
    assert [(scan.name, len(scan.files)) for scan in scans] == [
        ("0001-t1_tse", 5),
        ("0002-t2_tse", 2),
        ("0010-t10_tse", 2),
    ]
    assert find_scans([tmp_path / "a", tmp_path / "b", tmp_path / "Größe 中"]) == scans
    assert find_scans(tmp_path / "a" / "IM1")[0].files == (tmp_path / "a" / "IM1",)


def test_dicom_of_two_studies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: DICOM files of 2 studies: 1.2.1, 1.2.2"):
        find_scans(archive(tmp_path))


def test_what_is_no_study_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.nii: the same scan is given twice"):
        find_scans([folder / "a.nii", folder / "c.nii.gz", folder / "a.nii"])
    with pytest.raises(ValueError, match="at least one scan file"):
        find_scans([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/empty: no scans"):
        find_scans(tmp_path / "empty")
    with pytest.raises(ScanError, match=r"absent.dcm: no such file"):
        find_scans(tmp_path / "absent.dcm")
    with pytest.raises(ScanError, match=r"report.txt: not an image"):
        find_scans([folder / "a.nii", folder / "report.txt"])
    (folder / "x.nii").symlink_to(ANATOMICAL)
    with pytest.raises(ScanError, match=r"x.nii: the link leads out of the folder"):
        find_scans(folder)


def test_columns_that_identify_are_no_labels(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    names = ["PATIENTID", "STUDYDATE", "Accession#", "patientnr", "HospitalNumber", "MRN_1", "birthYear", "scan no"]
    kept = ["abnormal", "normal", "nodule", "midline_shift", "dilated"]
    table.write_text(",".join(["study", *names, *kept]) + "\n" + ",".join(["s1"] + ["1"] * (len(names) + len(kept))))
    found = Table.read(table).labels()
    assert [name for name, _ in found["s1"]] == kept


def test_fixed_volumes_of_ct_rate_are_preferred(tmp_path: Path) -> None:
    place = "valid_1/valid_1_a/valid_1_a_{}.nii.gz"
    for number in (1, 2):
        nifti(tmp_path / "valid" / place.format(number), number)
    fixed = tmp_path / "valid_fixed" / place.format(1)
    nifti(fixed, 1)
    found = find_studies(tmp_path)
    assert names(found) == {"valid_1_a": ["valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz"]}
    assert found.studies[0].scans[0].files == (fixed,)
    assert [(r.scan, r.rule) for r in found.rejected] == [("valid/" + place.format(1), "superseded")]
    (tmp_path / "list.json").write_text('{"valid_1_a": {"recons": ["valid_1_a_1.nii.gz"], "report": ["Clear."]}}')
    assert find_studies(tmp_path / "list.json").studies[0].scans[0].files == (fixed,)
