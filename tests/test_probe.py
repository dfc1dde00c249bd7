from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from commands import run
from hlip.embed.table import Embeddings
from hlip.evaluate import metrics
from hlip.evaluate.labels import LabelTable, read_label_table
from hlip.evaluate.metrics import auc_intervals
from hlip.evaluate.probe import (
    CS,
    PROTOCOLS,
    Probe,
    ProbeData,
    _strongest,
    draw_bars,
    fit_probe,
    read_split,
    split_at_random,
)
from hlip.prepare.tables import Table


def embeddings_of(uids: Sequence[str], array: np.ndarray, head: int = 0) -> Embeddings:
    n = len(uids)
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    return Embeddings(np.array(uids), np.array([""] * n), np.full(n, head, np.int8), unit.astype(np.float32))


def planted(n: int = 240, width: int = 12, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Uids, embeddings and labels: class 0 is one direction, class 1 a noisy one, class 2 nothing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width))
    noisy = x[:, 1] + rng.normal(size=n)
    labels = np.stack([x[:, 0] > 0.3, noisy > 0, rng.random(n) < 0.4], axis=1)
    x[:, 0] += 3 * labels[:, 0]
    return [f"s{i:03d}" for i in range(n)], x, labels.astype(np.int8)


def table_of(uids: list[str], labels: np.ndarray, words: dict[str, dict[str, str]] | None = None) -> LabelTable:
    classes = tuple("abcdefgh"[: labels.shape[1]])
    path = Path("labels.csv")
    rows = tuple((i, uid, (words or {}).get(uid, {})) for i, uid in enumerate(uids, 2))
    return LabelTable(path, uids, classes, labels, Table(path, tuple(rows[0][2]), rows))


def write_table(path: Path, uids: Sequence[str], labels: np.ndarray, classes: Sequence[str]) -> Path:
    rows = [f"{uid},{','.join(map(str, row))}" for uid, row in zip(uids, labels.tolist(), strict=True)]
    path.write_text("\n".join([f"study,{','.join(classes)}", *rows]) + "\n")
    return path


def test_a_probe_is_what_scikit_learn_fits_by_hand() -> None:
    uids, x, labels = planted()
    labels[::7, 1] = -1
    data = ProbeData.join(table_of(uids, labels), [embeddings_of(uids, x)], fractions=(0.6, 0.2, 0.2))
    probe = fit_probe(data)
    train, val, test = (data.of(part) for part in ("train", "val", "test"))
    for k in range(3):
        best = []
        for c in CS:
            rows = train[data.labels[train, k] >= 0]
            scaler = StandardScaler().fit(data.embeddings[0][rows].astype(np.float64))
            fitted = LogisticRegression(C=c, max_iter=2000).fit(
                scaler.transform(data.embeddings[0][rows]), data.labels[rows, k]
            )
            held = val[data.labels[val, k] >= 0]
            score = fitted.decision_function(scaler.transform(data.embeddings[0][held]))
            best.append(roc_auc_score(data.labels[held, k], score))
        c = CS[int(np.argmax(best))]
        assert probe.c[k] == c
        rows = data.of("train", "val")
        rows = rows[data.labels[rows, k] >= 0]
        scaler = StandardScaler().fit(data.embeddings[0][rows].astype(np.float64))
        fitted = LogisticRegression(C=c, max_iter=2000).fit(
            scaler.transform(data.embeddings[0][rows]), data.labels[rows, k]
        )
        expected = fitted.predict_proba(scaler.transform(data.embeddings[0][test]))[:, 1]
        np.testing.assert_allclose(probe.scores(data.embeddings[0][test])[:, k], expected, atol=1e-5)


def test_planted_signal_is_found_and_noise_is_not() -> None:
    uids, x, labels = planted(600)
    data = ProbeData.join(table_of(uids, labels), [embeddings_of(uids, x)], fractions=(0.5, 0.1, 0.4))
    test = data.of("test")
    auc = auc_intervals(data.labels[test], fit_probe(data).scores(data.embeddings[0][test]), 300)
    assert auc.value[0] > 0.98
    assert 0.6 < auc.value[1] < 0.95
    assert auc.low[2] < 0.5 < auc.high[2]
    assert abs(auc.value[2] - 0.5) < 0.12
    assert (auc.low <= auc.value).all()
    assert (auc.value <= auc.high).all()


