from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from hlip.evaluate.labels import read_labels
from hlip.evaluate.tasks import FOLDER, Task, list_tasks, load_task

CHEST = ["macro_auc", "accuracy", "weighted_f1", "precision", "recall", "balanced_accuracy"]
BRAIN = ["stroke_detection", "glioma_detection", "meningioma_detection", "metastasis_detection",
         "tumor_classification", "disease_classification", "anomaly_detection"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "classes", "headline", "published"),
    [
        ("ct-rate", "pairs", 16, CHEST, 6),
        ("rad-chestct", "pairs", 15, CHEST, 6),
        ("ct-rate-2026-04", "similarity", 16, CHEST, 1),
        ("rad-chestct-2026-04", "similarity", 14, CHEST, 1),
        ("pub-brain-5", "multi-class", 5, [f"{each}_balanced_accuracy" for each in BRAIN] + ["macro_auc"], 3),
        ("pub-brain-5-gt", "multi-class", 5, [f"{each}_balanced_accuracy" for each in BRAIN] + ["macro_auc"], 5),
        ("pub-brain-5-2026-04", "multi-class", 5, [f"{each}_balanced_accuracy" for each in BRAIN] + ["macro_auc"], 6),
        (
            "pub-brain-5-gt-2026-04",
            "multi-class",
            5,
            [f"{each}_balanced_accuracy" for each in BRAIN] + ["macro_auc"],
            0,
        ),
        ("rsna", "similarity", 5, ["macro_auc"], 5),
        ("rsna-2026-04", "similarity", 6, ["macro_auc"], 0),
        ("mr-rate", "similarity", 37, ["macro_auc"], 2),
        ("cq500", "similarity", 11, ["macro_auc"], 0),
    ],
)
def test_tasks_of_the_package(name: str, kind: str, classes: int, headline: list[str], published: int) -> None:
    task = load_task(name)
    assert (task.name, task.kind, len(task.classes)) == (name, kind, classes)
    assert task.headline == headline
    assert len(task.published.rows) == published
    assert set(task.published.columns) <= {*headline, *(f"{each}_auc" for each in task.names)}
    assert len(task.prompts()) == len(task.classes) * (2 if kind == "pairs" else 1)
    assert len(task.label_columns) == len(task.names) == (14 if name.startswith("rad") else len(task.classes))


def test_all_tasks_are_tested() -> None:
    (tested,) = (mark.args[1] for mark in test_tasks_of_the_package.pytestmark)
    assert list_tasks() == sorted(name for name, *_ in tested)
    assert all(yaml.safe_load(path.read_text()) for path in FOLDER.iterdir())


def test_prompts_of_the_package() -> None:
    chest = load_task("ct-rate")
    assert chest.sentences()["Lung nodule"] == ["The volume shows: Lung nodule."]
    assert chest.sentences("organ")["Lung nodule"] == ["The lung shows: Nodule."]
    assert chest.sentences("organ", "negative")["Atelectasis"] == ["The lung shows: Not atelectatic."]
    assert chest.sentences("organ")["Hiatal hernia"] == ["The esophagus shows: Hiatal hernia."]
    with pytest.raises(ValueError, match="task ct-rate has no templates 'x': there are volume, organ"):
        chest.sentences("x")
    rad = load_task("rad-chestct")
    assert "Mosaic attenuation pattern" not in rad.classes
    assert [each for each, column in rad.columns.items() if column == "calcification"] == ["Calcification"]
    assert rad.sentences() == {k: v for k, v in chest.sentences().items() if k in rad.classes}
    brain = load_task("pub-brain-5")
    assert brain.sentences()["Normal"] == ["This MRI study shows: No significant abnormalities."]
    assert brain.subtasks["glioma_detection"] == ("Normal", "Glioma")
    assert load_task("pub-brain-5-gt").subtasks == brain.subtasks
    head = load_task("cq500")
    assert head.sentences()["EDH"] == ["This study shows: extradural hemorrhage"]


