"""Linear probes: what a linear classifier reads from frozen embeddings, one for each class.

Shapes: N studies, K classes, E embedding, D draws.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..output import label, new_figure
from ..read.safe import check_format, parse_json
from ..read.tensors import load_arrays
from . import bootstrap
from .labels import MISSING
from .metrics import class_aucs, macro_auc, need_sklearn
from .probe_data import ProbeData

FORMAT = 1  # of files; those without a number are of the first
# Inverse strengths of the L2 penalty to choose from, for standardised embeddings. Values of a unit-length embedding
# are about E**-0.5, so that as they are they need about E times as much.
CS = tuple(10.0**n for n in range(-5, 3))
CS_AS_IS = tuple(1e3 * c for c in CS)
FOLDS = 5
MAX_ITER = 2000
EQUAL = 1e-9  # two AUCs, but for rounding
# The classes that head CT models are probed for on public data, in the order of their papers' tables.
PROTOCOLS = {
    "rsna": ("Any", "Intraparenchymal", "Intraventricular", "Subarachnoid", "Subdural"),
    "cq500": (
        "ICH", "IPH", "IVH", "SDH", "EDH", "SAH", "BleedLocation-Left", "BleedLocation-Right", "Fracture",
        "MassEffect", "MidlineShift",
    ),
}  # fmt: skip
# What CQ500 calls RSNA's classes.
SAME_CLASS = dict(zip(PROTOCOLS["rsna"], ("ICH", "IPH", "IVH", "SAH", "SDH"), strict=True))


@dataclass(frozen=True)
class Probe:
    """A logistic regression for each class.

    weight: (K, E), bias: (K) - for embeddings as they are: a standardisation is folded in.
    c: (K) - the chosen inverse strength of the penalty.
    facts: how it was made; plain values.
    """

    classes: tuple[str, ...]
    weight: np.ndarray
    bias: np.ndarray
    c: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """(N, E) to the probability of each class, (N, K) float64.

        Raises:
            ValueError: embeddings of another width.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.weight.shape[1]:
            raise ValueError(f"the probe reads embeddings of width {self.weight.shape[1]}, got {embeddings.shape}")
        logits = embeddings.astype(np.float64) @ self.weight.T + self.bias
        return np.exp(-np.logaddexp(0, -logits))

    def write(self, file: IO[bytes]) -> None:
        """Write as .npz: `classes`, `weight`, `bias`, `c`, and `facts` as JSON."""
        facts = np.array(json.dumps(self.facts))
        np.savez(
            file,
            classes=np.array(self.classes),
            weight=self.weight,
            bias=self.bias,
            c=self.c,
            facts=facts,
            format=np.array(FORMAT),
        )

    @classmethod
    def read(cls, path: Path | str) -> Probe:
        """Read what `write` wrote.

        Raises:
            ValueError: not such a file; names it.
        """
        try:
            content = load_arrays(Path(path))
            check_format(content["format"].tolist() if "format" in content else FORMAT, FORMAT)
            facts = parse_json(str(content["facts"]))
            classes = tuple(content["classes"].tolist())
            arrays = [content[name].astype(np.float64) for name in ("weight", "bias", "c")]
        except (OSError, KeyError, TypeError, ValueError, MemoryError) as error:
            raise ValueError(f"{path}: not a readable probe ({error})") from error
        weight, bias, c = arrays
        if weight.ndim != 2 or not len(classes) == len(weight) == bias.size == c.size:
            raise ValueError(f"{path}: not a readable probe ({len(classes)} classes, weights of {weight.shape})")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError(f"{path}: not a readable probe (weights that are not finite)")
        return cls(classes, weight, bias, c, facts)