@pytest.mark.parametrize("fractions", [(0.6, 0.2, 0.2), (0.7, 0.0, 0.3)])
def test_the_test_studies_take_no_part_in_the_fit(fractions: tuple[float, float, float]) -> None:
    uids, x, labels = planted()
    data = ProbeData.join(table_of(uids, labels), [embeddings_of(uids, x)], fractions=fractions)
    before = fit_probe(data)
    rows = data.of("test")
    rng = np.random.default_rng(1)
    data.labels[rows] = 1 - data.labels[rows]
    data.embeddings[0][rows] = rng.normal(size=(len(rows), x.shape[1])) * 100
    after = fit_probe(data)
    np.testing.assert_array_equal(before.c, after.c)
    np.testing.assert_array_equal(before.weight, after.weight)
    np.testing.assert_array_equal(before.bias, after.bias)
    other = data.of("val") if fractions[1] else data.of("train")[:40]  # and others do
    data.labels[other] = 1 - data.labels[other]
    assert not np.array_equal(fit_probe(data).weight, after.weight)


def test_embeddings_as_they_are_and_given_penalties() -> None:
    uids, x, labels = planted()
    data = ProbeData.join(table_of(uids, labels), [embeddings_of(uids, x)], fractions=(0.7, 0.0, 0.3))
    probe = fit_probe(data, standardize=False, cs=[0.7])
    assert probe.c.tolist() == [0.7] * 3
    rows = data.of("train")
    fitted = LogisticRegression(C=0.7, max_iter=2000).fit(data.embeddings[0][rows].astype(float), data.labels[rows, 0])
    np.testing.assert_allclose(probe.weight[0], fitted.coef_[0], rtol=1e-6)
    assert probe.facts["standardized"] is False


def test_random_splits_are_disjoint_by_patient_and_repeat() -> None:
    uids = [f"s{i}" for i in range(500)]
    parts = split_at_random(uids, (0.7, 0.1, 0.2), seed=3)
    assert [int((parts == part).sum()) for part in ("train", "val", "test")] == [350, 50, 100]
    np.testing.assert_array_equal(parts, split_at_random(uids, (0.7, 0.1, 0.2), seed=3))
    assert (parts != split_at_random(uids, (0.7, 0.1, 0.2), seed=4)).any()
    patients = [f"p{i % 120}" for i in range(500)]
    parts = split_at_random(uids, (0.5, 0.0, 0.5), 0, patients)
    assert "val" not in parts
    for patient in set(patients):
        assert len({part for part, each in zip(parts, patients, strict=True) if each == patient}) == 1
    assert 230 <= (parts == "train").sum() <= 270
    for bad in [(0.5, 0.5), (0.5, 0.2, 0.2), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0), (1.2, -0.4, 0.2)]:
        with pytest.raises(ValueError, match="fractions must be"):
            split_at_random(uids, bad)


def test_of_penalties_as_good_the_strongest() -> None:
    scores = np.array([0.5, 0.9224598930481281, 0.9, 0.9224598930481284, np.nan])
    assert _strongest({"mean_test_score": scores}) == 1


