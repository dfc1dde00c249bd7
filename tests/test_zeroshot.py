from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hlip
from conftest import random_study
from hlip.embed.loop import embed_studies
from hlip.evaluate.tasks import load_task
from hlip.evaluate.zeroshot import Prompts, class_shares, zeroshot, zeroshot_classifier

PROMPTS = Prompts({"stroke": ["stroke", "infarct"], "tumor": ["mass"]}, ("{}.", "This shows {}."))


def test_classifier_is_the_normalised_mean_over_names_and_templates(tiny_model: hlip.HLIPModel) -> None:
    texts = [["stroke.", "This shows stroke.", "infarct.", "This shows infarct."], ["mass.", "This shows mass."]]
    with torch.no_grad():
        expected = [F.normalize(sum(F.normalize(tiny_model.text([t])[0], dim=0) for t in ts), dim=0) for ts in texts]
    torch.testing.assert_close(zeroshot_classifier(tiny_model, PROMPTS), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_shares(tiny_model: hlip.HLIPModel) -> None:
    studies = [hlip.Study(f"s{i}", random_study([(8, 16, 16)] * (i + 1), i)) for i in range(5)]
    uids, shares = zeroshot(tiny_model, studies, PROMPTS)
    assert uids == [f"s{i}" for i in range(5)]
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    with torch.no_grad():
        image = tiny_model.encode_image(hlip.pack(studies[3:4], (4, 8, 8)))
        logits = image @ zeroshot_classifier(tiny_model, PROMPTS).T / 0.07
    torch.testing.assert_close(shares[3:4], logits.softmax(1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no study"):
        zeroshot(tiny_model, [], PROMPTS)
    assert class_shares(tiny_model, image, zeroshot_classifier(tiny_model, PROMPTS)).shape == (1, 2)


def test_embedding_in_batches_keeps_order_and_mode(tiny_model: hlip.HLIPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [hlip.Study(f"s{i}", random_study([(8, 16, 16)] * (1 + i % 4), i)) for i in range(9)]
    sizes: list[int] = []
    encode = tiny_model.encode_image
    monkeypatch.setattr(tiny_model, "encode_image", lambda b: (sizes.append(b.layout.num_tokens), encode(b))[1])
    small = dict(embed_studies(tiny_model.train(), studies, max_tokens=32))
    assert tiny_model.training
    tiny_model.eval()
    assert max(sizes) <= 32
    assert len(sizes) > 3
    large = dict(embed_studies(tiny_model, studies, max_tokens=10**6))
    assert list(small) == list(large) == [s.uid for s in studies]
    for uid, embedding in small.items():
        torch.testing.assert_close(embedding, large[uid], rtol=1e-4, atol=1e-5)
    assert list(embed_studies(tiny_model, [])) == []


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("classes: {a: [x, y], b: [z]}\ntemplates: ['It is {}.']\n")
    assert Prompts.read(path) == Prompts({"a": ["x", "y"], "b": ["z"]}, ("It is {}.",))
    path.write_text("classes: {a: x, b: z}\ntemplates: It is {}.\n")
    assert Prompts.read(path) == Prompts({"a": ["x"], "b": ["z"]}, ("It is {}.",))
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
        "kind: similarity\nclasses: {a: [x], b: [y]}",
        "kind: pairs\nclasses: {a: {positive: x, negative: y}}",
        "classes: {a: x, b: y}\ngroups: {a: g, b: h}\ntemplates: {t: {g: '{}', h: '{}'}}",
    ]
    for text in bad:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"prompts.yaml: not a readable prompts file"):
            Prompts.read(path)
    with pytest.raises(ValueError, match=r"missing.yaml"):
        Prompts.read(tmp_path / "missing.yaml")


def test_prompt_files_keep_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("classes: {yes: [on, 1_000, 2024-01-01], no: 1e3, 0012: '0012', 1:30: true}\n")
    assert Prompts.read(path).classes == {
        "yes": ["on", "1_000", "2024-01-01"], "no": ["1e3"], "0012": ["0012"], "1:30": ["true"],
    }  # fmt: skip
    path.write_text("classes:\n  a: stroke\n  b: normal\n  a: mass\n")
    with pytest.raises(ValueError, match=r"prompts.yaml.*line 4: 'a' occurs twice, first on line 2"):
        Prompts.read(path)


def test_prompt_files_are_read_as_tasks_are(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("like: pub-brain-5\ntemplates: {one: ['It is {}.'], other: ['{}!']}\n")
    prompts, task = Prompts.read(path), load_task(path)
    assert prompts.sentences == task.sentences(task.positive)
    assert prompts.sentences["Stroke"] == ["It is Acute stroke."]
    path.write_text("classes: {a: x, b: y}\ntemplate: 'It is {}.'\n")
    for read in (Prompts.read, load_task):
        with pytest.raises(ValueError, match=r"task.yaml: .*unknown field 'template'; did you mean templates\?"):
            read(path)


def test_a_text_alone_is_a_list_of_one() -> None:
    prompts = Prompts({"a": "stroke", "b": ("mass", "tumour")}, "It is {}.")
    assert prompts.sentences == {"a": ["It is stroke."], "b": ["It is mass.", "It is tumour."]}


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
        Prompts(classes, templates)
