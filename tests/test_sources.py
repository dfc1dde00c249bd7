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
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hlip.data.readers import ScanError, read_nifti
from hlip.data.sources import Found, Rejection, StudySource, find_scans, find_studies

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
    assert (angio.kind, angio.modality, angio.description, len(angio.files)) == ("dicom", "MR", "ANGIO Projected from C", 7)
    assert sum(len(scan.files) for study in found.studies for scan in study.scans) == 31
    # TINY_ALPHA: fifty files whose pixels were taken out
    assert (rules(found), only(found, "no_image").reason[:8]) == ({"no_image": 1, "no_scans": 1}, "50 files")


def test_all_of_pydicoms_odd_files_are_found_or_named() -> None:
    found = find_studies(DICOM)
    files = {file.name for study in found.studies for scan in study.scans for file in scan.files}
    assert {"CT_small.dcm", "ExplVR_BigEnd.dcm", "image_dfl.dcm", "693_J2KI.dcm"} <= files
    assert {r.scan for r in found.rejected if r.rule == "no_uid"} >= {"UN_sequence.dcm", "no_meta_group_length.dcm"}
    reasons = {r.reason for r in found.rejected if r.rule == "no_image"}
    assert {reason.partition(" without")[0] for reason in reasons} >= {"2 files of modality SR", "1 files of modality ECG"}
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
@pytest.mark.parametrize("little", [True, False])
@pytest.mark.parametrize("implicit", [True, False])
def test_dicom_is_known_by_its_content(tmp_path: Path, name: str, preamble: bool, little: bool, implicit: bool) -> None:
    path = dicom(tmp_path / name)
    if implicit and not little:
        pytest.skip("DICOM has no implicit big endian")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = bytes(len(dataset.PixelData))
    uids = {(True, True): "1.2.840.10008.1.2", (False, True): "1.2.840.10008.1.2.1", (False, False): "1.2.840.10008.1.2.2"}
    meta = dataset.file_meta
    meta.TransferSyntaxUID = uids[implicit, little]
    if preamble:
        pydicom.dcmwrite(path, dataset, implicit_vr=implicit, little_endian=little)
    else:
        del dataset.file_meta, dataset.preamble
        pydicom.dcmwrite(path, dataset, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
        assert path.read_bytes()[128:132] != b"DICM"
    assert names(find_studies(tmp_path)) == {"1.2.1": ["0001-t1_tse"]}


def test_names_of_series_are_clean_and_unique(tmp_path: Path) -> None:
    for i, (number, description) in enumerate(
        [(3, "a/b\\c"), (3, "a/b\\c"), (None, ""), (None, None), (-5, "x" * 64), (12345, " T2\tFLAIR  Größe "), (7, "\x1b\0")]
    ):
        dicom(tmp_path / str(i), series=f"1.{i + 1}", SeriesNumber=number, SeriesDescription=description)
    assert names(find_studies(tmp_path))["1.2.1"] == [
        "-005-" + "x" * 64,
        "0000",
        "0000~2",
        "0003-a_b_c",
        "0003-a_b_c~2",
        "0007-_x1b",
        "12345-T2_FLAIR_Gr_xf6_xdfe",
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
    assert only(found, "duplicate") == Rejection(
        "1.2.1", "0002-t2_tse", "duplicate", "the same image as 0001-t1_tse"
    )


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
    assert names(found) == {uid: ["a.nii", "c.nii", "d.nii.gz"] for uid in ("p", "q")}
    assert [(r.scan, r.reason) for r in found.rejected if r.study == "p"] == [
        ("b.nii", "the same image as a.nii"),
        ("e.nii.gz", "the same image as d.nii.gz"),
    ]


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
    item = struct.pack("<HHHHHHI", 0x0008, 0x1140, *struct.unpack("<HH", b"SQ\0\0"), 0xFFFF, 0xFFFF, 0) [:12]
    nested = struct.pack("<HH2sHIHHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    assert len(item) == 12
    (root / "deep.dcm").write_bytes(bytes(128) + b"DICM" + nested * 10_000)


def deflate_bomb(root: Path) -> None:
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    path = dicom(root / "bomb.dcm")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset)
    meta = path.read_bytes()[: 144 + dataset.file_meta.FileMetaInformationGroupLength]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, 2**29) + bytes(2**22)
    path.write_bytes(meta + packer.compress(zeros) + b"".join(packer.compress(bytes(2**22)) for _ in range(80)))


HOSTILE: dict[str, tuple[Callable[[Path], Any], dict[str, int]]] = {
    "link to a file outside": (lambda root: (root / "x.nii").symlink_to(ANATOMICAL), {"link": 1}),
    "link to a folder outside": (lambda root: (root / "x").symlink_to(DICOM), {"link": 1}),
    "dead link": (lambda root: (root / "x.nii").symlink_to(root / "nowhere"), {"link": 1}),
    "loops of links": (link_loop, {"link": 2}),
    "link to a device": (lambda root: (root / "x.nii").symlink_to("/dev/zero"), {"link": 1}),
    "link to a file that is there": (lambda root: (root / "x.nii").symlink_to(root / "good" / "a.nii"), {}),
    "pipe": (lambda root: os.mkfifo(root / "x.dcm"), {}),
    "text called DICOM": (lambda root: (root / "x.dcm").write_text("hello"), {"unreadable": 1}),
    "empty file called DICOM": (lambda root: (root / "x.dcm").write_bytes(b""), {"unreadable": 1}),
    "empty file": (lambda root: (root / "x").write_bytes(b""), {}),
    "noise": (lambda root: (root / "x").write_bytes(np.random.default_rng(0).bytes(10_000)), {}),
    "noise behind the mark": (
        lambda root: (root / "x").write_bytes(bytes(128) + b"DICM" + np.random.default_rng(0).bytes(10_000)),
        {"unreadable": 1},
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
    "unknown character set": (lambda root: dicom(root / "x", "1", SpecificCharacterSet="FOO 7"), None),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(tmp_path: Path, case: str) -> None:
    make, expected = HOSTILE[case]
    nifti(tmp_path / "good" / "a.nii")
    make(tmp_path)
    found = find_studies(tmp_path)
    assert names(found)["good"] == ["a.nii"]
    if expected is not None:
        assert (rules(found), len(found.studies)) == (expected, 1)
    assert all(r.reason and len(r.reason) < 300 for r in found.rejected)
