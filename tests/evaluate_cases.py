"""A store, labels and embeddings to evaluate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hlip.embed.table import Embeddings
from hlip.evaluate.tasks import Task, load_task
from hlip.store.store import Store
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


def label_table(store: Store, path: Path, leave: int = 0, more: str = "") -> Path:
    names, values = store.labels
    with path.open("w") as file:
        file.write(",".join(["study", *names]) + "\n")
        for uid, row in list(zip(store.uids, values.tolist(), strict=True))[leave:]:
            file.write(",".join([uid, *("" if value != value else f"{value:g}" for value in row)]) + "\n")
        file.write(more)
    return path
