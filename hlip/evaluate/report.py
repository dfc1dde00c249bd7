"""What an evaluation leaves: scores, metrics, a table beside published figures, and a plot."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..output import label, new_figure, write_csv, write_whole
from ..terminal import visible
from .evaluation import Evaluation
from .metrics import MISSING

SCORES, METRICS, TABLE, MARKDOWN, PLOT = "scores.csv", "metrics.json", "table.csv", "table.md", "plot.png"
OURS = "this run"


def write_evaluation(found: Evaluation, folder: Path, facts: dict[str, Any]) -> None:
    """Write the five files into `folder`.

    scores.csv: a row a study, or a scan where these are scored: `study`, `scan`, each class' score, and each class'
        label as `CLASS_label`, empty if missing.
    metrics.json: `facts`, metrics by result key (null where labels allow none), again by the names that the released
        tools have for them, intervals, classes, notes.
    table.csv, table.md: the task's own figures in percent, beside published ones.
    plot.png: ROC curves, or a confusion matrix.
    """
    rows = table_rows(found)
    write_csv(folder / SCORES, _scores(found))
    write_csv(folder / TABLE, rows)
    files = {
        METRICS: json.dumps({**facts, **summary(found)}, indent=1, allow_nan=False) + "\n",
        MARKDOWN: markdown(rows, found),
    }
    for name, text in files.items():
        write_whole(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    write_whole(folder / PLOT, lambda file: draw(found, file))


def summary(found: Evaluation) -> dict[str, Any]:
    """Plain values of all but the scores."""
    classes = {
        name: {
            "positives": int((found.labels[:, k] == 1).sum()),
            "negatives": int((found.labels[:, k] == 0).sum()),
            "missing": int((found.labels[:, k] == MISSING).sum()),
            **({"threshold": found.thresholds[name]} if name in found.thresholds else {}),
        }
        for k, name in enumerate(found.task.classes)
    }
    metrics = {key: None if math.isnan(value) else value for key, value in found.metrics.items()}
    return {
        "task": found.task.name,
        "studies": len(set(found.uids)),
        **({"scans": len(found.scans)} if found.scans else {}),
        "metrics": metrics,
        "released": {name: metrics[key] for key, name in found.task.released.items() if key in metrics},
        "intervals": {key: None if each is None else list(each) for key, each in found.intervals.items()},
        "classes": classes,
        "notes": found.notes,
    }


def table_rows(found: Evaluation) -> list[list[str]]:
    """Header, this run with its intervals, and published rows, in percent."""
    keys = found.task.headline
    rows = [["", *keys], [OURS, *(_percent(found, key) for key in keys)]]
    published = found.task.published
    for name, values in published.rows.items():
        known = dict(zip(published.columns, values, strict=True))
        figures = [known.get(key) for key in keys]
        rows.append([name, *("" if value is None else f"{value:.1f}" for value in figures)])
    return rows


def class_rows(found: Evaluation) -> list[list[str]]:
    """Header, and a row a class: its numbers of studies and its figures, in percent."""
    keys = [name for name in found.task.metrics if f"{found.task.classes[0]}_{name}" in found.metrics]
    rows = [["", "positives", "negatives", *keys]]
    for name, counts in summary(found)["classes"].items():
        figures = [_percent(found, f"{name}_{key}") for key in keys]
        rows.append([name, str(counts["positives"]), str(counts["negatives"]), *figures])
    return rows


def sizes(found: Evaluation) -> str:
    """How much was scored, in words."""
    studies = f"{len(set(found.uids))} studies"
    return f"{len(found.scans)} scans of {studies}" if found.scans else studies


def _percent(found: Evaluation, key: str) -> str:
    value, interval = found.metrics[key], found.intervals[key]
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")


def markdown(rows: Sequence[Sequence[str]], found: Evaluation) -> str:
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    source = f" Other rows: {found.task.published.source}." if found.task.published.rows else ""
    text = f"Task {found.task.name}, {sizes(found)}; in percent, with 95% intervals.{source}"
    return "\n".join([*lines, "", _plain(text), *(f"- {_plain(note)}" for note in found.notes)]) + "\n"


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, in one line and one cell."""
    return re.sub(r"([\\|<\[`])", r"\\\1", visible(text))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as columns of text, a line each."""
    rows = [list(map(visible, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _scores(found: Evaluation) -> list[list[Any]]:
    classes = found.task.classes
    scan = ["scan"] if found.scans else []
    rows: list[list[Any]] = [["study", *scan, *classes, *(f"{name}_label" for name in classes)]]
    names = zip(found.uids, found.scans, strict=True) if found.scans else zip(found.uids, strict=True)
    for name, scores, labels in zip(names, found.scores.tolist(), found.labels.tolist(), strict=True):
        rows.append([*name, *map(repr, scores), *("" if label == MISSING else label for label in labels)])
    return rows


def draw(found: Evaluation, file: IO[bytes]) -> None:
    """A PNG: ROC curves of the classes, or of a multi-class task the confusion matrix."""
    figure = new_figure(8, 6)
    axes = figure.add_subplot()
    if found.task.kind == "multi-class":
        _confusion(found, figure, axes)
    else:
        _roc_curves(found, figure, axes)
    figure.savefig(file, format="png", dpi=120)


def _roc_curves(found: Evaluation, figure: Any, axes: Any) -> None:
    from sklearn.metrics import roc_curve

    for k, name in enumerate(found.task.classes):
        known = found.labels[:, k] != MISSING
        auc = found.metrics.get(f"{name}_auc", math.nan)
        if math.isnan(auc):
            continue
        alarms, hits, _ = roc_curve(found.labels[known, k], found.scores[known, k])
        style = ("-", "--", ":")[k // 10 % 3]
        axes.plot(alarms, hits, style, color=f"C{k % 10}", linewidth=1.2, label=f"{label(name)} {100 * auc:.1f}")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axes.set(
        xlabel="false positive rate", ylabel="true positive rate", title=f"{label(found.task.name)}: AUC in percent"
    )
    axes.set_aspect("equal")
    figure.legend(loc="outside right upper", fontsize="small")


def _confusion(found: Evaluation, figure: Any, axes: Any) -> None:
    true, guess = found.labels.argmax(1), found.scores.argmax(1)
    size = len(found.task.classes)
    table = np.bincount(true * size + guess, minlength=size * size).reshape(size, size)
    share = table / np.maximum(1, table.sum(1, keepdims=True))
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(size):
        for j in range(size):
            axes.text(j, i, str(table[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.6 else "black")
    names = [label(name) for name in found.task.classes]
    axes.set_xticks(range(size), names, rotation=40, ha="right")
    axes.set_yticks(range(size), names)
    axes.set(xlabel="class of the largest share", ylabel="true class", title=f"{label(found.task.name)}: studies")
    figure.colorbar(image, label="share of the true class")
