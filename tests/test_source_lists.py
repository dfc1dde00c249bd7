"""Study lists, tables, reports and labels."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hlip.prepare.discover import find_studies
from hlip.prepare.tables import Table
from hlip.read.scan import Rejection
from hlip.study import StudyRecord
from source_files import archive, dicom, names, nifti, rules, tensor

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")


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
    assert p7.labels == {"stroke": 0.0}
    assert p8 == StudyRecord("p8", p8.scans, labels={"stroke": 1.0})


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
    assert (study.impression, study.findings, study.labels) == ("b", "a", {"Nodule": 1.0})
    assert found.rejected == [Rejection("valid_3_a", "", "missing", "no scans of it in the folder")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a readable table .*needs a column of study, study_uid, VolumeName"),
        ("patient,path\nx,y\n", "not a readable table .*needs a column of study"),
        ("study,a,a\nx,1,2\n", "not a readable table .*line 1: column 'a' occurs twice"),
        ("study,path\n", "it has no rows"),
        ("study,path\np7\n", "line 2: expected 2 cells"),
        ("study,path\np7,a,b\n", "line 2: expected 2 cells"),
        ("study,path\n ,a.nii\n", "line 2: no study"),
        ("study,path\np7,\n", "line 2: no path"),
        ("study,path\np7,a.nii\np7,a.nii\n", "study p7: .*a.nii: the same scan is given twice"),
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
        ("p7", "Normal.", "", {"stroke": 0.0}),
        ("p8", "", "", {"stroke": 1.0, "mass": 0.5}),
    ]
    assert [r.getMessage() for r in caplog.records] == [f"{reports}: 2 of 3 studies were not found"]


def test_reports_without_a_text_are_an_error(two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Empty, or under headings that are left out; those of studies that are not there do not count."""
    for text in ("", " \n", "TECHNIQUE: CT of the head."):
        reports = write(tmp_path / "r.json", {"p7": text, "p8": "", "elsewhere": "Normal."})
        with pytest.raises(ValueError, match=f"{reports}: none of the 2 reports of these studies has an impression"):
            find_studies(two, reports=reports)
    reports = write(tmp_path / "r.json", {"p7": "Normal.", "p8": "TECHNIQUE: CT of the head."})
    caplog.clear()
    assert [study.findings for study in find_studies(two, reports=reports).studies] == ["Normal.", ""]
    assert [r.getMessage() for r in caplog.records] == [
        f"{reports}: 1 of 2 reports have neither an impression nor findings"
    ]


def test_reports_of_quite_other_studies_are_an_error(two: Path, tmp_path: Path) -> None:
    reports = write(tmp_path / "r.json", {"x": "Normal."})
    with pytest.raises(ValueError, match=f"{reports}: none of its 1 studies was found; it has x, there is p7"):
        find_studies(two, reports=reports)
    labels = write(tmp_path / "l.csv", "study,stroke\nx,1\n")
    with pytest.raises(ValueError, match=f"{labels}: none of its 1 studies was found"):
        find_studies(two, labels=labels)


def test_only_numbers_within_one_are_labels_unless_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {
        "study": "s1 s1 s2", "acc": "7731001 7731001 7731002", "Geburtsdatum": "19470313 19470313 19500101",
        "age": "75 75 75Y", "thickness": "1.0 5.0 1.0", "contrast": "0 1 0", "nodule": "1 1 -1", "soft": "0.5 0.5 ",
    }  # fmt: skip
    rows = zip(*(cells.split(" ") for cells in content.values()), strict=True)
    table = write(tmp_path / "labels.csv", "\n".join(map(",".join, [content.keys(), *rows])) + "\n")
    found = Table.read(table).labels()
    assert found == {"s1": {"nodule": 1.0, "soft": 0.5}, "s2": {"nodule": -1.0}}
    assert "unless they are asked for (--label_columns): acc, Geburtsdatum, thickness, contrast" in caplog.text
    assert Table.read(table).labels((), ["acc"])["s2"] == {"acc": 7731002.0}
    for wanted, message in [
        ("age", "labels.csv: line 4: column 'age' of labels: expected a number, got '75Y'"),
        ("thickness", "labels.csv: line 3: another labels of study s1"),
        ("sex", "labels.csv: no column 'sex' of labels; there are acc, "),
    ]:
        with pytest.raises(ValueError, match=message):
            Table.read(table).labels((), [wanted])


