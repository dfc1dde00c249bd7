"""Whatever cannot be used of a folder is named with its rule, and the rest is found."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hlip.prepare.discover import find_studies
from hlip.read.nifti import read_nifti
from hlip.read.scan import ScanError
from source_files import ANATOMICAL, DICOM, archive, dicom, names, nifti, only, rules

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")


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
        (lambda root: root.rmdir(), "no such file or folder"),
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
