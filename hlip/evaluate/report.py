"""What an evaluation leaves: scores, metrics, a table beside published figures, and a plot."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..output import label, new_figure, write_csv, write_json, write_text, write_whole
from ..terminal import visible
from .evaluation import Evaluation
from .metrics import MISSING

SCORES, METRICS, TABLE, MARKDOWN, PLOT = "scores.csv", "metrics.json", "table.csv", "table.md", "plot.png"
OURS = "this run"


def write_evaluation(evaluation: Evaluation, folder: Path, facts: dict[str, Any]) -> None:
    """Write the five files into `folder`.

    scores.csv: a row a study, or a scan where these are scored: `study`, `scan`, each class' score, and each class'
        label as `CLASS_label`, empty if missing.
    metrics.json: `facts`, metrics by result key (null where labels allow none), again by the names that the released
        tools have for them, intervals, classes, notes.
    table.csv, table.md: the task's own figures in percent, beside published ones.
    plot.png: ROC curves, or a confusion matrix.
    """
    rows = table_rows(evaluation)
    write_csv(folder / SCORES, _scores(evaluation))
    write_csv(folder / TABLE, rows)
    write_json(folder / METRICS, {**facts, **summary(evaluation)})
    write_text(folder / MARKDOWN, markdown(rows, evaluation))
    write_whole(folder / PLOT, lambda file: draw(evaluation, file))


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values of all but the scores."""
    classes = {
        name: {
            "positives": int((evaluation.labels[:, k] == 1).sum()),
            "negatives": int((evaluation.labels[:, k] == 0).sum()),
            "missing": int((evaluation.labels[:, k] == MISSING).sum()),
            **({"threshold": evaluation.thresholds[name]} if name in evaluation.thresholds else {}),
        }
        for k, name in enumerate(evaluation.task.names)
    }
    metrics = {key: None if math.isnan(value) else value for key, value in evaluation.metrics.items()}
    return {
        "task": evaluation.task.name,
        "studies": len(set(evaluation.uids)),
        **({"scans": len(evaluation.scans)} if evaluation.scans else {}),
        "metrics": metrics,
        "released": {name: metrics[key] for key, name in evaluation.task.released.items() if key in metrics},
        "intervals": {key: None if bounds is None else list(bounds) for key, bounds in evaluation.intervals.items()},
        "classes": classes,
        "notes": evaluation.notes,
    }


def table_rows(evaluation: Evaluation) -> list[list[str]]:
    """Header, this run with its intervals, and published rows, each beside the figure that it is of, in percent."""
    published = evaluation.task.published
    keys = list(dict.fromkeys([*evaluation.task.headline, *published.columns]))
    rows = [["", *keys], [OURS, *(_percent(evaluation, key) for key in keys)]]
    for name, figures in published.rows.items():
        given = dict(zip(published.columns, figures, strict=True))
        rows.append([name, *("" if (value := given.get(key)) is None else f"{value:.1f}" for key in keys)])
    return rows


def class_rows(evaluation: Evaluation) -> list[list[str]]:
    """Header, and a row a class: its numbers of studies and its figures, in percent."""
    keys = [name for name in evaluation.task.metrics if f"{evaluation.task.names[0]}_{name}" in evaluation.metrics]
    rows = [["", "positives", "negatives", *keys]]
    for name, counts in summary(evaluation)["classes"].items():
        figures = [_percent(evaluation, f"{name}_{key}") for key in keys]
        rows.append([name, str(counts["positives"]), str(counts["negatives"]), *figures])
    return rows


def sizes(evaluation: Evaluation) -> str:
    """How much was scored, in words."""
    studies = f"{len(set(evaluation.uids))} studies"
    return f"{len(evaluation.scans)} scans of {studies}" if evaluation.scans else studies


def _percent(evaluation: Evaluation, key: str) -> str:
    value, interval = evaluation.metrics.get(key, math.nan), evaluation.intervals.get(key)
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")


def markdown(rows: Sequence[Sequence[str]], evaluation: Evaluation) -> str:
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    source = f" Other rows: {evaluation.task.published.source}." if evaluation.task.published.rows else ""
    text = f"Task {evaluation.task.name}, {sizes(evaluation)}; in percent, with 95% intervals.{source}"
    return "\n".join([*lines, "", _plain(text), *(f"- {_plain(note)}" for note in evaluation.notes)]) + "\n"


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, in one line and one cell."""
    return re.sub(r"([\\|<\[`])", r"\\\1", visible(text))


def _scores(evaluation: Evaluation) -> list[list[Any]]:
    classes, columns = evaluation.task.names, ("study", "scan") if evaluation.scans else ("study",)
    rows: list[list[Any]] = [[*columns, *classes, *(f"{name}_label" for name in classes)]]
    uids = zip(evaluation.uids, evaluation.scans, strict=True) if evaluation.scans else zip(evaluation.uids)
    for names, scores, labels in zip(uids, evaluation.scores.tolist(), evaluation.labels.tolist(), strict=True):
        rows.append([*names, *map(repr, scores), *("" if label == MISSING else label for label in labels)])
    return rows


def draw(evaluation: Evaluation, file: IO[bytes]) -> None:
    """A PNG: ROC curves of the classes, or of a multi-class task the confusion matrix."""
    figure = new_figure(8, 6)
    axes = figure.add_subplot()
    if evaluation.task.kind == "multi-class":
        _confusion(evaluation, figure, axes)
    else:
        _roc_curves(evaluation, figure, axes)
    figure.savefig(file, format="png", dpi=120)


def _roc_curves(evaluation: Evaluation, figure: Any, axes: Any) -> None:
    from sklearn.metrics import roc_curve

    for k, name in enumerate(evaluation.task.names):
        known = evaluation.labels[:, k] != MISSING
        auc = evaluation.metrics.get(f"{name}_auc", math.nan)
        if math.isnan(auc):
            continue
        alarms, hits, _ = roc_curve(evaluation.labels[known, k], evaluation.scores[known, k])
        style = ("-", "--", ":")[k // 10 % 3]
        axes.plot(alarms, hits, style, color=f"C{k % 10}", linewidth=1.2, label=f"{label(name)} {100 * auc:.1f}")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axes.set(
        xlabel="false positive rate",
        ylabel="true positive rate",
        title=f"{label(evaluation.task.name)}: AUC in percent",
    )
    axes.set_aspect("equal")
    figure.legend(loc="outside right upper", fontsize="small")


def _confusion(evaluation: Evaluation, figure: Any, axes: Any) -> None:
    true, guess = evaluation.labels.argmax(1), evaluation.scores.argmax(1)
    size = len(evaluation.task.names)
    table = np.bincount(true * size + guess, minlength=size * size).reshape(size, size)
    share = table / np.maximum(1, table.sum(1, keepdims=True))
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(size):
        for j in range(size):
            axes.text(j, i, str(table[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.6 else "black")
    names = [label(name) for name in evaluation.task.names]
    axes.set_xticks(range(size), names, rotation=40, ha="right")
    axes.set_yticks(range(size), names)
    axes.set(xlabel="class of the largest share", ylabel="true class", title=f"{label(evaluation.task.name)}: studies")
    figure.colorbar(image, label="share of the true class")
