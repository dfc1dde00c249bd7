"""Label tables, and figures of merit by scikit-learn."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

STUDY_COLUMNS = ("study", "study_uid", "VolumeName")


def read_labels(path: Path | str, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Read a CSV of 0 and 1: a column with the study's uid (`study`, `study_uid` or `VolumeName`), one per class.

    Returns:
        uid to (K) int64.

    Raises:
        ValueError: not such a file; names it, and the row.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            uid_column = next((name for name in STUDY_COLUMNS if name in columns), None)
            missing = [name for name in classes if name not in columns]
            if uid_column is None or missing:
                raise ValueError(f"needs a column of {', '.join(STUDY_COLUMNS)}, and {missing or 'the classes'}")
            labels = {}
            for line, row in enumerate(reader, 2):
                values = [row[name] for name in classes]
                if any(value not in ("0", "1", "0.0", "1.0") for value in values):
                    raise ValueError(f"line {line}: labels must be 0 or 1, got {values}")
                if row[uid_column] in labels:
                    raise ValueError(f"line {line}: study {row[uid_column]} occurs twice")
                labels[row[uid_column]] = np.array([int(float(value)) for value in values])
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{path}: not a readable label table ({error})") from error
    return labels


def macro_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve, one class against the rest, averaged over the classes.

    Args:
        labels: (N, K) of 0 and 1; every class must occur and not everywhere.
        scores: (N, K), larger for the class.

    Raises:
        ValueError: a class without a positive or without a negative study.
    """
    from sklearn.metrics import roc_auc_score

    counts = labels.sum(0)
    if ((counts == 0) | (counts == len(labels))).any():
        raise ValueError(f"AUC needs positives and negatives of every class; positives are {counts.tolist()}")
    return float(roc_auc_score(labels, scores, average="macro"))
