""""""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

import hlip
from commands import run
from evaluate_cases import Axes, label_table, pairs, store, table_of, task_of  # noqa: F401
from hlip.embed.texts import TextEncoder
from hlip.evaluate.evaluation import evaluate, zeroshot, zeroshot_classifier
from hlip.evaluate.metrics import at_threshold, once, roc_threshold
from hlip.evaluate.tasks import Task
from hlip.store.store import Store


def scores_of(task: Task, embedding: np.ndarray, model: TextEncoder) -> np.ndarray:
    texts = zeroshot_classifier(model, task).numpy()
    return task.scores(embedding @ texts.T, float(model.logit_scale.detach().exp()))


def test_scores_by_hand(tmp_path: Path) -> None:
    embedding = np.array([[0.6, 0.8], [1.0, 0.0]])
    pairs = task_of(
        tmp_path, "kind: pairs\nclasses: {x: {positive: p, negative: not p}, y: {positive: q, negative: not q}}"
    )
    expected = 1 / (1 + np.exp(-2 * 2 * embedding))  # logits +-2 cosine
    np.testing.assert_allclose(scores_of(pairs, embedding, Axes(["p", "q"])), expected)
    alike = task_of(tmp_path, "kind: similarity\nclasses: {x: p, y: [p, q]}")
    expected = np.stack([embedding[:, 0], embedding.sum(1) / np.sqrt(2)], axis=1)
    np.testing.assert_allclose(scores_of(alike, embedding, Axes(["p", "q"])), expected, rtol=1e-6)
    classes = task_of(tmp_path, "classes: {x: p, y: q}")
    logits = np.exp(2 * embedding)
    np.testing.assert_allclose(scores_of(classes, embedding, Axes(["p", "q"])), logits / logits.sum(1, keepdims=True))
    with pytest.raises(ValueError, match="the embeddings have 2 numbers, the model's text tower gives 3"):
        evaluate(classes, table_of(embedding), {"u0": np.eye(2)[0]}, Axes(["p", "q", "r"]), allow_unmatched=True)


def test_a_study_that_could_not_be_read_stops_nothing(tmp_path: Path) -> None:
    table = table_of(np.eye(2))
    table.facts["failed"] = [["lost", "damaged"]]
    labels = {"u0": np.array([1, 0]), "u1": np.array([0, 1]), "lost": np.array([1, 0])}
    classes = task_of(tmp_path, "classes: {x: p, y: q}\nmetrics: auc")
    found = evaluate(classes, table, labels, Axes(["p", "q"]))
    assert found.metrics["macro_auc"] == 1 and "1 studies that could not be read: lost" in found.notes[0]


