"""Evaluation of held-out studies in training: over which classes its AUC is averaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hlip.evaluate.tasks import Task
from hlip.train.held_out import HeldOut

STORE: Any = None  # is not read for this


def test_classes_without_both_labels_are_left_out() -> None:
    """As `hlip eval` does, and the protocol of MR-RATE."""
    task = Task({"a": "p", "b": "q", "c": "r"}, kind="similarity")
    labels = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0], [0, -1, 1]])
    scores = np.random.default_rng(0).random(labels.shape)
    wanted = np.mean([roc_auc_score(labels[:, k], scores[:, k]) for k in (0, 2)])
    assert HeldOut(STORE, labels, task).macro_auc(scores) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["multi-class", "similarity"])
def test_where_no_mean_can_be_had(kind: Any) -> None:
    labels = np.array([[1, 0, 0], [0, 1, 0]]) if kind == "multi-class" else np.ones((2, 3), int)
    with pytest.raises(ValueError, match="positives and negatives of every class"):
        HeldOut(STORE, labels, Task({"a": "p", "b": "q", "c": "r"}, kind=kind)).macro_auc(np.zeros((2, 3)))
