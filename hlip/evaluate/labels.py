"""Labels of studies, from tables and stores, and how they join with what is scored.

Shapes: N studies, K classes. Labels are 0, 1, or -1 where a label is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..prepare.tables import Table
from ..read.safe import as_texts
from ..store.store import Store

MISSING = -1
SHOWN = 10  # studies that a message names


class LabelTable(NamedTuple):
    """Labels of studies. values: (N, K) int64 of 0, 1 and -1, which marks a missing one.

    table: all columns, of which some may tell a split or a patient.
    """

    path: Path
    uids: list[str]
    classes: tuple[str, ...]
    values: np.ndarray
    table: Table


def read_label_table(path: Path | str, classes: Sequence[str] = (), study: Sequence[str] = ()) -> LabelTable:
    """Read a CSV: a column with the study's uid (`study`, `study_uid` or `VolumeName`) and a column for each class.

    A cell is 0, 1, or empty or -1 for a label that is missing. As in `hlip prepare`, of `VolumeName` the study is what
    comes before the scan's number.

    Args:
        classes: columns to take; if there are none, those that `hlip prepare` takes as labels (`Table.likely_labels`)
            and that hold only such cells.
        study: other names for the column of uids, where the table has one of them.

    Raises:
        ValueError: no such table or column, a cell that is no label in a column asked for, or a study with several
            labels of a class; names it.
    """
    return _labels_of(Table.read(path, study), as_texts(classes, "classes", 0))


def _labels_of(table: Table, classes: Sequence[str]) -> LabelTable:
    path = table.path
    if missing := [name for name in classes if name not in table.columns]:
        raise ValueError(f"{path}: has no column {', '.join(missing)} (there are {', '.join(table.columns)})")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{path}: class {max(classes, key=classes.count)} is asked for twice")
    codes = {name: [_code(row[name]) for _, _, row in table.rows] for name in classes or table.likely_labels()}
    for name in classes:
        if None in codes[name]:
            line, uid, row = table.rows[codes[name].index(None)]
            raise ValueError(
                f"{path}: line {line}, study {uid}: {name} must be 0, 1, or -1 or empty if missing, got {row[name]!r}"
            )
    chosen = tuple(name for name in codes if None not in codes[name])
    if not chosen:
        raise ValueError(f"{path}: no column of labels 0 and 1 (there are {', '.join(table.columns) or 'no columns'})")
    values = table.by_study(lambda row: tuple(_code(row[name]) for name in chosen), "row of labels")
    return LabelTable(table.path, list(values), chosen, np.array(list(values.values()), dtype=np.int64), table)


def read_column(table: Table, name: str) -> dict[str, str]:
    """The words of a column by study, of which all rows of a study must have the same.

    Raises:
        ValueError: no such column, or another word in a later row; names it.
    """
    if name not in table.columns:
        raise ValueError(f"{table.path}: has no column {name} (there are {', '.join(table.columns)})")
    return table.by_study(lambda row: row[name].strip(), name)


def _code(cell: str) -> int | None:
    """A label's number; None if the cell is no label."""
    try:
        value = float(cell.strip() or MISSING)
    except ValueError:
        return None
    return int(value) if value in (0, 1, MISSING) else None


def read_labels(
    source: Path | str | Store, columns: Sequence[str | Sequence[str]], study: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The labels in a table, as of `read_label_table`, or in a store, by study: uid to (K) int64.

    Args:
        columns: of each class, or several of which the first counts that there is; one may serve several classes.
        study: as of `read_label_table`.

    Raises:
        ValueError: no such column, or a label that is neither 0, 1 nor missing; names it.
    """
    table = source if isinstance(source, Store) else Table.read(source, study)
    there = table.labels[0] if isinstance(table, Store) else table.columns
    choices = [as_texts(names, "columns") for names in ([columns] if isinstance(columns, str) else columns)]
    chosen = [next((name for name in names if name in there), names[0]) for names in choices]
    if isinstance(table, Store):
        return dict(zip(table.uids.tolist(), _of_store(table, chosen), strict=True))
    labels = _labels_of(table, list(dict.fromkeys(chosen)))
    return dict(zip(labels.uids, labels.values[:, [labels.classes.index(name) for name in chosen]], strict=True))


def _of_store(store: Store, columns: Sequence[str]) -> np.ndarray:
    names, values = store.labels
    if absent := [name for name in dict.fromkeys(columns) if name not in names]:
        raise ValueError(
            f"{store.path}: the store has no labels for {', '.join(absent)} (it has {', '.join(names) or 'none'}): "
            "give --labels, or the task's `columns`"
        )
    values = np.nan_to_num(values[:, [names.index(name) for name in columns]], nan=MISSING)
    for row, column in np.argwhere(~np.isin(values, (0, 1, MISSING)))[:1].tolist():
        raise ValueError(
            f"{store.path}: study {store.uids[row]}: the label {columns[column]} is {values[row, column]:g}"
        )
    return values.astype(np.int64)


def unjoined(uids: Iterable[str], labels: Iterable[str]) -> tuple[list[str], list[str]]:
    """The studies without labels, and those of the labels without a study, each in its order."""
    studies, labelled = dict.fromkeys(uids), dict.fromkeys(labels)
    return [uid for uid in studies if uid not in labelled], [uid for uid in labelled if uid not in studies]


def check_join(uids: Sequence[str], labels: Iterable[str], allow_unmatched: bool) -> list[str]:
    """Notes on the studies without labels and the labels without a study.

    Raises:
        ValueError: there are such, unless `allow_unmatched`; or nothing joins at all.
    """
    lacking, unused = unjoined(uids, labels)
    notes = [
        f"{len(lost)} {what}: {', '.join(lost[:SHOWN])}{', ...' if len(lost) > SHOWN else ''}"
        for what, lost in (("studies have no labels", lacking), ("labels have no study", unused))
        if lost
    ]
    if not set(uids) - set(lacking):
        raise ValueError(f"no study has labels; {'; '.join(notes)}")
    if notes and not allow_unmatched:
        raise ValueError(f"labels and studies do not join: {'; '.join(notes)} (--allow_unmatched leaves them out)")
    return notes