ENSEMBLE = [
    "{}.", "{} identified.", "{} noted.", "{} seen.", "new {}.", "known {}.", "prominent {}.", "likely {}.",
    "possibly {}.", "indicating {}.", "reflecting {}.", "representing {}.", "suggesting {}.", "indicative of {}.",
    "suggestive of {}.", "related to {}.", "consistent with {}.", "compatible with {}.",
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in list_tasks() if "ensemble" in load_task(name).templates])
def test_ensembles_are_the_released_ones(name: str) -> None:
    chest = "chestct" in name or "ct-rate" in name
    words = ["there is {}.", "{} is observed.", "{} is present.", "onsistent with {}.", "compatible with {}."]
    for label, texts in load_task(name).sentences("ensemble").items():
        (prompt,) = load_task(name).classes[label].positive
        ends = ["{}."] if label == "Normal" else words if chest else ENSEMBLE
        assert texts == [f"This study shows: {end.replace('{}', prompt)}" for end in ends]


def test_prompts_of_the_chest_by_templates() -> None:
    for name in ("ct-rate", "rad-chestct"):
        task = load_task(name)
        same = [k for k in task.classes if k not in ("Lung nodule", "Lung opacity")]
        for templates, two in (("volume", ["Lung nodule", "Lung opacity"]), ("organ", ["Nodule", "Opacity"])):
            positive, negative = (task.sentences(templates, side) for side in ("positive", "negative"))
            organ = {"volume": "The volume"}.get(templates, "The lung")
            for label, prompt in zip(("Lung nodule", "Lung opacity"), two, strict=True):
                assert positive[label] == [f"{organ} shows: {prompt}."]
                assert negative[label] == [f"{organ} shows: Not {prompt.lower()}."]
            for k in same:
                no = "Not atelectatic" if k == "Atelectasis" else f"Not {k.lower()}"
                assert positive[k][0].partition(": ")[2] == f"{k}." and negative[k][0].partition(": ")[2] == f"{no}."
    assert load_task("rad-chestct-2026-04").names == [*load_task("rad-chestct").names]
    assert load_task("ct-rate-2026-04").names == load_task("ct-rate").names


def test_where_labels_may_stand(tmp_path: Path) -> None:
    task = load_task("rad-chestct")
    assert dict(zip(task.names, task.label_columns, strict=True))["Calcification"] == (
        "calcification", "Calcification", "Coronary artery wall calcification", "Arterial wall calcification",
    )  # fmt: skip
    path = tmp_path / "labels.csv"
    path.write_text("NoteAcc_DEID,A,b,c\nu,1,0,1\n")
    labels = read_labels(path, [("a", "A"), "b", ("c", "b")], ["NoteAcc_DEID"])
    assert labels["u"].tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"has no column a \(there are A, b, c\)"):
        read_labels(path, [("a", "d"), "b"], ["NoteAcc_DEID"])
    with pytest.raises(ValueError, match="needs a column of study, study_uid, VolumeName"):
        read_labels(path, ["b"])


def test_published_figures() -> None:
    """Spot checks against the paper's Tables 1 and 2."""
    assert load_task("ct-rate").published.rows["HLIP (Qwen reports)"] == (78.7, 72.4, 75.5, 38.4, 74.1)
    assert load_task("ct-rate").published.rows["CT-CLIP"][-1] is None
    assert load_task("rad-chestct").published.rows["HLIP (original reports)"] == (72.3, 68.4, 72.1, 40.4, 66.7)
    assert load_task("pub-brain-5").published.rows["HLIP"] == (91.5, 89.2, 79.2, 78.1, 63.3, 63.9)
    assert load_task("pub-brain-5-gt").published.rows["HLIP"] == (95.0, 89.2, 79.6, 73.4, 54.8, 61.3)


def test_a_file_of_classes_and_templates_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("classes: {a: [x, y], b: z}\ntemplates: ['It is {}.', '{}!']\n")
    task = load_task(path)
    assert (task.name, task.kind, task.metrics, task.headline) == (
        "mine", "multi-class", ("balanced_accuracy", "auc", "weighted_f1"),
        ["balanced_accuracy", "macro_auc", "weighted_f1"],
    )  # fmt: skip
    assert task.sentences() == {"a": ["It is x.", "x!", "It is y.", "y!"], "b": ["It is z.", "z!"]}
    path.write_text("like: rsna\ncolumns: {Any: any, Subdural: null}\n")
    assert load_task(path).columns["Any"] == "any"
    assert len(load_task(path).classes) == 4