def test_splits_from_columns_tables_and_lists(tmp_path: Path) -> None:
    words = {"a": {"set": "Train"}, "b": {"set": "validation"}, "c": {"set": "test"}, "d": {"set": ""}}
    table = table_of(list(words), np.zeros((4, 1), np.int8), words)
    assert read_split(["set"], table) == {"a": "train", "b": "val", "c": "test"}
    path = tmp_path / "split.csv"
    path.write_text("study,split\na,train\nz,test\n")
    assert read_split([str(path)], table) == {"a": "train", "z": "test"}
    lists = [tmp_path / name for name in ("1.txt", "2.txt", "3.txt")]
    for file, text in zip(lists, ("a\n\nb\n", "c\n", "d\n"), strict=True):
        file.write_text(text)
    assert read_split([str(each) for each in lists], table) == {"a": "train", "b": "train", "c": "val", "d": "test"}
    assert read_split([str(each) for each in lists[:2]], table) == {"a": "train", "b": "train", "c": "test"}
    lists[1].write_text("c\nb\n")
    path.write_text("study,split\na,trian\n")
    words["a"]["set"] = "fold1"
    for given, message in [
        (lists, "2.txt: study b is in train too"),
        ([path], "split.csv: study a: expected train, val, test or nothing, got 'trian'"),
        (["set"], "set: study a: expected train"),
        ([tmp_path / "none"], "neither a column of labels.csv nor a file"),
        ([*lists, path], "got 4 files"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_split([str(each) for each in given], table)


def test_join_and_classes_left_out() -> None:
    uids, x, labels = planted(60)
    labels[:, 2] = 0
    labels[:3, 2] = 1
    table = table_of([*uids[5:], "only labelled"], np.concatenate([labels[5:], labels[:1]]))
    first, second = embeddings_of(uids[:50], x[:50]), embeddings_of(uids[2:][::-1], x[2:][::-1])
    data = ProbeData.join(table, [first, second], fractions=(0.5, 0.0, 0.5), minimum=2)
    assert data.uids == uids[5:50]
    assert data.without_label == uids[:5]
    assert data.without_embedding == sorted(["only labelled", *uids[50:]])
    np.testing.assert_array_equal(data.embeddings[0], first.embedding[5:50])
    np.testing.assert_array_equal(data.embeddings[0], data.embeddings[1])
    np.testing.assert_array_equal(data.labels, labels[5:50, :2])
    assert data.left_out == {"c": "0 positives in train"}
    patients = {uid: {"p": "x" if i % 2 else "y"} for i, uid in enumerate(uids)}
    by_patient = ProbeData.join(table_of(uids, labels, patients), [first], None, (0.5, 0, 0.5), patients="p")
    assert {tuple(set(by_patient.parts[i::2])) for i in range(2)} == {("train",), ("test",)}
    with pytest.raises(ValueError, match="no study has both labels and embeddings; labels are of s000, s001, s002 and"):
        ProbeData.join(table_of(uids, labels), [embeddings_of(["x", "y"], x[:2])])
    with pytest.raises(ValueError, match="no study of test among the 60"):
        ProbeData.join(table_of(uids, labels), [embeddings_of(uids, x)], dict.fromkeys(uids, "train"))
    with pytest.raises(ValueError, match="no class has 50 positives"):
        ProbeData.join(table_of(uids, labels), [first], minimum=50)
    with pytest.raises(ValueError, match="of head 1"):
        ProbeData.join(table_of(uids, labels), [first], head=1)
    with pytest.raises(ValueError, match="has no column q"):
        ProbeData.join(table_of(uids, labels, patients), [first], patients="q")


def test_auc_is_scikit_learns_and_so_is_every_draw() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, (80, 3))
    labels[:, 2] = np.where(np.arange(80) < 2, np.arange(80), -1)  # one positive, one negative: many draws lack one
    scores = rng.integers(0, 9, (80, 3)) / 8  # many ties
    auc = auc_intervals(labels, scores, 50, seed=4)
    (counts,) = metrics.draw(range(80), 50, seed=4)
    drawn = np.full((50, 3), np.nan)
    for k in range(3):
        known = labels[:, k] >= 0
        assert auc.value[k] == pytest.approx(roc_auc_score(labels[known, k], scores[known, k]))
        for d, weights in enumerate(counts[:, known]):
            if {0, 1} <= set(labels[known, k][weights > 0].tolist()):
                drawn[d, k] = roc_auc_score(labels[known, k], scores[known, k], sample_weight=weights)
    assert np.isnan(drawn[:, 2]).any()
    np.testing.assert_allclose([auc.low, auc.high], np.nanpercentile(drawn, [2.5, 97.5], axis=0))
    np.testing.assert_allclose(auc.macro_drawn, np.nanmean(drawn, axis=1))
    assert auc.macro == pytest.approx(auc.value.mean())
    assert (auc.macro_low, auc.macro_high) == pytest.approx(tuple(np.percentile(auc.macro_drawn, [2.5, 97.5])))
    # By hand: positives at 0.9 and 0.4, negatives at 0.4 and 0.1. Of four pairs three are won, one is a tie.
    by_hand = auc_intervals(np.array([[1], [1], [0], [0], [-1]]), np.array([[0.9], [0.4], [0.4], [0.1], [5.0]]), 20)
    assert by_hand.value.tolist() == [0.875]
    for y, s, message in [
        (np.ones((4, 1)), np.zeros((4, 1)), "needs positives and negatives of every class"),
        (np.array([[1], [0]]), np.array([[np.nan], [0]]), "study 0: the score of class 0 is not a number"),
        (np.ones((4, 1)), np.ones((4, 2)), r"\(4, 1\) and scores of shape \(4, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            auc_intervals(y, s)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    # Scores of both classes are normal, a deviation apart: the AUC is Phi(1 / sqrt 2) = 0.7602.
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        labels = np.repeat([0, 1], 60)[:, None]
        auc = auc_intervals(labels, rng.normal(size=(120, 1)) + labels, 200, seed=trial)
        covered += auc.low[0] <= 0.7602 <= auc.high[0]
    assert 87 <= covered <= 100


def test_probe_files(tmp_path: Path) -> None:
    probe = Probe(("a", "b"), np.eye(2, 5), np.array([0.5, -1.0]), np.array([1.0, 0.1]), {"x": 1})
    path = tmp_path / "p.npz"
    with path.open("wb") as file:
        probe.write(file)
    read = Probe.read(path)
    assert (read.classes, read.facts) == (("a", "b"), {"x": 1})
    x = np.random.default_rng(0).normal(size=(3, 5)) * 1000
    np.testing.assert_array_equal(read.scores(x), probe.scores(x))
    np.testing.assert_allclose(probe.scores(np.zeros((1, 5)))[0], 1 / (1 + np.exp([-0.5, 1.0])))
    with pytest.raises(ValueError, match=r"width 5, got \(3, 4\)"):
        probe.scores(x[:, :4])
    with path.open("wb") as file:
        np.savez(file, classes=np.array(["a"], dtype=object), weight=1, bias=1, c=1, facts="{}")
    with pytest.raises(ValueError, match=r"p.npz: not a readable probe.*holds objects"):
        Probe.read(path)
    for damage in (b"", b"hello", b"PK\x03\x04"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"p.npz: not a readable probe"):
            Probe.read(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Embeddings of two models as Parquet and npz, and labels of most of their studies."""
    pytest.importorskip("pyarrow")
    uids, x, labels = planted(300)
    found = {"good": tmp_path / "good.parquet", "noise": tmp_path / "noise.npz"}
    noise = np.random.default_rng(5).normal(size=x.shape)
    for path, array in zip(found.values(), (x, noise), strict=True):
        with path.open("wb") as file:
            embeddings_of(uids, array).write(file, path.suffix)
    found["labels"] = write_table(tmp_path / "labels.csv", [*uids[:-4], "x1"], labels[: 300 - 3], "abc")
    return found


def test_two_models_side_by_side(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    args = ["--labels", files["labels"], "--fractions", 0.5, 0.1, 0.4, "--draws", 200]
    assert run("probe", files["good"], files["noise"], "--out", out, *args, "--seed", 1) == 0
    captured = capsys.readouterr()
    assert "studies without label: 4 (s296, s297, s298, s299)" in captured.err
    assert "studies without embedding: 1 (x1)" in captured.err
    content = json.loads((out / "probe.json").read_text())
    assert content["without_label"] == ["s296", "s297", "s298", "s299"]
    assert sum(content["studies"].values()) == 296
    good, noise = content["models"]["good"], content["models"]["noise"]
    assert good["classes"][0]["auc"] > 0.97
    assert noise["classes"][0]["auc"] < 0.7
    assert content["difference"]["auc"] == pytest.approx(good["macro"]["auc"] - noise["macro"]["auc"])
    assert content["difference"]["low"] > 0
    assert good["probe"]["c_chosen_on"] == "validation studies"
    lines = (out / "auc.csv").read_text().splitlines()
    assert lines[0] == "model,class,positives,negatives,auc,low,high,c"
    assert [line.split(",")[:2] for line in lines[1:5]] == [["good", name] for name in ("a", "b", "c", "macro")]
    assert (out / "auc.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "auc.csv", "auc.png", "good.probe.npz", "good.scores.csv", "noise.probe.npz", "noise.scores.csv",
        "probe.json", "split.csv",
    ]  # fmt: skip
    # The scores of the test studies are there, and are those that the figures are of.
    scores = {row.split(",")[0]: row.split(",")[1:] for row in (out / "good.scores.csv").read_text().splitlines()[1:]}
    table = read_label_table(files["labels"])
    truth = dict(zip(table.uids, table.values, strict=True))
    auc = roc_auc_score([truth[uid][0] for uid in scores], [float(row[0]) for row in scores.values()])
    assert auc == pytest.approx(good["classes"][0]["auc"], abs=1e-4)
    # The same split, read from the file that was written, gives the same figures; it tells the split, not the seed.
    again = tmp_path / "again"
    assert run("probe", files["good"], "--out", again, "--split", out / "split.csv", *args, "--seed", 1) == 0
    assert json.loads((again / "probe.json").read_text())["models"]["good"]["classes"] == good["classes"]


def test_a_fitted_probe_is_applied_to_other_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    uids, x, labels = planted(300)
    path = tmp_path / "rsna.npz"
    with path.open("wb") as file:
        embeddings_of(uids, x).write(file, ".npz")
    five = np.concatenate([labels, labels[:, :2]], axis=1)
    table = write_table(tmp_path / "rsna.csv", uids, five, PROTOCOLS["rsna"])
    out = tmp_path / "rsna"
    assert run("probe", path, "--labels", table, "--protocol", "rsna", "--out", out, "--draws", 50) == 0
    probe = out / "rsna.probe.npz"
    # Other studies, with CQ500's names for the classes.
    uids, x, labels = planted(100, seed=9)
    with path.open("wb") as file:
        embeddings_of(uids, x).write(file, ".npz")
    eleven = np.zeros((100, 11), dtype=int)
    eleven[:, :2] = labels[:, :2]  # ICH, IPH
    eleven[:, 3] = -1  # SDH
    table = write_table(tmp_path / "cq500.csv", uids, eleven, PROTOCOLS["cq500"])
    cross = tmp_path / "cross"
    args = ["--labels", table, "--protocol", "cq500", "--draws", 50]
    assert run("probe", path, "--apply", probe, "--out", cross, *args) == 0
    content = json.loads((cross / "probe.json").read_text())
    assert [row["class"] for row in content["models"]["rsna"]["classes"]] == ["Any", "Intraparenchymal"]
    assert content["models"]["rsna"]["classes"][0]["auc"] > 0.95
    assert set(content["left_out"]) == {"Intraventricular", "Subarachnoid", "Subdural"}
    assert run("probe", path, "--apply", probe, "--out", tmp_path / "plain") == 0
    rows = (tmp_path / "plain" / "rsna.scores.csv").read_text().splitlines()
    assert rows[0] == "study,Any,Intraparenchymal,Intraventricular,Subarachnoid,Subdural"
    assert len(rows) == 101
    capsys.readouterr()
    write_table(table, uids, eleven, list("abcdefghijk"))
    assert run("probe", path, "--apply", probe, "--out", cross, "--labels", table) == 2
    assert "has none of the probe's classes Any" in capsys.readouterr().err
    with path.open("wb") as file:
        embeddings_of(uids, x[:, :5]).write(file, ".npz")
    assert run("probe", path, "--apply", probe, "--out", cross) == 2
    assert "the probe reads embeddings of width 12" in capsys.readouterr().err


def test_many_classes_in_one_chart() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (60, 83))
    aucs = {name: auc_intervals(labels, labels + rng.normal(size=labels.shape), 20) for name in ("one", "two")}
    pictures = {}
    for count in (2, 83):
        file = io.BytesIO()
        few = {name: type(auc)(*(each[:count] for each in auc[:3]), *auc[3:]) for name, auc in aucs.items()}
        draw_bars([f"diagnosis {k}" for k in range(count)], few, file, "png")
        file.seek(0)
        pictures[count] = imread(file)
    assert pictures[83].shape[0] > 8 * pictures[2].shape[0]
    assert pictures[83].shape[1] == pictures[2].shape[1]


def test_bad_input_is_named_and_nothing_is_written(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"hello")
    good, labels = ["--labels", files["labels"]], files["good"]
    cases = [
        ([labels], "--labels missing"),
        ([bad, *good], "bad.parquet: not a readable file of embeddings"),
        ([labels, *good, "--classes", "z"], "has no column z (there are a, b, c)"),
        ([labels, *good, "--protocol", "rsna"], "has no column Any, Intraparenchymal"),
        ([labels, *good, "--fractions", 0.5, 0.1, 0.1], "fractions must be"),
        ([labels, *good, "--head", 1], "of head 1"),
        ([labels, *good, "--minimum", 0], "--minimum: expected 1 or more, got 0"),
        ([labels, *good, "--c", 0], "--c must be positive, got 0"),
        ([labels, labels, *good], "expected 2 different names"),
        ([labels, *good, "--names", "a/b"], "cannot be part of a file's name"),
        ([labels, *good, "--split", "nowhere"], "--split nowhere: neither a column"),
        ([labels, *good, "--apply", bad], "bad.parquet: not a readable probe"),
        ([labels, *good, "--apply", bad, "--split", "x"], "nothing is split or fitted"),
    ]
    out = tmp_path / "out"
    for args, message in cases:
        assert run("probe", *args, "--out", out) == 2, message
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert run("probe", labels, *good, "--out", files["labels"]) == 2
    assert "labels.csv: expected a folder" in capsys.readouterr().err
