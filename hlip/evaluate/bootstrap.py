"""Confidence intervals, by drawing studies with replacement.

A draw is how often it has each study: figures of many draws are products of matrices, not loops over them. Each
function gives what `metrics` would for every draw, which the tests check.

Shapes: N studies, D draws, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

DRAWS = 1000
LEVEL = 0.95
CHUNK = 2**22  # numbers of a matrix of draws


def draw(num_studies: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """(d, N) float64 of how often each study occurs in a draw of N, until there are D of them."""
    random = np.random.default_rng(seed)
    size = max(1, CHUNK // num_studies)
    for first in range(0, draws, size):
        count = min(size, draws - first)
        chosen = random.integers(num_studies, size=(count, num_studies))
        flat = (chosen + np.arange(count)[:, None] * num_studies).ravel()
        yield np.bincount(flat, minlength=count * num_studies).reshape(count, num_studies).astype(np.float64)


def auc(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of one class in each draw: (D); not-a-number without positives or negatives.

    Args:
        labels: (N) of 0, 1 and -1.
        scores: (N).
        counts: (D, N).
    """
    order = np.argsort(scores, kind="stable")
    order = order[labels[order] >= 0]
    if len(order) == 0:
        return np.full(len(counts), np.nan)
    ordered = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))  # of runs of equal scores
    drawn = counts[:, order]
    positive = np.add.reduceat(drawn * (labels[order] == 1), starts, axis=1)
    negative = np.add.reduceat(drawn * (labels[order] == 0), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2  # an equal score counts half
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def at_threshold(labels: np.ndarray, scores: np.ndarray, threshold: float, counts: np.ndarray) -> dict[str, np.ndarray]:
    """What `metrics.at_threshold` gives for each draw: (D) each; not-a-number without positives or negatives.

    The threshold is that of all studies: chosen anew for each draw it would suit the draw's repeated studies, and
    intervals would lie too high.

    Args:
        labels: (N) of 0, 1 and -1.
        scores: (N).
    """
    above = scores > threshold
    tp, fp, fn, tn = (
        counts[:, (labels == label) & (above == found)].sum(1) for label, found in ((1, 1), (0, 1), (1, 0), (0, 0))
    )
    p, n = tp + fn, fp + tn
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "balanced_accuracy": (tp / p + tn / n) / 2,
            "accuracy": (tp + tn) / (p + n),
            # The F1 of positives times their number, and that of negatives; 0 where there is neither.
            "weighted_f1": (p * _ratio(2 * tp, p + tp + fp) + n * _ratio(2 * tn, n + tn + fn)) / (p + n),
            "precision": _ratio(tp, tp + fp),
            "recall": tp / p,
        }
    return {name: np.where((p > 0) & (n > 0), values, np.nan) for name, values in found.items()}


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def balanced_accuracy(true: np.ndarray, found: np.ndarray, classes: int, counts: np.ndarray) -> np.ndarray:
    """The mean over the classes of the share of its studies that are found, in each draw: (D).

    Not-a-number where a class is not drawn.

    Args:
        true, found: (N) int64 - a study's class; -1 leaves it out.
        counts: (D, N).
    """
    recalls = []
    for k in range(classes):
        of_class = true == k
        with np.errstate(invalid="ignore"):
            recalls.append(counts[:, of_class] @ (found[of_class] == k) / counts[:, of_class].sum(1))
    return np.mean(recalls, axis=0)


def weighted_f1(true: np.ndarray, found: np.ndarray, classes: int, counts: np.ndarray) -> np.ndarray:
    """The mean F1 of the classes, weighted by their studies, in each draw: (D).

    Not-a-number where a class is not drawn.

    Args:
        as `balanced_accuracy`.
    """
    known = true >= 0
    total = np.zeros(len(counts))
    for k in range(classes):
        size = counts[:, true == k].sum(1)
        hits = counts[:, (true == k) & (found == k)].sum(1)
        total += np.where(size > 0, size * _ratio(2 * hits, size + counts[:, known & (found == k)].sum(1)), np.nan)
    with np.errstate(invalid="ignore"):
        return total / counts[:, known].sum(1)


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the classes that have a value in a draw: (D, K) to (D); not-a-number where none has."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(1) / known.sum(1)


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """The middle part of the draws (D) that have a value; None if none has."""
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
