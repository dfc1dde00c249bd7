from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from hlip.evaluate import metrics
from hlip.evaluate.metrics import AT_THRESHOLD, CUTS, check_scores, macro_auc, once, roc_threshold, scorable

RNG = np.random.default_rng(0)


def class_aucs(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return metrics.auc(labels, scores, once(len(labels)))[0]


def at_threshold(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    return {name: float(value[0]) for name, value in drawn_at(labels, scores, threshold, once(len(labels))).items()}


def drawn_at(labels: np.ndarray, scores: np.ndarray, threshold: float, counts: np.ndarray) -> dict[str, np.ndarray]:
    found = metrics.at_threshold(labels[:, None], scores[:, None], np.array([threshold]), counts)
    return {name: values[:, 0] for name, values in found.items()}


def by_sklearn(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """What scikit-learn says of labels of which none is missing."""
    guess = scores > threshold
    return {
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, guess),
        "accuracy": sklearn_metrics.accuracy_score(labels, guess),
        "weighted_f1": sklearn_metrics.f1_score(labels, guess, average="weighted", zero_division=0),
        "precision": sklearn_metrics.precision_score(labels, guess, zero_division=0),
        "recall": sklearn_metrics.recall_score(labels, guess, zero_division=0),
    }


def auc_by_pairs(labels: np.ndarray, scores: np.ndarray) -> float:
    """The share of pairs in which the positive study has the larger score; half where they are equal."""
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs]))


def test_auc_by_hand_with_ties_and_missing_labels() -> None:
    labels = np.array([[1, 0], [0, 1], [0, 1], [1, 0], [-1, 1], [0, -1]])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.3], [0.5, 0.3], [9.0, 0.0], [0.1, -5.0]])
    # Class 0: of 2 x 3 pairs 5 are in order and one is a tie. Class 1: of 3 x 2, 4 in order (0.8 twice, 0.3 over 0.1),
    # one tie, and 0.0 loses both: 3.5.
    assert class_aucs(labels, scores).tolist() == pytest.approx([5.5 / 6, 3.5 / 6])
    assert macro_auc(labels, scores) == pytest.approx(9 / 12)
    for k in range(2):
        known = labels[:, k] >= 0
        assert class_aucs(labels, scores)[k] == pytest.approx(auc_by_pairs(labels[known, k], scores[known, k]))


def test_figures_are_scikit_learns() -> None:
    labels = (RNG.random((200, 7)) < 0.3).astype(int)
    scores = np.round(RNG.random((200, 7)) + 0.2 * labels, 1)  # rounded, so that many are equal
    expected = sklearn_metrics.roc_auc_score(labels, scores, average="macro")
    assert macro_auc(labels, scores) == pytest.approx(expected, abs=1e-12)
    for k, threshold in enumerate(np.linspace(-0.1, 1.3, 7)):
        expected = by_sklearn(labels[:, k], scores[:, k], threshold)
        assert expected.keys() == set(AT_THRESHOLD)
        assert at_threshold(labels[:, k], scores[:, k], threshold) == pytest.approx(expected, abs=1e-12)
    classes, guesses = RNG.integers(0, 3, 200), RNG.integers(0, 3, 200)
    figures = metrics.of_guesses(classes, guesses, 3, once(200))
    for name, expected in (
        ("balanced_accuracy", sklearn_metrics.balanced_accuracy_score(classes, guesses)),
        ("weighted_f1", sklearn_metrics.f1_score(classes, guesses, average="weighted", zero_division=0)),
    ):
        assert figures[name][0] == pytest.approx(expected, abs=1e-12)


def test_classes_that_cannot_be_scored() -> None:
    labels = np.array([[1, 1, 0, -1], [0, 1, 0, 1], [1, 1, 0, -1], [0, 1, 0, -1]])
    scores = RNG.random((4, 4))
    assert scorable(labels).tolist() == [True, False, False, False]
    assert np.isnan(class_aucs(labels, scores)).tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match=r"positives and negatives of every class; positives are \[2, 4, 0, 1\]"):
        macro_auc(labels, scores)


