"""Figures of merit by scikit-learn.

Shapes: N studies, K classes. Labels are 0, 1, or -1 where a label is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .labels import MISSING

CUTS = np.linspace(0, 1, 100)  # where a threshold on scores is looked for
AT_THRESHOLD = ("balanced_accuracy", "accuracy", "weighted_f1", "precision", "recall")


def need_sklearn() -> None:
    """Raises ImportError where there is no scikit-learn; says how to install it."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("figures and probes need scikit-learn: pip install 'hlip-kernels[eval]'") from error


def check_scores(labels: np.ndarray, scores: np.ndarray, uids: Sequence[str] | None = None) -> None:
    """Raises ValueError where labels and scores do not belong together, or a score is not finite, be its label missing
    or not; names the study."""
    if labels.shape != scores.shape or labels.ndim != 2:
        raise ValueError(f"labels of shape {labels.shape} and scores of shape {scores.shape}: expected (N, K) both")
    if not np.isin(labels, (0, 1, MISSING)).all():
        raise ValueError(f"labels must be 0, 1 or -1, got {np.unique(labels).tolist()[:9]}")
    if not np.isfinite(scores).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(scores))[0])
        what = "not a number" if np.isnan(scores[row, column]) else "infinite"
        raise ValueError(f"study {row if uids is None else uids[row]}: the score of class {column} is {what}")


def class_aucs(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class over the studies that have its label: (K) float64.

    Not-a-number for a class without a positive or without a negative study.

    Args:
        labels, scores: (N, K); scores are larger for the class, in any unit.
    """
    need_sklearn()
    from sklearn.metrics import roc_auc_score

    labels, scores = np.asarray(labels), np.asarray(scores)
    check_scores(labels, scores)
    aucs = np.full(labels.shape[1], np.nan)
    for k in np.flatnonzero(scorable(labels)):
        known = labels[:, k] != MISSING
        aucs[k] = roc_auc_score(labels[known, k], scores[known, k])
    return aucs


def scorable(labels: np.ndarray) -> np.ndarray:
    """Whether there are both positives and negatives of each class: (K) bool."""
    return (labels == 1).any(0) & (labels == 0).any(0)


def macro_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve, one class against the rest, averaged over the classes.

    Args:
        labels: (N, K); of every class there must be positives and negatives.
        scores: (N, K), larger for the class.

    Raises:
        ValueError: a class without a positive or without a negative study; a score that is not a number.
    """
    labels = np.asarray(labels)
    aucs = class_aucs(labels, scores)
    if np.isnan(aucs).any():
        counts = (labels == 1).sum(0).tolist()
        raise ValueError(f"AUC needs positives and negatives of every class; positives are {counts}")
    return float(aucs.mean())


def roc_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """Of 100 cut points from 0 to 1, that whose point of the ROC curve is nearest to (0, 1); the lowest of equals.

    Args:
        labels: (n) of 0, 1 and -1; 0 and 1 must both be there.
        scores: (n) from 0 to 1; above the cut is positive.

    Raises:
        ValueError: only one of 0 and 1; a score that is not a number.
    """
    labels, scores = _known(labels, scores)
    if len(set(labels.tolist())) < 2:
        raise ValueError("a threshold needs positives and negatives")
    above = scores[:, None] > CUTS
    missed, alarms = 1 - above[labels == 1].mean(0), above[labels == 0].mean(0)
    return float(CUTS[np.argmin(missed**2 + alarms**2)])


def at_threshold(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """`AT_THRESHOLD` of one class, where scores above the threshold are positive.

    Weighted F1 is the mean of the F1 of positives and that of negatives, weighted by how many there are; precision,
    recall and F1 are 0 where nothing is positive.

    Args:
        labels: (n) of 0, 1 and -1.
        scores: (n).

    Raises:
        ValueError: a score that is not a number.
    """
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, precision_score, recall_score

    labels, scores = _known(labels, scores)
    found = (scores > threshold).astype(int)
    return {
        "balanced_accuracy": float(balanced_accuracy_score(labels, found)),
        "accuracy": float(accuracy_score(labels, found)),
        "weighted_f1": float(f1_score(labels, found, average="weighted", zero_division=0)),
        "precision": float(precision_score(labels, found, zero_division=0)),
        "recall": float(recall_score(labels, found, zero_division=0)),
    }


def _known(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n) that are not missing, and their scores."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    check_scores(labels[:, None], scores[:, None])
    return labels[labels != MISSING], scores[labels != MISSING]
