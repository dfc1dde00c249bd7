from __future__ import annotations

import csv
import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

import hlip
import rank_job
from commands import run
from hlip.embed.table import Embeddings
from hlip.embed.texts import TextEncoder
from hlip.evaluate.evaluation import evaluate, zeroshot, zeroshot_classifier
from hlip.evaluate.metrics import at_threshold, once, roc_threshold
from hlip.evaluate.tasks import Task, load_task
from hlip.store.store import Store
from rank_job import free_port
from tiny_store import make_store

PAIRS = """kind: pairs
classes:
  lesion: {positive: [lesion, mass], negative: no lesion}
  blood: {positive: blood, negative: no blood}
  rare: {positive: rare, negative: not rare}
metrics: [auc, balanced_accuracy, accuracy, weighted_f1, precision, recall]
columns: {lesion: LESION}
published: {source: somewhere, columns: [macro_auc, recall], rows: {other: [70.0, null]}}
"""
CLASSES = "classes: {a: glioma, b: [stroke, infarct], c: normal brain}\nmetrics: [balanced_accuracy, auc]\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Forty studies; `rare` has no positive study, and some labels are missing."""
    labels = [
        {
            name: float(value)
            for name, value in {"LESION": i % 2, "blood": i % 3 == 0}.items()
            if (i, name) != (4, "blood")
        }
        | {"rare": 0.0 if i else -1.0}
        | {name: float("abc"[i % 3] == name) for name in "abc"}
        for i in range(40)
    ]
    return make_store(tmp_path_factory.mktemp("evaluate") / "store", [1 + i % 3 for i in range(40)], labels)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.yaml"
    path.write_text(PAIRS)
    return path


def task_of(tmp_path: Path, text: str) -> Task:
    path = tmp_path / "task.yaml"
    path.write_text(text)
    return load_task(path)


def table_of(embedding: np.ndarray, **facts: object) -> Embeddings:
    n = len(embedding)
    names = np.array([f"u{i}" for i in range(n)])
    return Embeddings(names, np.full(n, ""), np.zeros(n, np.int8), embedding.astype(np.float32), facts)


class Axes:
    """Texts along the axes of a space: those that begin with "no" or "not" are the opposite of what they deny."""

    def __init__(self, words: list[str], scale: float = 2.0) -> None:
        self.words, self.logit_scale = words, torch.tensor(scale).log()

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), len(self.words))
        for row, text in zip(rows, texts, strict=True):
            word = text.removeprefix("This study shows: ").removesuffix(".")
            row[self.words.index(word.removeprefix("not "))] = -1.0 if word.startswith("not ") else 1.0
        return rows


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