def test_names_and_texts_of_a_task_are_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "classes: {yes: on, 1.50: 1e3}\ncolumns: {yes: 007, 1.50: off}\ngroups: {yes: y, 1.50: 2024-01-01}\n"
        "templates: {n: {y: '{}.', 2024-01-01: '{}!'}}\n"
        "published: {source: 2025, columns: [auc], rows: {012: [71.5], no: [null]}}\n"
    )
    task = load_task(path)
    assert task.sentences() == {"yes": ["on."], "1.50": ["1e3!"]}
    assert task.columns == {"yes": "007", "1.50": "off"}
    assert task.published.source == "2025" and task.published.rows == {"012": (71.5,), "no": (None,)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("classes: {}", "classes: expected names with values"),
        ("classes: {a: x}", "classes: too few"),
        ("classes: {a: x, b: ' '}", "classes.b: expected a text"),
        ("classes: {a: x, b: []}", "classes.b.positive: texts: expected a text"),
        ("classes: {a: x, b: y}\ncolumns: {a: null}", "classes: too few"),
        ("classes: {a: x, b: y}\ncolumns: {c: d}", "columns: there is no class 'c'"),
        ("classes: {a: x, b: y}\ncolumns: {a: [3]}", "columns.a: expected a text, got ['3']"),
        ("classes: {a: x, b: y}\ntemplates: none", "templates.default: expected exactly one {} in 'none'"),
        ("classes: {a: x, b: y}\ntemplates: {t: {lung: '{}'}}", "templates.t: none for the group None of a"),
        ("classes: {a: x, b: y}\nkind: other", "kind: expected one of multi-class, pairs, similarity, got 'other'"),
        ("kind: pairs\nclasses: {a: x}", "classes.a: expected the prompts `positive` and `negative`"),
        ("kind: pairs\nclasses: {a: {positive: x}}", "the prompts `positive` and `negative`"),
        ("classes: {a: x, b: y}\nmetrics: [recall]", "'recall' is none of kind multi-class"),
        ("kind: similarity\nclasses: {a: x}\nmetrics: [f2]", "'f2' is none of kind similarity"),
        ("classes: {a: x, b: y}\nsubtasks: {t: [a]}", "subtasks.t: expected at least two"),
        ("classes: {a: x, b: y}\nsubtasks: {t: [a, c]}", "subtasks.t: there is no class 'c'"),
        ("kind: similarity\nclasses: {a: x}\nsubtasks: {t: [a]}", "subtasks: only a task of kind multi-class"),
        ("classes: {a: x, b: y}\npublished: {columns: [m], rows: {r: [1, 2]}}", "published: r: expected 1 numbers"),
        ("classes: {a: x, b: y}\npublished: {columns: [m], rows: {r: [.nan]}}", "published: r: expected 1 numbers"),
        ("classes: {a: x, b: y, a: z}", "line 1: 'a' occurs twice"),
        ("classes: {a: x, b: y}\nprompts: {a: x}", "unknown field 'prompts'"),
        ("classes: {a: x, b: y}\ntemplate: '{}'", "unknown field 'template'; did you mean templates?"),
        ("classes: {a: x, b: y}\npublished: {colums: [m], rows: {r: [1]}}", "unknown field 'colums'"),
        ("classes: {a: x, b: y}\ntemplates: '{} {name}'", "exactly one {} in '{} {name}', and no other brace"),
        ("classes: {a: x, b: y}\ntemplates: ['{}', '{{}}']", "exactly one {} in '{{}}'"),
        ("classes: {Glioma: x, 'glioma ': y}", "'Glioma' and 'glioma ' are the same but for capitals and spaces"),
        ("classes: {a: x, b: [null]}", "classes.b.positive: texts: expected a text at place 0 of the list, got None"),
        ("classes: {a: x, b: null}", "classes.b.positive: texts: expected a text or a list of texts, got None"),
        ("classes: {a: x, b: y}\nmerged: {c: [a, b]}", "merged: only a task of kind pairs"),
        ("classes: {a: x, b: y}\nthreshold: half", "threshold: expected lowest, highest or a number, got 'half'"),
        ("classes: {a: x, b: y}\nreworded: {t: {a: z}}", "reworded: there are no templates 't'"),
        ("classes: {a: x, b: y}\nreworded: {default: {c: z}}", "reworded.default: there is no class 'c'"),
        ("classes: {a: x, b: {positive: y, negative: z}}", "classes.b: expected no negative prompt"),
        ("kind: pairs", "classes: is missing"),
        ("classes: {a: x, b: y}\nmeans: {m: [s]}", "means.m: there is no subtask 's'"),
        ("classes: {a: x, b: y}\nshape: [144, x]", "shape: expected the numbers of slices"),
        ("like: nothing", "no task 'nothing' comes with the package"),
        ("[1]", "expected fields"),
        ("a: [", "while parsing"),
    ],
)
def test_bad_tasks_are_explained(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad.yaml: not a readable task") as caught:
        load_task(path)
    assert reason in str(caught.value)


def test_unknown_tasks() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'pub-brain5'; did you mean pub-brain-5"):
        load_task("pub-brain5")
    with pytest.raises(ValueError, match=r"none.yaml: not a readable task"):
        load_task("none.yaml")


def test_all_that_published_protocols_hold(tmp_path: Path) -> None:
    """Prompts by templates, merged classes and thresholds of chest CT; ensembles with exceptions."""
    path = tmp_path / "chest.yaml"
    path.write_text("""like: rad-chestct
templates:
  volume: "The volume shows: {}."
  organ: {heart: "The heart shows: {}.", "*": "The lung shows: {}."}
reworded: {organ: {Lung nodule: {positive: Nodule, negative: Not nodule}}}
merged: {Calcification: [Coronary artery wall calcification, Arterial wall calcification]}
columns: {Mosaic attenuation pattern: null, Calcification: calcification, Lung nodule: nodule}
threshold: highest
""")
    task = load_task(path)
    assert (len(task.names), task.names[-1], task.columns["Calcification"]) == (14, "Calcification", "calcification")
    assert not {"Coronary artery wall calcification", "Mosaic attenuation pattern"} & set(task.names)
    assert task.sentences()["Lung nodule"] == ["The volume shows: Lung nodule."]
    assert task.sentences("organ", "negative")["Lung nodule"] == ["The lung shows: Not nodule."]
    assert task.sentences("organ")["Cardiomegaly"] == ["The heart shows: Cardiomegaly."]
    assert (len(task.classes), len(task.prompts()), task.threshold) == (15, 30, "highest")
    # Two classes, whose shares of three studies are these, as one: the larger if either is above a half.
    shares = np.array([[0.9, 0.2], [0.4, 0.3], [0.1, 0.6]])
    two = {name: {"positive": name, "negative": f"no {name}"} for name in ("a", "b")}
    merged = Task(two, kind="pairs", merged={"c": ("a", "b")})
    logits = np.log(shares / (1 - shares))
    similarities = np.concatenate([logits, np.zeros((3, 2))], axis=1)
    np.testing.assert_allclose(merged.scores(similarities, 1.0), [[0.9], [0.3], [0.6]])
    np.testing.assert_allclose(Task(two, kind="pairs").scores(similarities, 1.0), shares)

    path.write_text("""classes: {Normal: no abnormality, Stroke: acute stroke}
groups: {Normal: plain}
templates: {ensemble: {plain: "Shows: {}.", "*": ["Shows: {}.", "Shows: {} seen."]}}
threshold: 0.5
""")
    task = load_task(path)
    assert [len(texts) for texts in task.prompts()] == [1, 2] and task.threshold == 0.5


@pytest.mark.parametrize("name", list_tasks())
def test_released_names_are_of_figures_that_there_are(name: str) -> None:
    task = load_task(name)
    parts = [*task.names, *task.subtasks, *task.means]
    parts += [f"{part}_{each}" for part, members in task.subtasks.items() if len(members) == 3 for each in members]
    known = {*task.headline, *(f"{part}_{metric}" for part in parts for metric in task.metrics)}
    assert task.released and task.released.keys() <= known
    assert len(set(task.released.values())) == len(task.released)


def test_released_names_hold_the_class() -> None:
    released = load_task("ct-rate").released
    assert released["Emphysema_auc"] == "auc (ctrate_Emphysema)" and released["accuracy"] == "acc (ctrate)"
    released = load_task("pub-brain-5").released
    assert released["tumor_classification_balanced_accuracy"] == "balanced_acc (pubbrain5_tumor)"
