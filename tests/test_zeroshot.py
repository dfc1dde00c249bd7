from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hlip
from conftest import random_study
from hlip.tasks.embed import embed_studies
from hlip.tasks.metrics import macro_auc, read_labels
from hlip.tasks.zeroshot import Prompts, class_probabilities, zeroshot, zeroshot_classifier

PROMPTS = Prompts({"stroke": ["stroke", "infarct"], "tumor": ["mass"]}, ("{}.", "This shows {}."))


def test_classifier_is_the_normalised_mean_over_names_and_templates(tiny_model: hlip.HLIPModel) -> None:
    texts = [["stroke.", "This shows stroke.", "infarct.", "This shows infarct."], ["mass.", "This shows mass."]]
    with torch.no_grad():
        expected = [F.normalize(sum(F.normalize(tiny_model.text([t])[0], dim=0) for t in ts), dim=0) for ts in texts]
    torch.testing.assert_close(zeroshot_classifier(tiny_model, PROMPTS), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_probabilities(tiny_model: hlip.HLIPModel) -> None:
    studies = [hlip.Study(f"s{i}", random_study([(8, 16, 16)] * (i + 1), i)) for i in range(5)]
    uids, probabilities = zeroshot(tiny_model, studies, PROMPTS)
    assert uids == [f"s{i}" for i in range(5)]
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    with torch.no_grad():
        image = tiny_model.encode_image(hlip.pack(studies[3:4], (4, 8, 8)))
        logits = image @ zeroshot_classifier(tiny_model, PROMPTS).T / 0.07
    torch.testing.assert_close(probabilities[3:4], logits.softmax(1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no study"):
        zeroshot(tiny_model, [], PROMPTS)
    assert class_probabilities(tiny_model, image, zeroshot_classifier(tiny_model, PROMPTS)).shape == (1, 2)


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
        "classes: {a: x, b: [1]}",
        "[1, 2]",
        "classes: {a: []}",
        "a: [",
        "classes: {a: [x]}\ntemplates: ['no place']",
    ]
    for text in bad:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"prompts.yaml: not a readable prompts file"):
            Prompts.read(path)
    with pytest.raises(ValueError, match=r"missing.yaml"):
        Prompts.read(tmp_path / "missing.yaml")


def test_label_tables(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("\ufeffstudy_uid,b,a\nu1,1,0\nu2,0.0,1.0\n")
    labels = read_labels(path, ["a", "b"])
    assert {uid: row.tolist() for uid, row in labels.items()} == {"u1": [0, 1], "u2": [1, 0]}
    for text, reason in [
        ("x,a\nu,1", "needs a column"),
        ("study,a\nu,1", "b"),
        ("study,a,b\nu,1,2", "line 2"),
        ("study,a,b\nu,1,0\nu,0,1", "line 3: study u occurs twice"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"labels.csv: not a readable label table.*{reason}"):
            read_labels(path, ["a", "b"])


def test_macro_auc() -> None:
    labels = np.array([[1, 0], [0, 1], [0, 1], [1, 0]])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.3], [0.5, 0.5]])
    by_hand = []  # the share of pairs in which the positive study has the larger score
    for k in range(2):
        pairs = [(p, n) for p in scores[labels[:, k] == 1, k] for n in scores[labels[:, k] == 0, k]]
        by_hand.append(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs]))
    assert macro_auc(labels, scores) == pytest.approx(np.mean(by_hand))
    with pytest.raises(ValueError, match="positives and negatives"):
        macro_auc(np.ones((4, 2)), scores)