def fit_probe(
    data: ProbeData,
    model: int = 0,
    standardize: bool = True,
    cs: Sequence[float] | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    jobs: int = 1,
) -> Probe:
    """Fit a logistic regression (L2 penalty) for each class.

    The penalty is the one with the largest AUC on the validation studies; without any, the largest mean AUC of a
    stratified cross-validation over the training studies. Of equal ones the strongest wins. The probe is then fitted on
    training and validation studies together. Test studies take no part in anything. Studies without a class's label
    take no part in its probe.

    Args:
        model: which of the embeddings of `data`.
        standardize: to mean 0 and variance 1 of what is fitted on; else embeddings as they are.
        cs: inverse strengths of the penalty to choose from; `CS`, or `CS_AS_IS` if not standardised, if None.
        progress: wraps the names of the classes, for a bar.
        jobs: processes that share the choice of the penalty.

    Raises:
        ImportError: no scikit-learn.
    """
    need_sklearn()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    candidates = sorted(cs or (CS if standardize else CS_AS_IS))
    fitted, unfinished = [], []
    rows = data.of("train", "val")
    x_all, is_val = data.embeddings[model][rows].astype(np.float64), data.parts[rows] == "val"
    for k, name in enumerate(progress(data.classes)):
        y = data.labels[rows, k]
        known = y != MISSING
        x, y, val = x_all[known], y[known], is_val[known]
        folds = min(FOLDS, int(np.bincount(y).min()))
        cv = (
            PredefinedSplit(np.where(val, 0, -1)) if val.any() else StratifiedKFold(folds, shuffle=True, random_state=0)
        )
        steps = [StandardScaler()] if standardize else []
        pipeline = make_pipeline(*steps, LogisticRegression(max_iter=MAX_ITER))
        # The scaler is within the pipeline, so that a fold's mean is not taken over the studies it is scored on.
        search = GridSearchCV(
            pipeline, {"logisticregression__C": candidates}, scoring="roc_auc", cv=cv, n_jobs=jobs, refit=_strongest
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            search.fit(x, y)
        if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
            unfinished.append(name)
        fitted.append((*_folded(search.best_estimator_), search.best_params_["logisticregression__C"]))
    weight, bias, c = (np.array(each) for each in zip(*fitted, strict=True))
    facts = {
        "standardized": standardize,
        "cs": [float(each) for each in candidates],
        "c_chosen_on": "validation studies" if is_val.any() else f"cross-validation, up to {FOLDS} folds",
        "fitted_on": len(rows),
        "not_converged": unfinished,
    }
    return Probe(data.classes, weight, bias, c, facts)


def _strongest(results: Mapping[str, Any]) -> int:
    """The first, which has the strongest penalty, of those whose AUC differs from the best by no more than rounding."""
    scores = results["mean_test_score"]
    return int(np.argmax(scores >= np.nanmax(scores) - EQUAL))


def _folded(pipeline: Any) -> tuple[np.ndarray, float]:
    """Weights (E) and bias for embeddings that are not standardised."""
    regression = pipeline[-1]
    weight, bias = regression.coef_[0], float(regression.intercept_[0])
    if len(pipeline) > 1:
        weight = weight / pipeline[0].scale_
        bias -= float(weight @ pipeline[0].mean_)
    return weight, bias


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


def auc_intervals(labels: np.ndarray, scores: np.ndarray, draws: int = bootstrap.DRAWS, seed: int = 0) -> AUC:
    """AUC of every class, with 95% intervals.

    The same seed and number of studies have the same draws, so that two models can be compared in pairs.

    Args:
        labels: (N, K) of 0, 1 and -1, which marks a missing label.
        scores: (N, K), larger for the class.

    Raises:
        ValueError: a class without a positive or a negative, a score that is not a number, or shapes that differ.
    """
    macro = macro_auc(labels, scores)
    parts = [
        np.stack([bootstrap.auc(y, s, counts) for y, s in zip(labels.T, scores.T, strict=True)], axis=1)
        for counts in bootstrap.draw(len(labels), draws, seed)
    ]
    drawn = np.concatenate(parts)
    low, high = np.array([_bounds(column) for column in drawn.T]).T
    macro_drawn = bootstrap.mean(drawn)
    return AUC(class_aucs(labels, scores), low, high, macro, *_bounds(macro_drawn), macro_drawn)


def _bounds(values: np.ndarray) -> tuple[float, float]:
    return bootstrap.interval(values) or (np.nan, np.nan)


def draw_bars(classes: Sequence[str], models: Mapping[str, AUC], file: IO[bytes], kind: str) -> None:
    """Draw the AUC of every class as bars with intervals, the largest of the first model on top, models side by side.

    Args:
        kind: "png", "pdf" or "svg".
    """
    order = np.argsort(next(iter(models.values())).value, kind="stable")
    height = 0.8 / len(models)
    figure = new_figure(7, 1.6 + (0.16 + 0.14 * len(models)) * len(classes))
    axes = figure.add_subplot()
    for m, (name, auc) in enumerate(models.items()):
        value = auc.value[order]
        # A percentile interval of a skewed distribution need not hold the value.
        spread = np.maximum(0, [value - auc.low[order], auc.high[order] - value])
        axes.barh(
            np.arange(len(order)) + (0.5 * (len(models) - 1) - m) * height,
            value,
            height,
            xerr=spread,
            color=f"C{m}",
            label=f"{label(name)} (mean {auc.macro:.3f})",
            error_kw={"elinewidth": 0.8, "ecolor": "black"},
        )
    axes.axvline(0.5, color="0.5", linewidth=0.8, linestyle="--")
    axes.set(
        xlim=(min(0.4, *(float(auc.low.min()) - 0.02 for auc in models.values())), 1.0),
        ylim=(-0.7, len(order) - 0.3),
        xlabel="AUC, 95% interval",
    )
    axes.set_yticks(range(len(order)), [label(classes[k]) for k in order], fontsize=8)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(file, format=kind, dpi=120)
