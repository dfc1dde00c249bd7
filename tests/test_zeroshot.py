from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hlip
from conftest import random_study
from hlip.embed.loop import Options, embed
from hlip.evaluate.evaluation import zeroshot, zeroshot_classifier
from hlip.evaluate.tasks import Task, list_tasks, load_task

PROMPTS = Task({"stroke": ["stroke", "infarct"], "tumor": ["mass"]}, ("{}.", "This shows {}."))


def test_classifier_is_the_normalised_mean_over_names_and_templates(tiny_model: hlip.HLIPModel) -> None:
    texts = [["stroke.", "This shows stroke.", "infarct.", "This shows infarct."], ["mass.", "This shows mass."]]
    with torch.no_grad():
        expected = [F.normalize(sum(F.normalize(tiny_model.text([t])[0], dim=0) for t in ts), dim=0) for ts in texts]
    torch.testing.assert_close(zeroshot_classifier(tiny_model, PROMPTS), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_shares(tiny_model: hlip.HLIPModel) -> None:
    studies = [hlip.Study(f"s{i}", random_study([(8, 16, 16)] * (i + 1), i)) for i in range(5)]
    uids, shares = zeroshot(tiny_model, studies, PROMPTS)
    assert uids == [f"s{i}" for i in range(5)]
    np.testing.assert_allclose(shares.sum(1), np.ones(5))
    with torch.no_grad():
        image = tiny_model.encode_image(hlip.pack(studies[3:4], (4, 8, 8)))
        logits = image @ zeroshot_classifier(tiny_model, PROMPTS).T / 0.07
    np.testing.assert_allclose(shares[3:4], logits.softmax(1).numpy(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no study"):
        zeroshot(tiny_model, [], PROMPTS)


def test_embedding_in_batches_keeps_order_and_mode(tiny_model: hlip.HLIPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [hlip.Study(f"s{i}", random_study([(8, 16, 16)] * (1 + i % 4), i)) for i in range(9)]
    sizes: list[int] = []
    encode = tiny_model.encode_image
    monkeypatch.setattr(tiny_model, "encode_image", lambda b: (sizes.append(b.layout.num_tokens), encode(b))[1])
    small = embed(tiny_model.train(), iter(studies), Options(max_tokens=32, dtype="fp32"))
    assert tiny_model.training
    tiny_model.eval()
    assert max(sizes) <= 32
    assert len(sizes) > 3
    large = embed(tiny_model, studies, Options(max_tokens=10**6, dtype="fp32"))
    assert small.study.tolist() == large.study.tolist() == [s.uid for s in studies]
    np.testing.assert_allclose(small.embedding, large.embedding, rtol=1e-4, atol=1e-5)
    assert len(embed(tiny_model, [])) == 0


def test_studies_as_they_are_and_options(tiny_model: hlip.HLIPModel, tmp_path: Path) -> None:
    """They are taken one by one, whatever a row is of; and cannot be kept, as no other run would know them again."""
    taken: list[str] = []

    def given() -> Iterator[hlip.Study]:
        for i in range(4):
            taken.append(f"s{i}")
            yield hlip.Study(taken[-1], random_study([(8, 16, 16)] * 2, i), ["x", "y"])

    most: list[int] = []
    encode = tiny_model.encode_image
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "encode_image", lambda batch: (most.append(len(taken)), encode(batch))[1])
        both = embed(tiny_model, given(), Options(unit="both", max_tokens=24, dtype="fp32"))
    assert most[0] <= 2 and both.scan.tolist() == ["", "x", "y"] * 4
    one = embed(tiny_model, given(), Options(one_scan=1, dtype="fp32"))
    for row, study in zip(one.embedding, given(), strict=True):
        scans = both.embedding[(both.study == study.uid) & (both.scan != "")]
        assert np.abs(scans - row).max(1).min() < 1e-5
    with pytest.raises(ValueError, match="needs studies of a store"):
        embed(tiny_model, given(), out=tmp_path / "e.npz")


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("classes: {a: [x, y], b: [z]}\ntemplates: ['It is {}.']\n")
    assert load_task(path) == Task({"a": ["x", "y"], "b": ["z"]}, ("It is {}.",), name="prompts")
    path.write_text("classes: {a: x, b: z}\ntemplates: It is {}.\n")
    assert load_task(path) == Task({"a": ["x"], "b": ["z"]}, ("It is {}.",), name="prompts")
    path.write_text("classes: {a: x, b: z}\n")
    assert load_task(path) == Task({"a": "x", "b": "z"}, "This study shows: {}.", name="prompts")
    bad = [
        "classes: {}",
        "classes: {a: x}",
        "classes: {a: x, b: ' '}",
        "classes: {a: x, b: [[1]]}",
        "[1, 2]",
        "classes: {a: []}",
        "a: [",
        "classes: {a: [x], b: [y]}\ntemplates: ['no place']",
        "classes: {a: [x], b: [y]}\ntemplate: 'It is {}.'",
        "classes: {a: [x], b: [y]}\nclases: {c: z}",
        "classes: {a: [x], b: [y], A: [z]}",
    ]
    for text in bad:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"prompts.yaml: not a readable task"):
            load_task(path)
    with pytest.raises(ValueError, match=r"missing.yaml"):
        load_task(tmp_path / "missing.yaml")


@pytest.mark.parametrize("name", list_tasks())
def test_every_benchmark_says_something_of_a_study(name: str, tiny_model: hlip.HLIPModel) -> None:
    task = load_task(name)
    _, scores = zeroshot(tiny_model, [hlip.Study("s", random_study([(8, 16, 16)]))], task)
    assert scores.shape == (1, len(task.names))
    assert (np.abs(scores) <= 1).all() and (task.kind == "similarity" or (scores > 0).all())


def test_prompt_files_keep_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("classes: {yes: [on, 1_000, 2024-01-01], no: 1e3, 0012: '0012', 1:30: true}\n")
    assert {name: pair.positive for name, pair in load_task(path).classes.items()} == {
        "yes": ("on", "1_000", "2024-01-01"), "no": ("1e3",), "0012": ("0012",), "1:30": ("true",),
    }  # fmt: skip
    path.write_text("classes:\n  a: stroke\n  b: normal\n  a: mass\n")
    with pytest.raises(ValueError, match=r"prompts.yaml.*line 4: 'a' occurs twice, first on line 2"):
        load_task(path)


def test_a_text_alone_is_a_list_of_one() -> None:
    prompts = Task({"a": "stroke", "b": ("mass", "tumour")}, "It is {}.")
    assert prompts.sentences() == {"a": ["It is stroke."], "b": ["It is mass.", "It is tumour."]}


@pytest.mark.parametrize(
    ("classes", "templates"),
    [
        ({"a": "x"}, "{}"), ({"a": "x", "b": float("nan")}, "{}"), ({"a": "x", "b": [None]}, "{}"),
        ({"a": "x", "b": b"y"}, "{}"), ({"a": "x", "b": {"y": "z"}}, "{}"), ({"a": "x", "b": " "}, "{}"),
        (["a", "b"], "{}"), ("ab", "{}"), ({"a": "x", "b": "y"}, ()), ({"a": "x", "b": "y"}, None),
        ({"a": "x", "b": "y"}, "{} {}"), ({"a": "x", "b": "y"}, "{name}"), ({"a": "x", "b": "y"}, "{} }"),
        ({"a b": "x", "A  B": "y"}, "{}"), ({"a": ["x", "y"], "b": ["y", "x"]}, "{}"),
    ],
)  # fmt: skip
def test_prompts_that_are_refused(classes: Any, templates: Any) -> None:
    with pytest.raises(ValueError):
        Task(classes, templates)
