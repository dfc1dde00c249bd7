"""Scores of studies by whatever model, from a table.

Shapes: N studies, or scans of them; K scored classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..prepare.tables import Table
from ..read.safe import hint
from .tasks import Task

ROUNDING = 0.01  # how far shares of classes may be from 1 in all


def read_scores(path: Path | str, task: Task) -> tuple[list[str], list[str], np.ndarray]:
    """Read a CSV with a row a study and a column a class: the probability that the class is there; of a multi-class
    task its share, of which a study's add up to 1; of one by similarity its similarity, any number.

    A column `scan` beside the study's, or several rows of a study, are scans of a task that scores these.

    Returns:
        Uids, names of scans (none if rows are studies), and (N, K) scores, as of `Task.scores`: of merged classes
        there may be columns of the classes, or one of what they are merged into.

    Raises:
        ValueError: a class without a column, a column that is of none, a study that stands there twice, or a cell that
            holds something else; names the file, and the line.
    """
    table = Table.read(path, task.study)
    classes = _classes(path, table, task)
    uids = [uid for _, uid, _ in table.rows]
    of_scans = task.unit == "scan" and ("scan" in table.columns or len(set(uids)) < len(uids))
    scans = [row.get("scan") or f"line {line}" for line, _, row in table.rows] if of_scans else []
    (place, rows), *_ = Counter(zip(uids, scans or uids, strict=True)).most_common(1)
    if rows > 1:
        raise ValueError(f"{path}: study {' scan '.join(place) if scans else place[0]} has {rows} rows, expected one")
    values = np.array([[_number(row[name]) for name in classes] for _, _, row in table.rows])
    _check_values(path, table, task, classes, values)
    return uids, scans, task.merge(dict(zip(classes, values.T, strict=True)))


def _classes(path: Path | str, table: Table, task: Task) -> list[str]:
    """The columns that are read: of the classes, or of what some are merged into."""
    merged = [name for name in task.merged if name in table.columns]
    members = {member for name in merged for member in task.merged[name]}
    classes = [*(name for name in task.classes if name not in members), *merged]
    given = [name for name in table.columns if name != "scan" and not name.endswith("_label")]
    if missing := [name for name in classes if name not in given]:
        raise ValueError(f"{path}: has no column {', '.join(missing)} (there are {', '.join(given)})")
    for name in set(given).difference(classes):
        raise ValueError(f"{path}: {name!r} is no class of task {task.name}{hint(name, classes)}")
    return classes


def _check_values(path: Path | str, table: Table, task: Task, classes: Sequence[str], values: np.ndarray) -> None:
    """Raises ValueError at a cell, or a row of a multi-class task, that holds something else than scores."""
    any_number = task.kind == "similarity"
    lowest, highest = (-np.inf, np.inf) if any_number else (0, 1)
    wanted = "a number" if any_number else "a probability from 0 to 1"
    for row, k in np.argwhere(~(np.isfinite(values) & (values >= lowest) & (values <= highest)))[:1]:
        line, uid, cells = table.rows[row]
        raise ValueError(
            f"{path}: line {line}, study {uid}: {classes[k]}: expected {wanted}, got {cells[classes[k]]!r}"
        )
    for row in np.flatnonzero(abs(values.sum(1) - 1) > ROUNDING)[:1] if task.kind == "multi-class" else ():
        line, uid, _ = table.rows[row]
        raise ValueError(
            f"{path}: line {line}, study {uid}: the classes' shares add up to {values[row].sum():g}, not 1"
        )


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan
