"""Studies are found wherever hospitals and data sets put them."""

from __future__ import annotations

import gzip
import random
import shutil
from pathlib import Path

import pytest

from hlip.prepare.discover import find_studies, find_study
from hlip.read.files import walk
from hlip.read.scan import Rejection, ScanError
from source_files import ANATOMICAL, DICOM, archive, dicom, names, nifti, only, rules, tensor

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")


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
    monkeypatch.setattr("hlip.read.headers.FILES_PER_JOB", 3)
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
    monkeypatch.setattr("hlip.prepare.discover.MANY_SCANS", 3)
    find_studies(tmp_path)
    assert caplog.text.count("taken as one study") == 2


def test_folders_of_several_scans_in_one_study_give_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        nifti(tmp_path / f"p{seed % 2}" / f"s{seed}.nii", seed)
    assert len(find_study(tmp_path).scans) == 4
    assert "taken as one study, with several scans in each of 2 folders" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr("hlip.prepare.discover.MANY_SCANS", 3)
        with pytest.raises(ValueError, match="4 scans in 2 folders are more than a study has"):
            find_study(tmp_path)
    caplog.clear()
    (tmp_path / "p0" / "s0.nii").unlink()
    assert len(find_study(tmp_path).scans) == 3 and not caplog.text


def test_broken_volumes_of_ct_rate_are_left_out(tmp_path: Path) -> None:
    for seed, name in enumerate(["train_1267_a_3", "train_1267_a_4", "train_11755_a_3", "train_11755_a_4"]):
        nifti(tmp_path / f"{name}.nii.gz", seed)
    found = find_studies(tmp_path)
    assert names(found) == {"train_1267_a": ["train_1267_a_3.nii.gz"]}
    assert rules(found) == {"known_broken": 3, "no_scans": 1}


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
        scans = find_study(paths).scans
        assert [scan.files for scan in scans] == [(file,) for file in files]
        assert [scan.name for scan in scans] == ["a.nii", "c.nii.gz", "sub b.nii.gz"]
    assert [scan.name for scan in find_study(folder / "a.nii").scans] == ["a.nii"]


def test_a_study_by_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [scan.name for scan in find_study(".").scans] == ["a.nii", "c.nii.gz", "sub b.nii.gz"]


def test_hidden_files_are_no_scans_and_case_is_free(folder: Path) -> None:
    (folder / "._a.nii").write_bytes(b"resource fork")
    (folder / "c.nii.gz").rename(folder / "C.NII.GZ")
    assert [scan.name for scan in find_study(folder).scans] == ["C.NII.GZ", "a.nii", "sub b.nii.gz"]


def test_a_study_of_dicom_files(tmp_path: Path) -> None:
    archive(tmp_path)
    (tmp_path / "a" / "other1").unlink()
    (tmp_path / "a" / "other2").unlink()
    shutil.copy(DICOM / "dicomdirtests" / "DICOMDIR", tmp_path)
    scans = find_study(tmp_path).scans
    assert [(scan.name, len(scan.files)) for scan in scans] == [
        ("0001-t1_tse", 5),
        ("0002-t2_tse", 2),
        ("0010-t10_tse", 2),
    ]
    assert find_study([tmp_path / "a", tmp_path / "b", tmp_path / "Größe 中"]).scans == scans
    assert find_study(tmp_path / "a" / "IM1").scans[0].files == (tmp_path / "a" / "IM1",)


def test_dicom_of_two_studies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: DICOM files of 2 studies: 1.2.1, 1.2.2"):
        find_study(archive(tmp_path))


def test_what_is_no_study_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.nii: the same scan is given twice"):
        find_study([folder / "a.nii", folder / "c.nii.gz", folder / "a.nii"])
    with pytest.raises(ValueError, match="at least one scan file"):
        find_study([])
    for wrong in (None, b"a.nii", 3, [None], [folder / "a.nii", float("nan")], {"a": folder / "a.nii"}):
        with pytest.raises(ValueError, match="expected a path or a list of paths"):
            find_study(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/empty: no scans"):
        find_study(tmp_path / "empty")
    with pytest.raises(ScanError, match=r"absent.dcm: no such file"):
        find_study(tmp_path / "absent.dcm")
    with pytest.raises(ScanError, match=r"report.txt: not an image"):
        find_study([folder / "a.nii", folder / "report.txt"])
    (folder / "x.nii").symlink_to(ANATOMICAL)
    with pytest.raises(ScanError, match=r"x.nii: the link leads out of the folder"):
        find_study(folder)