def test_scores_are_those_of_hlip_zeroshot(store: Store, tiny_model: hlip.HLIPModel, tmp_path: Path) -> None:
    names, templates = {"a": ["glioma"], "b": ["stroke", "infarct"]}, ["It is {}.", "{}"]
    studies = [store.study(i) for i in range(5)]
    _, expected = zeroshot(tiny_model, studies, Task(names, templates))
    task = task_of(tmp_path, json.dumps({"classes": names, "templates": templates}))
    embedding = torch.cat([tiny_model.encode_image(hlip.pack([study], (4, 8, 8))) for study in studies])
    found = scores_of(task, embedding.detach().numpy(), tiny_model)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_multi_class_by_hand(tmp_path: Path) -> None:
    task = task_of(
        tmp_path,
        "classes: {n: p, s: q, g: r}\nsubtasks: {stroke: [n, s], all: [n, s, g]}\n",
    )
    embedding = np.array([[3, 1, 0], [1, 2, 3], [0, 3, 1], [4, 1, 0], [0, 1, 2], [0, 0, 1]], dtype=float)
    true = [0, 0, 1, 1, 2, 2, 2]
    labels = {f"u{i}": np.eye(3, dtype=int)[k] for i, k in enumerate(true[:6])}
    found = evaluate(task, table_of(embedding), labels, Axes(["p", "q", "r"]), draws=200)
    # The nearest of n and s: n s s n, of which 0 and 2 are right: half of each. Of all three: n g s n g g.
    assert found.metrics["stroke_balanced_accuracy"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert found.metrics["all_balanced_accuracy"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    # F1 of n and s: 2 / (2 + 2) both. Among all, s is found once, which is right, and g three times, of which two are.
    assert found.metrics["stroke_weighted_f1"] == pytest.approx(1 / 2)
    assert found.metrics["all_weighted_f1"] == pytest.approx((1 / 2 + 2 / 3 + 4 / 5) / 3)
    first = 1 / (1 + np.exp(2 * (embedding[:4, 1] - embedding[:4, 0])))  # softmax over two prompts
    assert found.metrics["stroke_auc"] == pytest.approx(sklearn_metrics.roc_auc_score([1, 1, 0, 0], first))
    assert found.metrics["all_auc"] == found.metrics["macro_auc"]
    assert found.intervals["stroke_auc"] is not None and found.intervals["all_weighted_f1"] is not None
    shares = np.exp(2 * embedding) / np.exp(2 * embedding).sum(1, keepdims=True)
    aucs = [sklearn_metrics.roc_auc_score(np.array(true[:6]) == k, shares[:, k]) for k in range(3)]
    assert [found.metrics[f"{name}_auc"] for name in "nsg"] == pytest.approx(aucs)
    assert found.metrics["macro_auc"] == pytest.approx(np.mean(aucs))
    low, high = found.intervals["all_balanced_accuracy"]
    assert 0 <= low < found.metrics["all_balanced_accuracy"] < high <= 1

    labels["u5"] = np.array([0, 0, 0])
    rest = evaluate(task, table_of(embedding), labels, Axes(["p", "q", "r"]), draws=10)
    assert rest.notes == ["left out 1 studies of none of the classes"]
    assert len(rest.uids) == 5
    labels["u5"] = np.array([1, 0, 1])
    with pytest.raises(ValueError, match="study u5 is of 2 classes: n, g"):
        evaluate(task, table_of(embedding), labels, Axes(["p", "q", "r"]), draws=10)
    strokeless = {uid: np.array([1, 0, 0]) if row[1] else row for uid, row in list(labels.items())[:5]}
    lacking = evaluate(task, table_of(embedding[:5]), strokeless, Axes(["p", "q", "r"]), draws=10)
    assert np.isnan(lacking.metrics["stroke_balanced_accuracy"])
    assert lacking.intervals["stroke_balanced_accuracy"] is None
    assert "no study of class s" in lacking.notes[0]


def test_merged_classes_and_a_given_threshold(tmp_path: Path) -> None:
    task = task_of(
        tmp_path,
        "kind: pairs\nclasses: {x: {positive: p, negative: not p}, y: {positive: q, negative: not q}}\n"
        "merged: {z: [x, y]}\nthreshold: 0.5\nmetrics: [auc, recall, precision]\n",
    )
    embedding = np.array([[0.1, -0.3], [-0.2, -0.1], [-0.4, 0.2], [-0.3, -0.2]])
    labels = {f"u{i}": np.array([label]) for i, label in enumerate([1, 0, 1, 1])}
    found = evaluate(task, table_of(embedding), labels, Axes(["p", "q"]), draws=10)
    shares = 1 / (1 + np.exp(-4 * embedding))
    expected = [shares[0, 0], shares[1].min(), shares[2, 1], shares[3].min()]  # the larger, if any is above a half
    np.testing.assert_allclose(found.scores[:, 0], expected)
    assert found.metrics == pytest.approx(
        {"macro_auc": 2 / 3, "z_auc": 2 / 3, "recall": 2 / 3, "z_recall": 2 / 3, "precision": 1, "z_precision": 1}
    )
    assert found.thresholds == {"z": 0.5}


def test_the_command_on_a_store(
    store: Store, model_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = ["eval", pairs, "--data", store.path, "--model", model_folder, "--out", out, "--draws", 50, "--workers", 0]
    assert run(*args) == 0
    printed = capsys.readouterr().out
    assert "macro_auc" in printed
    assert "left out of the means, without positives or negatives: rare" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "embeddings.npz", "metrics.json", "plot.png", "scores.csv", "table.csv", "table.md",
    ]  # fmt: skip
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["study"] for row in rows] == store.uids.tolist()
    assert (rows[4]["blood_label"], rows[0]["rare_label"], rows[1]["lesion_label"]) == ("", "", "1")
    found = json.loads((out / "metrics.json").read_text())
    assert found["studies"] == 40
    assert found["classes"]["blood"]["missing"] == 1
    assert found["metrics"]["rare_auc"] is None
    figures = {}
    for name in ("lesion", "blood"):
        known = [row for row in rows if row[f"{name}_label"]]
        labels = np.array([int(row[f"{name}_label"]) for row in known])
        scores = np.array([float(row[name]) for row in known])
        threshold = roc_threshold(labels, scores)
        assert found["classes"][name]["threshold"] == threshold
        at = at_threshold(labels[:, None], scores[:, None], np.array([threshold]), once(len(labels)))
        figures[name] = {key: value[0, 0] for key, value in at.items()}
        figures[name]["auc"] = sklearn_metrics.roc_auc_score(labels, scores)
        for key, value in figures[name].items():
            assert found["metrics"][f"{name}_{key}"] == pytest.approx(value)
    assert found["metrics"]["macro_auc"] == pytest.approx(np.mean([each["auc"] for each in figures.values()]))
    assert found["metrics"]["precision"] == pytest.approx(np.mean([each["precision"] for each in figures.values()]))
    low, high = found["intervals"]["macro_auc"]
    assert 0 <= low < found["metrics"]["macro_auc"] < high <= 1
    with (out / "table.csv").open() as file:
        header, ours, other = csv.reader(file)
    assert header == ["", "macro_auc", "balanced_accuracy", "accuracy", "weighted_f1", "precision", "recall"]
    assert ours[1] == f"{100 * found['metrics']['macro_auc']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    assert other == ["other", "70.0", "", "", "", "", ""]

    first = (out / "scores.csv").read_bytes()
    assert run(*args) == 0  # finds its embeddings again
    assert "holds these embeddings already" in capsys.readouterr().err
    assert (out / "scores.csv").read_bytes() == first
    assert run(*args, "--one_scan", 1) == 2  # what is there would be lost
    assert "embeddings.npz is of another job (studies, one_scan differ): remove it, or" in capsys.readouterr().err
    again = ["--model", model_folder, "--out", tmp_path / "again", "--draws", 5]
    one = ["--one_scan", 4, "--out", tmp_path / "one", "--draws", 5]
    assert run(*args[:6], *one) == 0
    assert json.loads((tmp_path / "one" / "metrics.json").read_text())["one_scan"] == 4
    assert (tmp_path / "one" / "scores.csv").read_bytes() != first
    table = ["--labels", label_table(store, tmp_path / "labels.csv")]
    assert run("eval", pairs, "--embeddings", out / "embeddings.npz", *table, *again) == 0
    assert (tmp_path / "again" / "scores.csv").read_bytes() == first
