"""`hlip eval --scores`, against scikit-learn and the protocols written down a second time."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from commands import run
from hlip.evaluate.scores import read_scores
from hlip.evaluate.tasks import Task, load_task

RNG = np.random.default_rng(5)
DISEASES = ["normal", "stroke", "glioma", "meningioma", "metastasis"]
MEANS = ("macro_auc", "accuracy", "weighted_f1", "precision", "recall", "balanced_accuracy")
PAIRS = (
    "classes: {a: {positive: p, negative: q}, b: {positive: r, negative: s}}\nkind: pairs\nmetrics: [auc, accuracy]\n"
)


def write(path: Path, header: Sequence[str], uids: Sequence[str], table: np.ndarray) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *([uid, *row] for uid, row in zip(uids, table.tolist(), strict=True))])
    return path


def evaluated(
    tmp_path: Path, task: str | Path, classes: Sequence[str], columns: Sequence[str], scores: np.ndarray, y: np.ndarray
) -> dict[str, dict[str, float]]:
    """metrics.json of the command; the two tables have the studies in different orders."""
    uids = [f"s{i}" for i in range(len(y))]
    tables = [
        write(tmp_path / "scores.csv", ["study", *classes], uids, scores),
        write(tmp_path / "labels.csv", ["study", *columns], uids[::-1], y[::-1]),
    ]
    args = ["--scores", tables[0], "--labels", tables[1], "--out", tmp_path / "out", "--draws", 10]
    assert run("eval", task, *args) == 0
    content: dict[str, dict[str, float]] = json.loads((tmp_path / "out" / "metrics.json").read_text())
    return content


def nearest(y: np.ndarray, p: np.ndarray) -> float:
    """Of i/99 the cut nearest to (0, 1) of the ROC plane, the largest of equals."""
    best = (np.inf, 0.0)
    for cut in (i / 99 for i in range(100)):
        said = p > cut
        hits, alarms = said[y == 1].sum() / (y == 1).sum(), said[y == 0].sum() / (y == 0).sum()
        best = min(best, (float(np.hypot(1 - hits, alarms)), -cut))
    return -best[1]


def figures(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    said = p > nearest(y, p)
    return {
        "macro_auc": roc_auc_score(y, p),
        "accuracy": accuracy_score(y, said),
        "weighted_f1": f1_score(y, said, average="weighted", zero_division=0),
        "precision": precision_score(y, said, zero_division=0),
        "recall": recall_score(y, said, zero_division=0),
        "balanced_accuracy": balanced_accuracy_score(y, said),
    }


def chest(n: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Classes of Rad-ChestCT, scores of 15 and labels of 13 and calcification."""
    classes = [name for name in load_task("ct-rate").classes if name != "Mosaic attenuation pattern"]
    y = (RNG.random((n, 14)) < RNG.uniform(0.1, 0.7, 14)).astype(int)
    p = np.round(np.clip(RNG.random((n, 15)) * 0.8 + 0.15 * y[:, [*range(13), 13, 13]], 0, 1), 2)  # with ties
    return classes, p, y


def test_rad_chestct_is_scored_as_published(tmp_path: Path) -> None:
    classes, p, y = chest(300)
    single = [name for name in classes if "calcification" not in name]
    order = [*single, "Coronary artery wall calcification", "Arterial wall calcification"]
    task = load_task("rad-chestct")
    found = evaluated(tmp_path, "rad-chestct", order, [task.columns[name] for name in (*single, "Calcification")], p, y)
    a, b = p[:, 13], p[:, 14]
    merged = [max(x, z) if x > 0.5 or z > 0.5 else min(x, z) for x, z in zip(a, b, strict=True)]
    expected = [figures(y[:, k], p[:, k]) for k in range(13)] + [figures(y[:, 13], np.array(merged))]
    for name in MEANS:
        assert found["metrics"][name] == pytest.approx(np.mean([row[name] for row in expected]), abs=1e-12)
    assert found["metrics"]["Calcification_accuracy"] == pytest.approx(expected[-1]["accuracy"], abs=1e-12)
    assert found["released"]["acc (radchestct)"] == found["metrics"]["accuracy"]
    # The tables that were released have columns named after the classes, and names of their own for the studies'.
    write(tmp_path / "scores.csv", ["recon", *order], [f"s{i}" for i in range(300)], p)
    names = ["NoteAcc_DEID", *order]
    labels = write(tmp_path / "released.csv", names, [f"s{i}" for i in range(300)], y[:, [*range(13), 13, 13]])
    out = tmp_path / "again"
    for scores in (tmp_path / "scores.csv", tmp_path / "out" / "scores.csv"):
        assert run("eval", "rad-chestct", "--scores", scores, "--labels", labels, "--out", out, "--draws", 5) == 0
        assert json.loads((out / "metrics.json").read_text())["metrics"] == pytest.approx(found["metrics"], abs=1e-12)