def test_a_table_of_reports_gives_labels_where_it_is_given_as_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nifti(tmp_path / "in" / "p7" / "a.nii", 0)
    table = write(tmp_path / "r.csv", "study,impression,tumor,age\np7,Normal.,0,75\n")
    found = find_studies(tmp_path / "in", reports=table)
    assert (found.studies[0].impression, found.studies[0].labels) == ("Normal.", {})
    assert f"{table}: columns that are not taken as labels, as this is a table of reports: tumor; to" in caplog.text
    caplog.clear()
    assert find_studies(tmp_path / "in", reports=table, labels=table).studies[0].labels == {"tumor": 0.0}
    assert "table of reports" not in caplog.text


def test_labels_of_a_list_are_asked_for_too(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", 0)
    path = write(tmp_path / "t.csv", "study,path,age,tumor\np7,a.nii,75,1\n")
    assert find_studies(path).studies[0].labels == {"tumor": 1.0}
    assert find_studies(path, label_columns=["age"]).studies[0].labels == {"age": 75.0}
    with pytest.raises(ValueError, match="label_columns age: there is no table of labels; give labels, too"):
        find_studies(tmp_path, label_columns=["age"])


def test_reports_are_joined_by_accession_number(tmp_path: Path) -> None:
    for k in (1, 2, 3):
        dicom(tmp_path / "in" / f"{k}.dcm", study=f"{k}", AccessionNumber=f"A{k}" if k < 3 else None)
    reports = write(tmp_path / "r.json", {"A1": "FINDINGS: One.", "A2": {"impression": None, "findings": "Two."}})
    labels = write(tmp_path / "l.csv", "study,x\nA2,1\n")
    found = find_studies(tmp_path / "in", reports=reports, labels=labels, join="accession")
    assert [(s.uid, s.findings, s.labels) for s in found.studies] == [
        ("1.2.1", "One.", {}), ("1.2.2", "Two.", {"x": 1.0}), ("1.2.3", "", {}),
    ]  # fmt: skip
    assert "A1" not in repr(found)
    with pytest.raises(ValueError, match="none of its 2 studies was found"):
        find_studies(tmp_path / "in", reports=reports)


@pytest.mark.parametrize(
    ("entry", "close"),
    [
        ({"scans": ["a.nii"], "reprot": ["x"]}, "report"),
        ({"scans": ["a.nii"], "impression": ["x"]}, "impressions"),
        ({"scans": ["a.nii"], "Findings": ["x"]}, "findings"),
    ],
)
def test_misspelt_names_of_a_list(entry: dict[str, Any], close: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"p7": entry}))
    with pytest.raises(ValueError, match=f"list.json: study p7: unknown field .*; did you mean {close}"):
        find_studies(path)
    nifti(tmp_path / "a.nii")
    path.write_text(json.dumps({"p7": {"scans": ["a.nii"], "age": 3, "scanner": "x"}}))
    assert [study.uid for study in find_studies(path).studies] == ["p7"]


def test_misspelt_columns_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nifti(tmp_path / "a.nii")
    path = tmp_path / "t.csv"
    path.write_text("study,path,Impresion_EN,age\np7,a.nii,Normal.,3\n")
    find_studies(path)
    assert "column 'Impresion_EN' is not read: unknown field 'impresion'; did you mean impression" in caplog.text
    assert "'age'" not in caplog.text
