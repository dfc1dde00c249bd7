"""Linear probes: what a linear classifier reads from frozen embeddings, one for each class; and the studies for them,
labels and embeddings, joined by study and split.

Shapes: N studies, K classes, E embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..embed.table import Embeddings, read_arrays, write_arrays
from ..output import label, new_figure
from ..prepare.tables import Table, read_names
from .labels import MISSING, LabelTable, read_column
from .metrics import AUC, need_sklearn

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
# Words for the parts of a split.
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class ProbeData:
    """Studies with labels and the embeddings of one model or more, split.

    uids: sorted, so that a random split does not depend on the order of files.
    labels: (N, K) int64, -1 where missing.
    embeddings: of each model, (N, E) float32.
    parts: (N) str - "train", "val", "test", or empty for a study of no part.
    left_out: classes that cannot be probed, and why.
    without_label, without_embedding: studies that do not join.
    """

    uids: list[str]
    classes: tuple[str, ...]
    labels: np.ndarray
    embeddings: list[np.ndarray]
    parts: np.ndarray
    left_out: dict[str, str]
    without_label: list[str]
    without_embedding: list[str]

    @classmethod
    def join(
        cls,
        table: LabelTable,
        embeddings: Sequence[Embeddings],
        split: Mapping[str, str] | None = None,
        fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
        seed: int = 0,
        patients: str | None = None,
        minimum: int = 5,
        head: int | None = None,
        needed: Sequence[str] = ("train", "test"),
    ) -> ProbeData:
        """Join labels and embeddings by study.

        Args:
            split: the part of each study; drawn at random if None.
            fractions: of the studies, for training, validation and test; 0 for no validation.
            patients: column of the table that names patients: no patient is in two parts of a random split.
            minimum: a class with fewer positives or negatives in a part is left out.
            head: which of a model's embeddings; needed if it gives several.
            needed: parts that must have studies, and positives and negatives of a class.

        Raises:
            ValueError: nothing joins, a part is empty, or no class is left; says which.
        """
        tables = [dict(zip(*made.of_studies(head), strict=True)) for made in embeddings]
        embedded = set.intersection(*map(set, tables))
        rows = {uid: i for i, uid in enumerate(table.uids)}
        uids = sorted(embedded & rows.keys())
        known = set.union(*map(set, tables))
        without_label, without_embedding = sorted(known - rows.keys()), sorted(rows.keys() - embedded)
        if not uids:
            raise ValueError(
                f"{table.path}: no study has both labels and embeddings; labels are of {_some(without_embedding)}; "
                f"embeddings of {_some(without_label)}"
            )
        labels = table.values[[rows[uid] for uid in uids]]
        if split is None:
            names = _patients(table, uids, patients) if patients else uids
            parts = split_at_random(uids, fractions, seed, names)
        else:
            parts = np.array([split.get(uid, "") for uid in uids])
        wanted = [part for part in PARTS if part in needed or (parts == part).any()]
        if empty := [part for part in wanted if not (parts == part).any()]:
            raise ValueError(f"the split has no study of {empty[0]} among the {len(uids)} with labels and embeddings")
        left_out: dict[str, str] = {}
        for k, name in enumerate(table.classes):
            for part in wanted:
                column = labels[parts == part, k]
                few = min((int((column == value).sum()), word) for value, word in ((1, "positives"), (0, "negatives")))
                if few[0] < max(minimum, 2 if part == "train" else 1):
                    left_out.setdefault(name, f"{few[0]} {few[1]} in {part}")
        kept = [k for k, name in enumerate(table.classes) if name not in left_out]
        if not kept:
            raise ValueError(f"{table.path}: no class has {minimum} positives and negatives in every part: {left_out}")
        arrays = [np.stack([rows_of[uid] for uid in uids]) for rows_of in tables]
        classes = tuple(table.classes[k] for k in kept)
        return cls(uids, classes, labels[:, kept], arrays, parts, left_out, without_label, without_embedding)

    def of(self, *parts: str) -> np.ndarray:
        """Rows of these parts, (n) int64."""
        return np.flatnonzero(np.isin(self.parts, parts))


def _patients(table: LabelTable, uids: Sequence[str], column: str) -> list[str]:
    names = read_column(table.table, column)
    if lacking := [uid for uid in uids if not names[uid]]:
        raise ValueError(f"{table.path}: study {lacking[0]} has no {column}")
    return [names[uid] for uid in uids]


def _some(uids: Sequence[str], count: int = 3) -> str:
    return ", ".join(uids[:count]) + (f" and {len(uids) - count} more" if len(uids) > count else "") or "no other study"


def split_at_random(
    uids: Sequence[str], fractions: Sequence[float], seed: int = 0, patients: Sequence[str] | None = None
) -> np.ndarray:
    """The part of each study, (N) str: disjoint by study, and by patient where `patients` tells each study's.

    The parts are as large as `fractions` says, but for rounding and for patients who are not divided.

    Raises:
        ValueError: fractions that are not three shares which add up to 1, or none for training or test.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or not fractions[0] * fractions[2]:
        raise ValueError(
            f"fractions must be of train, val and test, add up to 1, and leave both ends some: {fractions}"
        )
    names = np.asarray(uids if patients is None else patients)
    groups, group = np.unique(names, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(groups))
    sizes = np.bincount(group)[order]
    # A group falls where its middle does, so that one study more or less moves no other part's bound by much.
    middle = (np.cumsum(sizes) - sizes / 2) / len(names)
    part_of_group = np.empty(len(groups), dtype="<U5")
    part_of_group[order] = np.array(list(PARTS))[np.searchsorted(np.cumsum(fractions)[:2], middle, side="right")]
    return part_of_group[group]


