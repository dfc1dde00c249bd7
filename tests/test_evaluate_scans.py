"""`hlip eval` on scans by themselves, several heads, several processes, and bad input."""

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

import hlip
import rank_job
from commands import run
from evaluate_cases import PAIRS, Axes, label_table, pairs, store, table_of, task_of  # noqa: F401
from hlip.embed.table import Embeddings
from hlip.evaluate.evaluation import evaluate, zeroshot, zeroshot_classifier
from hlip.evaluate.tasks import load_task
from hlip.store.store import Store
from rank_job import free_port
from tiny_store import make_store

CLASSES = "classes: {a: glioma, b: [stroke, infarct], c: normal brain}\nmetrics: [balanced_accuracy, auc]\n"


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