def test_scans_of_another_grid_than_the_models(
    tiny_model: hlip.HLIPModel, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three times the slices that the model was made for, as its published figures were had; a note tells others."""
    store = make_store(tmp_path / "store", [1, 2, 1, 2], [{"a": i % 2, "b": 1 - i % 2} for i in range(4)], (24, 16, 16))
    task = tmp_path / "task.yaml"
    task.write_text("classes: {a: glioma, b: stroke}\nshape: [24, 16, 16]\n")
    args = ["--data", store.path, "--model", model_folder, "--out", tmp_path / "out", "--draws", 5, "--workers", 0]
    args += ["--dtype", "fp32"]
    assert run("eval", task, *args) == 0
    assert "published figures" not in capsys.readouterr().out
    with (tmp_path / "out" / "scores.csv").open() as file:
        found = [float(row["a"]) for row in csv.DictReader(file)]
    _, expected = zeroshot(tiny_model, [store.study(i) for i in range(4)], load_task(task))
    assert found == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    task.write_text("classes: {a: glioma, b: stroke}\nshape: [8, 16, 16]\n")
    assert run("eval", task, *args) == 0
    note = "published figures of task are of scans of 8 x 16 x 16 voxels, these have 24 x 16 x 16"
    assert note in capsys.readouterr().out
    assert any(note in told for told in json.loads((tmp_path / "out" / "metrics.json").read_text())["notes"])


def test_scans_by_themselves(store: Store, model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    pairs.write_text(f"{PAIRS}unit: scan\n")
    args = ["--model", model_folder, "--draws", 30, "--workers", 0]
    assert run("eval", pairs, "--data", store.path, "--out", tmp_path / "out", *args) == 0
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [(uid, name) for i, uid in enumerate(store.uids.tolist()) for name in store.study(i).names]
    assert [(row["study"], row["scan"]) for row in rows] == names
    assert len(names) > len(store.uids)
    labels = dict(zip(store.uids.tolist(), store.labels[1][:, store.labels[0].index("LESION")], strict=True))
    assert all(float(row["lesion_label"]) == labels[row["study"]] for row in rows)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (found["studies"], found["scans"]) == (40, len(names))

    both = tmp_path / "both.npz"
    table = ["--labels", label_table(store, tmp_path / "labels.csv")]
    assert run("embed", store.path, "--model", model_folder, "--out", both, "--scans", "--workers", 0) == 0
    assert run("eval", pairs, "--embeddings", both, *table, "--out", tmp_path / "again", *args) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["metrics"]["lesion_auc"] == pytest.approx(found["metrics"]["lesion_auc"], abs=0.01)


def test_scans_are_drawn_with_their_study(tmp_path: Path) -> None:
    """Ten studies of one scan, and of three that are the same: the same figure, and the same intervals."""
    random = np.random.default_rng(0)
    embedding = random.normal(size=(10, 2))
    task = task_of(tmp_path, "kind: similarity\nunit: scan\nclasses: {x: p}")
    labels = {f"u{i}": np.array([i % 2]) for i in range(10)}
    found = []
    for n in (1, 3):
        uids, scans = [f"u{i}" for i in range(10) for _ in range(n)], [f"s{m}" for _ in range(10) for m in range(n)]
        table = Embeddings(np.array(uids), np.array(scans), np.zeros(10 * n, np.int8), np.repeat(embedding, n, axis=0))
        found.append(evaluate(task, table, labels, Axes(["p", "q"]), draws=100))
    assert found[0].metrics == pytest.approx(found[1].metrics)
    assert found[0].intervals["macro_auc"] == pytest.approx(found[1].intervals["macro_auc"])
    whole = table_of(embedding)
    with pytest.raises(ValueError, match=r"task task scores scans by themselves \(hlip embed --scans\): no embeddings"):
        evaluate(task, whole, labels, Axes(["p", "q"]))


def test_the_head_is_asked_for_before_the_work(
    store: Store, pairs: Path, bert_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    model_folder: Path,
) -> None:  # fmt: skip
    tiny = hlip.HLIPModel.from_pretrained(model_folder)
    vision = replace(tiny.config.vision, num_prefix=2, head="dinotxt")
    two = hlip.HLIPModel(replace(tiny.config, vision=vision, per_prefix=True))
    two.text.tokenizer = tiny.text.tokenizer
    two.save_pretrained(tmp_path / "two")
    args = ["eval", pairs, "--data", store.path, "--out", tmp_path / "out", "--draws", 5, "--workers", 0, "--model"]
    assert run(*args, tmp_path / "two") == 2
    assert "gives 2 embeddings of a study: choose --head, 0 to 1" in capsys.readouterr().err
    assert run(*args, model_folder, "--head", 3) == 2
    assert "--head 3: the model gives 1 embedding of a study" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*args, tmp_path / "two", "--head", 1) == 0


def test_two_embeddings_of_a_study(tmp_path: Path) -> None:
    table = table_of(np.array([[1.0, 0], [0, 1], [0, 1], [1, 0]]))
    heads = Embeddings(np.repeat(["u0", "u1"], 2), table.scan, np.array([0, 1, 0, 1], np.int8), table.embedding)
    task = task_of(tmp_path, "kind: similarity\nclasses: {x: p}")
    labels = {"u0": np.array([1]), "u1": np.array([0])}
    with pytest.raises(ValueError, match="gives 2 embeddings of a study: choose head 0 or 1"):
        evaluate(task, heads, labels, Axes(["p", "q"]))
    for head, auc in enumerate((1, 0)):
        assert evaluate(task, heads, labels, Axes(["p", "q"]), head=head).metrics["macro_auc"] == auc


def label_table(store: Store, path: Path, leave: int = 0, more: str = "") -> Path:
    names, values = store.labels
    with path.open("w") as file:
        file.write(",".join(["study", *names]) + "\n")
        for uid, row in list(zip(store.uids, values.tolist(), strict=True))[leave:]:
            file.write(",".join([uid, *("" if value != value else f"{value:g}" for value in row)]) + "\n")
        file.write(more)
    return path


def test_labels_that_do_not_join_are_listed(
    store: Store, model_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["eval", pairs, "--data", store.path, "--model", model_folder, "--out", tmp_path / "out", "--draws", 5]
    labels = label_table(store, tmp_path / "labels.csv", 12, f"zzz{',0' * len(store.labels[0])}\n")
    assert run(*args, "--labels", labels) == 2
    told = capsys.readouterr().err
    assert "12 studies have no labels: s000, s001, s002, s003, s004, s005, s006, s007, s008, s009, ..." in told
    assert "1 labels have no study: zzz" in told
    listed = tmp_path / "out" / "unmatched.csv"
    assert list((tmp_path / "out").iterdir()) == [listed]  # said before anything is embedded
    assert f"all are in {listed}" in told
    expected = [[f"s{i:03d}", "labels"] for i in range(12)] + [["zzz", "study"]]
    assert list(csv.reader(listed.open()))[1:] == expected
    assert run(*args, "--labels", labels, "--allow_unmatched") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["studies"] == 28
    labels.write_text("study,LESION,blood,rare\nx,1,0,0\n")
    assert run(*args, "--labels", labels, "--allow_unmatched") == 2
    assert "no study has labels" in capsys.readouterr().err


def test_bad_input_is_explained(
    store: Store, tiny_model: hlip.HLIPModel, model_folder: Path, pairs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "folder").mkdir()
    other = tmp_path / "other.npz"
    with other.open("wb") as file:
        table_of(np.eye(2), job={"model": "0"}).write(file, ".npz")
    out, labels = tmp_path / "out", ["--labels", label_table(store, tmp_path / "labels.csv")]
    for args, message in [
        (["nothing", "--data", store.path], "unknown task 'nothing'"),
        (["ct-rate", "--data", store.path], "the store has no labels for Emphysema, Atelectasis"),
        ([pairs, "--data", tmp_path / "folder", *labels], "expected a store, or a study list"),
        ([pairs, "--embeddings", other], "--labels is needed"),
        ([pairs, "--embeddings", other, *labels], "other.npz: made by another model than"),
        ([pairs, "--data", store.path, "--templates", "x"], "no templates 'x'"),
        ([pairs, "--data", store.path, "--draws", 0], "--draws: expected 1 or more"),
    ]:
        assert run("eval", *args, "--model", model_folder, "--out", out) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    task = task_of(tmp_path, f"classes: {{a: x, b: {'word ' * 40}}}")
    with pytest.raises(ValueError, match=r"prompt 'This study shows: word .* has 47 tokens, the .* reads 32"):
        zeroshot_classifier(tiny_model, task)
    task = task_of(tmp_path, "kind: similarity\nclasses: {x: p}")
    with pytest.raises(ValueError, match="no class has both positive and negative studies"):
        evaluate(task, table_of(np.eye(2)), {"u0": np.array([0]), "u1": np.array([-1])}, Axes(["p", "q"]))
    with pytest.raises(ValueError, match="no study has a label"):
        evaluate(task, table_of(np.eye(2)), {"u0": np.array([-1]), "u1": np.array([-1])}, Axes(["p", "q"]))
    with pytest.raises(ValueError, match="no embeddings of whole studies of head 0"):
        heads = table_of(np.eye(2))
        evaluate(
            task, Embeddings(heads.study, heads.scan, heads.head + 1, heads.embedding), {}, Axes(["p", "q"]), head=0
        )


SLOW_TO_IMPORT = ("transformers.models.bert.modeling_bert", "sklearn.metrics", "matplotlib.figure", "pyarrow")
RESULTS = ("scores.csv", "table.csv", "embeddings.npz")


def eval_arguments(store: Store, model_folder: Path, tmp_path: Path, ranks: int) -> list[str]:
    task = tmp_path / "classes.yaml"
    task.write_text(CLASSES)
    args = ["eval", task, "--data", store.path, "--model", model_folder, "--out", tmp_path / str(ranks)]
    return [*map(str, args), "--draws=20", "--max_tokens=40", "--workers=0"]


def test_two_and_three_processes_find_the_same(store: Store, model_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hlip.cli.evaluate", "hlip.cli", *SLOW_TO_IMPORT])
    found = {}
    for ranks in (1, 2, 3):
        args, meet = eval_arguments(store, model_folder, tmp_path, ranks), free_port()
        started = [context.Process(target=rank_job.run, args=(rank, ranks, meet, args)) for rank in range(ranks)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        assert [process.exitcode for process in started] == [0] * ranks
        found[ranks] = [(tmp_path / str(ranks) / name).read_bytes() for name in RESULTS]
        assert not list((tmp_path / str(ranks)).glob("*.parts"))
    assert Embeddings.read(tmp_path / "1" / "embeddings.npz").study.tolist() == store.uids.tolist()
    assert found[1] == found[2] == found[3]


@pytest.mark.slow
def test_torchrun(store: Store, model_folder: Path, tmp_path: Path) -> None:
    args = eval_arguments(store, model_folder, tmp_path, 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hlip.cli"]
    done = subprocess.run([*command, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 studies; percent") == 1  # told once
    assert Embeddings.read(tmp_path / "2" / "embeddings.npz").study.tolist() == store.uids.tolist()


def test_scans_that_are_left_out_are_told(
    nifti_study: list[Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.nii.gz").write_bytes(nifti_study[0].read_bytes()[:500])
    files = [str(path.relative_to(tmp_path)) for path in nifti_study]
    listed = {"A": {"scans": files[:1]}, "B": {"scans": [files[1], "cut.nii.gz"]}}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    (tmp_path / "labels.csv").write_text("study,yes,no\nA,1,0\nB,0,1\n")
    (tmp_path / "task.yaml").write_text("classes: {yes: glioma, no: normal}\nmetrics: auc\n")
    given = ["--data", tmp_path / "list.json", "--labels", tmp_path / "labels.csv", "--model", model_folder]
    rest = ["--draws", 5, "--workers", 0, "--out", tmp_path / "out"]
    assert run("eval", tmp_path / "task.yaml", *given, *rest) == 3
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["left_out"] == []
    assert [entry[:3] for entry in metrics["left_out_scans"]] == [["B", "cut.nii.gz", "unreadable"]]
    assert "left out B, scan cut.nii.gz" in capsys.readouterr().err
