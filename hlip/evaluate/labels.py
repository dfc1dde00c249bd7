"""Label tables.

Shapes: N studies, K classes. Labels are 0, 1, or -1 where a label is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..prepare.tables import Table
from ..read.safe import as_texts

MISSING = -1


class LabelTable(NamedTuple):
    """Labels of studies. values: (N, K) int64 of 0, 1 and -1, which marks a missing one.

    words: of every study, the cells of the columns that hold something else; those may tell a split or a patient.
        Columns in which rows of a study differ are left out.
    """

    path: Path
    uids: list[str]
    classes: tuple[str, ...]
    values: np.ndarray
    words: dict[str, dict[str, str]]


def read_label_table(path: Path | str, classes: Sequence[str] = ()) -> LabelTable:
    """Read a CSV: a column with the study's uid (`study`, `study_uid` or `VolumeName`) and a column for each class.

    A cell is 0, 1, or empty or -1 for a label that is missing. As in `hlip prepare`, of `VolumeName` the study is what
    comes before the scan's number.

    Args:
        classes: columns to take; every column that holds only such cells, and a 0 or 1, if there are none.

    Raises:
        ValueError: no such table or column, a cell that is no label in a column asked for, or a study with several
            labels of a class; names it.
    """
    table, classes = Table.read(path), as_texts(classes, "classes", 0)
    if missing := [name for name in classes if name not in table.columns]:
        raise ValueError(f"{path}: has no column {', '.join(missing)} (there are {', '.join(table.columns)})")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{path}: class {max(classes, key=classes.count)} is asked for twice")
    codes = {name: [_code(row[name]) for _, _, row in table.rows] for name in classes or table.columns if name}
    for name in classes:
        if None in codes[name]:
            line, uid, row = table.rows[codes[name].index(None)]
            raise ValueError(
                f"{path}: line {line}, study {uid}: {name} must be 0, 1, or -1 or empty if missing, got {row[name]!r}"
            )
    chosen = tuple(classes) or tuple(name for name, each in codes.items() if None not in each and {0, 1} & set(each))
    if not chosen:
        raise ValueError(f"{path}: no column of labels 0 and 1 (there are {', '.join(table.columns) or 'no columns'})")
    values = table.by_study(lambda row: tuple(_code(row[name]) for name in chosen), "row of labels")
    array = np.array(list(values.values()), dtype=np.int64)
    return LabelTable(Path(path), list(values), chosen, array, _words(table, chosen))


def _words(table: Table, labels: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    several: set[str] = set(labels)
    for _, uid, row in table.rows:
        known = found.setdefault(uid, {name: row[name].strip() for name in table.columns if name not in several})
        several |= {name for name in known if known[name] != row[name].strip()}
    return {uid: {name: cell for name, cell in cells.items() if name not in several} for uid, cells in found.items()}


def read_labels(path: Path | str, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The labels of `read_label_table` by study: uid to (K) int64.

    Args:
        columns: of each class; one column may serve several classes.

    Raises:
        ValueError: as `read_label_table`.
    """
    columns = as_texts(columns, "columns")
    table = read_label_table(path, tuple(dict.fromkeys(columns)))
    places = [table.classes.index(name) for name in columns]
    return dict(zip(table.uids, table.values[:, places], strict=True))


def _code(cell: str) -> int | None:
    """A label's number; None if the cell is no label."""
    try:
        value = float(cell.strip() or MISSING)
    except ValueError:
        return None
    return int(value) if value in (0, 1, MISSING) else None