def read_split(given: Sequence[str], table: LabelTable) -> dict[str, str]:
    """The part of each study from a column, a table or lists.

    Args:
        given: the name of a column of `table`; a CSV with a column `split`; or two or three files of uids, one a line,
            for training, validation (of three) and test.

    Raises:
        ValueError: none of these, another word than a part's, or a study in two parts; names it.
    """
    if len(given) == 1:
        name = given[0]
        if name in table.table.columns:
            cells = read_column(table.table, name)
        elif Path(name).is_file():
            cells = read_column(Table.read(name), "split")
        else:
            raise ValueError(f"--split {name}: neither a column of {table.path} nor a file")
        return {uid: _part(cell, uid, name) for uid, cell in cells.items() if cell}
    if len(given) > 3:
        raise ValueError(f"--split: expected a column, a table, or lists of two or three parts, got {len(given)} files")
    parts: dict[str, str] = {}
    for part, path in zip(("train", "test") if len(given) == 2 else PARTS, given, strict=True):
        for uid in read_names(Path(path)):
            if parts.setdefault(uid, part) != part:
                raise ValueError(f"{path}: study {uid} is in {parts[uid]} too")
    return parts


def _part(cell: str, uid: str, where: str) -> str:
    for part, words in PARTS.items():
        if cell.lower() in words:
            return part
    raise ValueError(f"{where}: study {uid}: expected {', '.join(PARTS)} or nothing, got {cell!r}")


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
        classes = np.array(self.classes)
        write_arrays(file, self.facts, classes=classes, weight=self.weight, bias=self.bias, c=self.c)

    @classmethod
    def read(cls, path: Path | str) -> Probe:
        """Read what `write` wrote.

        Raises:
            ValueError: not such a file; names it.
        """
        try:
            content, facts = read_arrays(Path(path))
            classes = tuple(content["classes"].tolist())
            weight, bias, c = (content[name].astype(np.float64) for name in ("weight", "bias", "c"))
            if weight.ndim != 2 or not len(classes) == len(weight) == bias.size == c.size:
                raise ValueError(f"{len(classes)} classes, weights of {weight.shape}")
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise ValueError("weights that are not finite")
        except (OSError, KeyError, TypeError, ValueError, MemoryError) as error:
            raise ValueError(f"{path}: not a readable probe ({error})") from error
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
    candidates = sorted(cs or (CS if standardize else CS_AS_IS))
    fitted, unfinished = [], []
    rows = data.of("train", "val")
    x, is_val = data.embeddings[model][rows].astype(np.float64), data.parts[rows] == "val"
    for k, name in enumerate(progress(data.classes)):
        known = data.labels[rows, k] != MISSING
        *values, finished = _fit(x[known], data.labels[rows, k][known], is_val[known], standardize, candidates, jobs)
        fitted.append(values)
        if not finished:
            unfinished.append(name)
    weight, bias, c = (np.array(values) for values in zip(*fitted, strict=True))
    facts = {
        "standardized": standardize,
        "cs": [float(candidate) for candidate in candidates],
        "c_chosen_on": "validation studies" if is_val.any() else f"cross-validation, up to {FOLDS} folds",
        "fitted_on": len(rows),
        "not_converged": unfinished,
    }
    return Probe(data.classes, weight, bias, c, facts)


def _fit(
    x: np.ndarray, y: np.ndarray, is_val: np.ndarray, standardize: bool, candidates: Sequence[float], jobs: int
) -> tuple[np.ndarray, float, float, bool]:
    """Weights (E), bias and penalty of one class, and whether the fit converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = min(FOLDS, int(np.bincount(y).min()))
    cv = (
        PredefinedSplit(np.where(is_val, 0, -1))
        if is_val.any()
        else StratifiedKFold(folds, shuffle=True, random_state=0)
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
    finished = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    *scalers, regression = search.best_estimator_
    weight, bias = regression.coef_[0], float(regression.intercept_[0])
    for scaler in scalers:  # folded in, so that embeddings are read as they are
        weight = weight / scaler.scale_
        bias -= float(weight @ scaler.mean_)
    return weight, bias, search.best_params_["logisticregression__C"], finished


def _strongest(results: Mapping[str, Any]) -> int:
    """The first, which has the strongest penalty, of those whose AUC differs from the best by no more than rounding."""
    scores = results["mean_test_score"]
    return int(np.argmax(scores >= np.nanmax(scores) - EQUAL))


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