def test_scores_that_are_no_numbers_and_wrong_shapes() -> None:
    labels, scores = np.array([[1, 0], [0, 1]]), np.array([[0.1, 0.2], [0.3, np.nan]])
    with pytest.raises(ValueError, match="study 1: the score of class 1 is not a number"):
        macro_auc(labels, scores)
    with pytest.raises(ValueError, match="study u7: the score of class 1"):
        check_scores(labels, scores, ["u6", "u7"])
    with pytest.raises(ValueError, match=r"\(2, 2\) and scores of shape \(2, 1\)"):
        macro_auc(labels, scores[:, :1])
    with pytest.raises(ValueError, match="labels must be 0, 1 or -1"):
        macro_auc(labels * 2, scores * 0)


def test_threshold_by_hand() -> None:
    # Above 0.3 all three positives are found and one of four negatives: distance 1/4. Above 0.6, two of three and none:
    # 1/3. Nothing is nearer, and of the equal cuts from 0.3 to 0.4 the first above 0.3 counts.
    labels = np.array([1, 1, 1, 0, 0, 0, 0])
    scores = np.array([0.9, 0.8, 0.405, 0.6, 0.3, 0.2, 0.1])
    threshold = roc_threshold(labels, scores)
    assert threshold == CUTS[30] == pytest.approx(30 / 99)
    assert at_threshold(labels, scores, threshold) == pytest.approx(
        # 3 true positives, 1 false, 3 true negatives: F1 of positives 6/7, of negatives 6/7
        {"balanced_accuracy": (1 + 3 / 4) / 2, "accuracy": 6 / 7, "weighted_f1": 6 / 7, "precision": 3 / 4, "recall": 1}
    )
    nothing = at_threshold(labels, scores, 1.0)
    assert nothing == pytest.approx(
        {"balanced_accuracy": 0.5, "accuracy": 4 / 7, "weighted_f1": 4 / 7 * 8 / 11, "precision": 0, "recall": 0}
    )


def test_scores_must_be_finite_and_may_be_lists() -> None:
    assert macro_auc([[1], [0]], [[0.3], [0.1]]) == 1
    for value, what in ((np.inf, "infinite"), (np.nan, "not a number")):
        with pytest.raises(ValueError, match=f"study 1: the score of class 0 is {what}"):
            macro_auc([[1], [-1], [0]], [[0.3], [value], [0.1]])


def test_the_threshold_is_the_nearest_of_all_cuts() -> None:
    for _ in range(20):
        labels = (RNG.random(50) < 0.4).astype(int)
        scores = np.round(np.clip(RNG.random(50) * 0.7 + 0.3 * labels, 0, 1), 2)
        chosen = roc_threshold(labels, scores)

        def distance(cut: float, labels: np.ndarray = labels, scores: np.ndarray = scores) -> float:
            hits, alarms = (scores[labels == 1] > cut).mean(), (scores[labels == 0] > cut).mean()
            return (1 - hits) ** 2 + alarms**2

        assert distance(chosen) == min(distance(cut) for cut in CUTS)


def test_every_draw_is_what_scikit_learn_finds_on_its_studies() -> None:
    n = 60
    labels = np.where(RNG.random(n) < 0.1, -1, RNG.random(n) < 0.4).astype(int)
    scores = np.round(np.clip(RNG.random(n) * 0.8 + 0.2 * (labels == 1), 0, 1), 1)
    classes, guesses = RNG.integers(-1, 3, n), RNG.integers(0, 3, n)
    (counts,) = metrics.draw(range(n), 40, seed=3)
    assert counts.shape == (40, n)
    assert (counts.sum(1) == n).all()
    aucs = metrics.auc(labels[:, None], scores[:, None], counts)[:, 0]
    at = drawn_at(labels, scores, 0.5, counts)
    guessed = metrics.of_guesses(classes, guesses, 3, counts)
    balanced, weighted = guessed["balanced_accuracy"], guessed["weighted_f1"]
    for d in range(40):
        drawn = np.repeat(np.arange(n), counts[d].astype(int))
        known = drawn[labels[drawn] >= 0]
        assert aucs[d] == pytest.approx(sklearn_metrics.roc_auc_score(labels[known], scores[known]))
        expected = by_sklearn(labels[known], scores[known], 0.5)
        assert {name: values[d] for name, values in at.items()} == pytest.approx(expected)
        inside = drawn[classes[drawn] >= 0]
        assert balanced[d] == pytest.approx(sklearn_metrics.balanced_accuracy_score(classes[inside], guesses[inside]))
        f1 = sklearn_metrics.f1_score(classes[inside], guesses[inside], average="weighted", zero_division=0)
        assert weighted[d] == pytest.approx(f1)


