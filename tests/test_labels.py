from __future__ import annotations

from pathlib import Path

import pytest

from hlip.evaluate.labels import read_column, read_label_table, read_labels


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.csv"


def test_a_table_and_what_is_no_label(path: Path) -> None:
    path.write_text(
        "VolumeName,a,b,age,set,empty\ntrain_1_a_1.nii.gz,1,,61,train,\ntrain_2_a_2.nii.gz,0.0,-1,0,test,\n"
        "train_3_a_1.nii.gz,1,1,1,,\n"
    )
    table = read_label_table(path)
    assert table.uids == ["train_1_a", "train_2_a", "train_3_a"]
    assert table.classes == ("a", "b")
    assert table.values.tolist() == [[1, -1], [0, -1], [1, 1]]
    words = {name: read_column(table.table, name)["train_2_a"] for name in ("age", "set", "empty")}
    assert words == {"age": "0", "set": "test", "empty": ""}
    assert read_label_table(path, ["b"]).classes == ("b",)


def test_volumes_of_a_study_agree_on_labels_and_need_not_on_others(path: Path) -> None:
    path.write_text(
        "VolumeName,a,set,kernel\nvalid_7_a_1.nii.gz,1,x,soft\nvalid_7_a_2.nii.gz,1,x,sharp\no.nii,0,y,soft\n"
    )
    table = read_label_table(path)
    assert (table.uids, table.values.tolist()) == (["valid_7_a", "o"], [[1], [0]])
    assert read_column(table.table, "set") == {"valid_7_a": "x", "o": "y"}
    with pytest.raises(ValueError, match=r"labels.csv: line 3: another kernel of study valid_7_a"):
        read_column(table.table, "kernel")
    path.write_text("study,a\nu,1\nu,0\n")
    with pytest.raises(ValueError, match="line 3: another row of labels of study u"):
        read_label_table(path, ["a"])
    with pytest.raises(ValueError, match=r"no column of labels 0 and 1 \(there are a\)"):  # as `hlip prepare` has none
        read_label_table(path)


def test_labels_by_study(path: Path) -> None:
    path.write_text("\ufeffstudy_uid,b,a,note\nu1,1,0,x\nu2,0.0,1.0,\nu3,-1,,y\nu1,1,0,z\n")
    labels = read_labels(path, ["a", "b", "a"])  # one column may serve two classes
    assert {uid: row.tolist() for uid, row in labels.items()} == {"u1": [0, 1, 0], "u2": [1, 0, 1], "u3": [-1, -1, -1]}


@pytest.mark.parametrize(
    ("text", "classes", "reason"),
    [
        ("x,a\nu,1", ["a"], r"not a readable table \(needs a column of study"),
        ("study,a\n", ["a"], "not a readable table .*no rows"),
        ("study,a\nu,1", ["a", "b"], r"has no column b \(there are a\)"),
        ("study,a\nu,1", ["a", "a"], "class a is asked for twice"),
        ("study,a\nu,1\nv,2", ["a"], "line 3, study v: a must be 0, 1, or -1 or empty if missing, got '2'"),
        ("study,a\nu,yes", ["a"], "line 2, study u: a must be .* got 'yes'"),
        ("study,a\nu,nan", ["a"], "line 2, study u: a must be .* got 'nan'"),
        ("study,a\nu,5", [], r"no column of labels 0 and 1 \(there are a\)"),
    ],
)
def test_bad_tables_are_named(path: Path, text: str, classes: list[str], reason: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=f"labels.csv: {reason}"):
        read_label_table(path, classes)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.csv"):
        read_labels(tmp_path / "none.csv", ["a"])


def test_one_class_is_not_its_letters(path: Path) -> None:
    path.write_text("study,mass\nu,1\nv,0\n")
    assert read_label_table(path, "mass").classes == ("mass",)
    assert {uid: row.tolist() for uid, row in read_labels(path, "mass").items()} == {"u": [1], "v": [0]}