@pytest.mark.parametrize(("a", "b", "merged"), [(0.4, 0.6, 0.6), (0.4, 0.3, 0.3), (0.5, 0.45, 0.45)])
def test_calcifications_are_one_class(a: float, b: float, merged: float) -> None:
    task = load_task("rad-chestct")
    shares = dict.fromkeys(task.classes, np.array([0.1]))
    shares |= {"Coronary artery wall calcification": np.array([a]), "Arterial wall calcification": np.array([b])}
    scores = task.merge(shares)
    assert scores.shape == (1, 14) and scores[0, task.names.index("Calcification")] == merged


def one_against_the_rest(y: np.ndarray, share: np.ndarray) -> dict[str, float]:
    said = share >= 0.5
    return {
        "auc": roc_auc_score(y, share),
        "weighted_f1": f1_score(y, said, average="weighted", zero_division=0),
        "balanced_acc": balanced_accuracy_score(y, said),
    }


def among(y: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    return {
        "auc": np.mean([roc_auc_score(y == k, shares[:, k]) for k in range(shares.shape[1])]),
        "weighted_f1": f1_score(y, shares.argmax(1), average="weighted", zero_division=0),
        "balanced_acc": balanced_accuracy_score(y, shares.argmax(1)),
    }


def pub_brain_5(y: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """The 45 figures of the released tools by their names."""

    def shares(rows: np.ndarray, columns: Sequence[int]) -> np.ndarray:
        table = np.exp(logits[rows][:, columns])
        return np.asarray(table / table.sum(1, keepdims=True))

    rows: dict[str, dict[str, float]] = {}
    for k in range(1, 5):
        pair = np.isin(y, (0, k))
        rows[f"anomaly_{DISEASES[k]}"] = one_against_the_rest(y[pair] == k, shares(pair, [0, k])[:, 1])
    rows["anomaly"] = {key: np.mean([row[key] for row in rows.values()]) for key in rows["anomaly_stroke"]}
    for part, columns in (("tumor", [2, 3, 4]), ("disease", [0, 1, 2, 3, 4])):
        inside = np.isin(y, columns)
        true, share = y[inside] - columns[0], shares(inside, columns)
        rows[part] = among(true, share)
        for place, k in enumerate(columns):
            rows[f"{part}_{DISEASES[k]}"] = one_against_the_rest(true == place, share[:, place])
    return {f"{key} (pubbrain5_{part})": value for part, row in rows.items() for key, value in row.items()}


@pytest.mark.parametrize("name", ["pub-brain-5", "pub-brain-5-gt-2026-04"])
def test_pub_brain_5_has_all_figures_of_the_released_tools(name: str, tmp_path: Path) -> None:
    y = RNG.integers(0, 5, 200)
    logits = RNG.normal(size=(200, 5)) + 1.2 * np.eye(5)[y]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    classes = [name.capitalize() for name in DISEASES]
    found = evaluated(tmp_path, name, classes, classes, shares, np.eye(5, dtype=int)[y])
    expected = pub_brain_5(y, logits)
    assert len(expected) == 45
    assert found["released"] == pytest.approx(expected, abs=1e-12)


def test_at_a_half_a_class_is_there(tmp_path: Path) -> None:
    shares = np.array([[0.5, 0.5, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.25, 0.25, 0.5, 0, 0], [0, 0, 0, 1, 0]])
    found = evaluated(
        tmp_path, "pub-brain-5", *[[name.capitalize() for name in DISEASES]] * 2, shares, np.eye(5, dtype=int)[:4]
    )
    # Normal against the rest: 0 and 1 are called normal, of which 0 is. Normal and stroke: both are called stroke.
    assert found["released"]["balanced_acc (pubbrain5_disease_normal)"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["released"]["weighted_f1 (pubbrain5_anomaly_stroke)"] == pytest.approx(1 / 2 * 2 / 3)


def test_similarities_and_columns_of_one_label(tmp_path: Path) -> None:
    classes = list(load_task("mr-rate").classes)
    y = (RNG.random((60, 37)) < 0.4).astype(int)
    y[:, 3], y[:, 4] = 0, 1  # of which there is no AUC
    scores = RNG.normal(size=y.shape) + y  # any numbers
    found = evaluated(tmp_path, "mr-rate", classes, classes, scores, y)
    scored = [k for k in range(37) if k not in (3, 4)]
    expected = np.mean([roc_auc_score(y[:, k], scores[:, k]) for k in scored])
    assert found["released"]["auc (mri)"] == pytest.approx(expected, abs=1e-12)
    assert found["metrics"][f"{classes[3]}_auc"] is None
    for name, column in (("rsna-2026-04", "auc (epidural hemorrhage)"), ("cq500", "auc (extradural hemorrhage)")):
        classes = list(load_task(name).classes)
        k = len(classes)
        found = evaluated(tmp_path, name, classes, classes, scores[:, 5 : 5 + k], y[:, 5 : 5 + k])
        areas = [roc_auc_score(y[:, 5 + i], scores[:, 5 + i]) for i in range(k)]
        assert found["metrics"]["macro_auc"] == pytest.approx(np.mean(areas), abs=1e-12)
        place = next(i for i, word in enumerate(classes) if word in ("Epidural", "EDH"))
        assert found["released"][column] == pytest.approx(areas[place], abs=1e-12)


def test_chest_by_cosines_is_cut_where_probabilities_are(tmp_path: Path) -> None:
    task = load_task("rad-chestct-2026-04")
    y = (RNG.random((80, 14)) < 0.4).astype(int)
    cosines = RNG.normal(0.2, 0.2, y.shape) + 0.1 * y
    found = evaluated(tmp_path, "rad-chestct-2026-04", task.names, [*task.columns.values()], cosines, y)
    rows = [figures(y[:, k], cosines[:, k]) for k in range(14)]
    for name in MEANS:
        assert found["metrics"][name] == pytest.approx(np.mean([row[name] for row in rows]), abs=1e-12)


def test_scans_have_names_or_lines(tmp_path: Path) -> None:
    task = Task({"x": "p"}, kind="similarity", unit="scan")
    path = tmp_path / "scores.csv"
    path.write_text("VolumeName,x\nvalid_1_a_1.nii.gz,0.5\nvalid_1_a_2.nii.gz,0.25\n")
    uids, scans, scores = read_scores(path, task)
    assert (uids, scans, scores.tolist()) == (["valid_1_a"] * 2, ["line 2", "line 3"], [[0.5], [0.25]])
    path.write_text("study,scan,x,x_label\nu,a,0.5,1\nv,a,0.5,0\n")
    assert read_scores(path, task)[:2] == (["u", "v"], ["a", "a"])
    path.write_text("study,x\nu,0.5\nv,-0.5\n")
    assert read_scores(path, task)[:2] == (["u", "v"], [])  # one scan each
    path.write_text("study,scan,x\nu,a,0.5\nu,a,0.5\n")
    with pytest.raises(ValueError, match=r"scores.csv: study u scan a has 2 rows, expected one"):
        read_scores(path, task)


@pytest.mark.parametrize(
    ("task", "text", "reason"),
    [
        (PAIRS, "study,a\nu,0.5\n", r"has no column b \(there are a\)"),
        (PAIRS, "study,a,b,A\nu,0.5,0.5,0.5\n", "'A' is no class of task mine"),
        (
            PAIRS,
            "study,a,b\nu,0.5,0.5\nv,0.5,1.5\n",
            "line 3, study v: b: expected a probability from 0 to 1, got '1.5'",
        ),
        (PAIRS, "study,a,b\nu,nan,0.5\n", "line 2, study u: a: expected a probability from 0 to 1, got 'nan'"),
        (PAIRS, "study,a,b\nu,,0.5\n", "line 2, study u: a: expected a probability from 0 to 1, got ''"),
        (PAIRS, "study,a,b\nu,0.5,0.5\nu,0.5,0.5\n", "study u has 2 rows, expected one"),
        (PAIRS, "name,a,b\nu,0.5,0.5\n", "needs a column of study"),
        (PAIRS, "study;a;b\nu;0.5;0.5\n", "cells are parted by commas"),
        ("classes: {a: x, b: y}", "study,a,b\nu,0.5,0.25\n", "study u: the classes' shares add up to 0.75, not 1"),
        ("kind: similarity\nclasses: {a: x}", "study,a\nu,inf\n", "study u: a: expected a number, got 'inf'"),
    ],
)
def test_tables_that_hold_no_scores(task: str, text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(task)
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"scores.csv: .*{reason}"):
        read_scores(path, load_task(tmp_path / "mine.yaml"))


def test_studies_that_do_not_join_and_flags_without_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(PAIRS)
    uids = [f"s{i}" for i in range(8)]
    scores = write(tmp_path / "scores.csv", ["study", "a", "b"], uids, RNG.random((8, 2)))
    labels = write(tmp_path / "labels.csv", ["study", "a", "b"], [*uids[1:], "t"], np.arange(16).reshape(8, 2) // 4 % 2)
    out = tmp_path / "out"
    args = ["eval", tmp_path / "mine.yaml", "--scores", scores, "--out", out, "--draws", 5]
    assert run(*args, "--labels", labels) == 2
    said = capsys.readouterr().err
    assert "1 studies have no labels: s0" in said and "1 labels have no study: t" in said and "unmatched.csv" in said
    assert run(*args, "--labels", labels, "--allow_unmatched") == 0
    content = json.loads((out / "metrics.json").read_text())
    assert (content["studies"], content["scores"], content["labels"]) == (7, "scores.csv", "labels.csv")
    for more, reason in [
        ([], "--labels is needed"),
        (["--labels", labels, "--model", "m"], "--model: has no part"),
        (["--labels", labels, "--head", 1], "--head: has no part"),
        (["--labels", labels, "--data", out], "not allowed with"),
    ]:
        assert run(*args, *more) == 2
        assert reason in capsys.readouterr().err
    assert run("eval", tmp_path / "mine.yaml", "--data", out, "--labels", labels, "--out", out) == 2
    assert "--model is needed" in capsys.readouterr().err