def test_draws_without_a_class_have_no_value() -> None:
    labels, scores = np.array([1, 0, 0, -1]), np.array([0.9, 0.1, 0.2, 0.3])
    counts = np.array([[0.0, 2, 1, 1], [4, 0, 0, 0], [1, 1, 1, 1]])
    assert np.isnan(metrics.auc(labels[:, None], scores[:, None], counts)[:, 0]).tolist() == [True, True, False]
    assert np.isnan(drawn_at(labels, scores, 0.5, counts)["recall"]).tolist() == [True, True, False]
    for values in metrics.of_guesses(labels, labels, 2, counts).values():
        assert np.isnan(values).tolist() == [True, True, False]
    assert np.isnan(metrics.auc(labels[:, None] * 0 - 1, scores[:, None], counts)).all()
    assert metrics.interval(np.array([np.nan, np.nan])) is None
    means = metrics.mean(np.array([[0.5, 1.0], [np.nan, 0.25], [np.nan, np.nan]]))
    np.testing.assert_array_equal(means, [0.75, 0.25, np.nan])
    assert metrics.interval(np.array([np.nan, *np.arange(41.0)])) == pytest.approx((1.0, 39.0))


def test_draws_are_seeded_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(metrics.draw(range(10), 25, seed=1)))
    monkeypatch.setattr(metrics, "CHUNK", 70)
    pieces = list(metrics.draw(range(10), 25, seed=1))
    assert [len(piece) for piece in pieces] == [7, 7, 7, 4]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert (whole != np.concatenate(list(metrics.draw(range(10), 25, seed=2)))).any()


def test_the_interval_of_an_auc_has_the_width_that_theory_gives() -> None:
    """Hanley and McNeil's standard error of an AUC, for scores of two normal distributions."""
    n = 400
    labels = np.repeat([0, 1], n)
    scores = np.concatenate([RNG.normal(0, 1, n), RNG.normal(1, 1, n)])
    auc = class_aucs(labels[:, None], scores[:, None])[0]
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = np.sqrt((auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)) / n**2)
    pair = labels[:, None], scores[:, None]
    values = np.concatenate([metrics.auc(*pair, counts)[:, 0] for counts in metrics.draw(range(2 * n), 1000, 0)])
    low, high = metrics.interval(values) or (0.0, 0.0)
    assert low < auc < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)


def test_missing_labels_take_no_part_at_a_threshold() -> None:
    labels, scores = np.array([1, 0, -1, 0, 1]), np.array([0.9, 0.1, 0.99, 0.7, 0.8])
    known = labels >= 0
    assert at_threshold(labels, scores, 0.5) == at_threshold(labels[known], scores[known], 0.5)
    assert roc_threshold(labels, scores) == roc_threshold(labels[known], scores[known])
    assert roc_threshold(labels, scores) < roc_threshold(labels, scores, "highest")
    for call in (lambda s: at_threshold(labels, s, 0.5), lambda s: roc_threshold(labels, s)):
        with pytest.raises(ValueError, match="not a number"):
            call(np.where(labels == 0, np.nan, scores))
    with pytest.raises(ValueError, match="needs positives and negatives"):
        roc_threshold(np.array([1, -1, 1]), np.ones(3))
