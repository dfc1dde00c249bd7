"""Figures of merit: of all studies, and of draws of them with replacement, from which intervals follow.

A draw is how often it has each study. A figure takes the counts of D draws, (D, N), and has a value in each, (D):
figures of many draws are products of matrices, not loops over them. Counts of one, `once`, are all studies as they
are.

Shapes: N studies, D draws, K classes. Labels are 0, 1, or -1 where a label is missing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from .labels import MISSING

CUTS = np.linspace(0, 1, 100)  # where a threshold on scores is looked for
AT_THRESHOLD = ("balanced_accuracy", "accuracy", "weighted_f1", "precision", "recall")
DRAWS = 1000
LEVEL = 0.95
CHUNK = 2**22  # numbers of a matrix of draws


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


def scorable(labels: np.ndarray) -> np.ndarray:
    """Whether there are both positives and negatives of each class: (K) bool."""
    return (labels == 1).any(0) & (labels == 0).any(0)


def once(num_studies: int) -> np.ndarray:
    """The counts of the draw that has each study once: (1, N)."""
    return np.ones((1, num_studies))


def draw(names: Sequence[Hashable], draws: int, seed: int) -> Iterator[np.ndarray]:
    """(d, N) float64 of how often each of N rows is drawn with replacement, until there are D draws of as many rows.

    Rows of one name, such as the scans of a study, are drawn together.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    rows, n = [places[name] for name in names], len(places)
    random = np.random.default_rng(seed)
    size = max(1, CHUNK // n)
    for first in range(0, draws, size):
        count = min(size, draws - first)
        chosen = random.integers(n, size=(count, n))
        flat = (chosen + np.arange(count)[:, None] * n).ravel()
        yield np.bincount(flat, minlength=count * n).reshape(count, n).astype(np.float64)[:, rows]


def auc(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class in each draw: (D, K); not-a-number without positives or negatives.

    Args:
        labels, scores: (N, K); scores are larger for the class, in any unit.
        counts: (D, N).
    """
    areas = np.full((len(counts), labels.shape[1]), np.nan)
    for k, (label, score) in enumerate(zip(labels.T, scores.T, strict=True)):
        order = np.argsort(score, kind="stable")
        order = order[label[order] != MISSING]
        if len(order) == 0:
            continue
        ordered = score[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))  # of runs of equal scores
        positive, negative = (
            np.add.reduceat(counts[:, order] * (label[order] == value), starts, axis=1) for value in (1, 0)
        )
        below = np.cumsum(negative, axis=1) - negative / 2  # an equal score counts half
        with np.errstate(invalid="ignore"):
            areas[:, k] = (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))
    return areas


def macro_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve, one class against the rest, averaged over the classes.

    Args:
        labels: (N, K); of every class there must be positives and negatives.
        scores: (N, K), larger for the class.

    Raises:
        ValueError: a class without a positive or without a negative study; a score that is not a number.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    check_scores(labels, scores)
    if not scorable(labels).all():
        counts = (labels == 1).sum(0).tolist()
        raise ValueError(f"AUC needs positives and negatives of every class; positives are {counts}")
    return float(auc(labels, scores, once(len(labels))).mean())


class AUC(NamedTuple):
    """Areas under the ROC curve, with intervals by drawing studies.

    value, low, high: (K). macro, macro_low, macro_high: of their mean. macro_drawn: (D) - the mean in each draw.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    macro: float
    macro_low: float
    macro_high: float
    macro_drawn: np.ndarray


def auc_intervals(labels: np.ndarray, scores: np.ndarray, draws: int = DRAWS, seed: int = 0) -> AUC:
    """AUC of every class, with 95% intervals.

    The same seed and number of studies have the same draws, so that two models can be compared in pairs.

    Args:
        labels: (N, K) of 0, 1 and -1, which marks a missing label.
        scores: (N, K), larger for the class.

    Raises:
        ValueError: a class without a positive or a negative, a score that is not a number, or shapes that differ.
    """
    macro = macro_auc(labels, scores)
    drawn = np.concatenate([auc(labels, scores, counts) for counts in draw(range(len(labels)), draws, seed)])
    low, high = np.array([interval(column) or (np.nan, np.nan) for column in drawn.T]).T
    macro_drawn = mean(drawn)
    value = auc(labels, scores, once(len(labels)))[0]
    return AUC(value, low, high, macro, *(interval(macro_drawn) or (np.nan, np.nan)), macro_drawn)


def roc_threshold(labels: np.ndarray, scores: np.ndarray, of_equal: Literal["lowest", "highest"] = "lowest") -> float:
    """Of 100 cut points from 0 to 1, that whose point of the ROC curve is nearest to (0, 1).

    Args:
        labels: (N) of 0, 1 and -1; 0 and 1 must both be there.
        scores: (N); above the cut is positive.
        of_equal: which of cuts that are equally near.

    Raises:
        ValueError: only one of 0 and 1; a score that is not a number.
    """
    check_scores(labels[:, None], scores[:, None])
    if not scorable(labels[:, None]).all():
        raise ValueError("a threshold needs positives and negatives")
    above = scores[:, None] > CUTS
    missed, alarms = 1 - above[labels == 1].mean(0), above[labels == 0].mean(0)
    distance = np.sqrt(missed**2 + alarms**2)
    nearest = np.flatnonzero(distance == distance.min())
    return float(CUTS[nearest[0 if of_equal == "lowest" else -1]])


def at_threshold(
    labels: np.ndarray, scores: np.ndarray, thresholds: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """`AT_THRESHOLD` of every class, where scores above its threshold are positive, in each draw: (D, K) each.

    Weighted F1 is the mean of the F1 of positives and that of negatives, weighted by how many there are; precision,
    recall and F1 are 0 where nothing is positive. All are not-a-number without positives or negatives.

    The threshold is that of all studies: chosen anew for each draw it would suit the draw's repeated studies, and
    intervals would lie too high.

    Args:
        labels, scores: (N, K).
        thresholds: (K).
        counts: (D, N).

    Raises:
        ValueError: a score that is not a number.
    """
    check_scores(labels, scores)
    above = scores > thresholds
    tp, fp, fn, tn = (
        counts @ ((labels == label) & (above == said)) for label, said in ((1, 1), (0, 1), (1, 0), (0, 0))
    )
    p, n = tp + fn, fp + tn
    with np.errstate(invalid="ignore", divide="ignore"):
        figures = {
            "balanced_accuracy": (tp / p + tn / n) / 2,
            "accuracy": (tp + tn) / (p + n),
            # The F1 of positives times their number, and that of negatives; 0 where there is neither.
            "weighted_f1": (p * _ratio(2 * tp, p + tp + fp) + n * _ratio(2 * tn, n + tn + fn)) / (p + n),
            "precision": _ratio(tp, tp + fp),
            "recall": tp / p,
        }
    return {name: np.where((p > 0) & (n > 0), values, np.nan) for name, values in figures.items()}


def _ratio(hits: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, hits / np.maximum(whole, 1), 0.0)


def of_guesses(true: np.ndarray, guess: np.ndarray, classes: int, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of guesses among classes in each draw, (D) each; not-a-number where a class is not drawn.

    `balanced_accuracy`: the mean over the classes of the share of its studies that are guessed. `weighted_f1`: the mean
    F1 of the classes, weighted by their studies.

    Args:
        true, guess: (N) int64 - a study's class; -1 leaves it out.
        counts: (D, N).
    """
    is_true, is_guess = (of[:, None] == np.arange(classes) for of in (true, guess))
    sizes, hits = counts @ is_true, counts @ (is_true & is_guess)
    f1 = _ratio(2 * hits, sizes + counts @ (is_guess & (true >= 0)[:, None]))
    with np.errstate(invalid="ignore"):
        weighted = (sizes * f1).sum(1) / sizes.sum(1)
        return {
            "balanced_accuracy": (hits / sizes).mean(1),
            "weighted_f1": np.where((sizes > 0).all(1), weighted, np.nan),
        }


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the classes that have a value in a draw: (D, K) to (D); not-a-number where none has."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0.0).sum(1) / there.sum(1)


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """The middle part of the draws (D) that have a value; None if none has."""
    there = values[~np.isnan(values)]
    if len(there) == 0:
        return None
    low, high = np.quantile(there, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
