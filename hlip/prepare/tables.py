"""Files about studies, as JSON objects and CSV tables with one entry per study."""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..output import FORMULA
from ..read.files import printable, stem
from ..read.safe import as_texts, read_json, read_lines, readable, unique_keys

logger = logging.getLogger(__name__)
STUDY_COLUMNS = ("study", "study_uid", "VolumeName")
Value = TypeVar("Value")


def _as_written(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def read_json_studies(
    path: Path, what: str, read: Callable[[str, Any], Any] = lambda uid, entry: entry
) -> dict[str, Any]:
    """Read a JSON object with one entry per study, none of them twice; `read` makes a value of a study and its entry.

    Raises:
        ValueError: not such a file; names it, and the study.
    """
    with readable(path, f"a readable {what}"):
        content = read_json(path)
        if isinstance(content, dict):
            content = unique_keys([(printable(uid), entry) for uid, entry in content.items()])
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected an object with one entry per study")
    values = {}
    for uid, entry in content.items():
        try:
            values[uid] = read(uid, entry)
        except ValueError as error:
            raise ValueError(f"{path}: study {uid}: {error}") from error
    return values


def read_names(path: Path) -> list[str]:
    """Read a list of studies, one a line; of one that stands there twice, the first.

    Raises:
        ValueError: not such a file; names it.
    """
    with readable(path, "a readable list of studies"), contextlib.closing(read_lines(path)) as lines:
        return list(dict.fromkeys(filter(None, map(str.strip, lines))))


@dataclass(frozen=True)
class Table:
    """A CSV with a column of study ids.

    rows: (line, study, cells by column) of each.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[int, str, dict[str, str]], ...]

    @classmethod
    def read(cls, path: Path | str, study: Sequence[str] = ()) -> Table:
        """Read a CSV. Of `VolumeName`, an image file's name, the study is what comes before the scan's number.

        Args:
            study: names of the column of studies that count before the usual ones.

        Raises:
            ValueError: not such a file; names it, and the line.
        """
        path = Path(path)
        with readable(path, "a readable table"), contextlib.closing(read_lines(path)) as lines:
            reader = csv.DictReader(lines)
            columns = [_as_written(name).strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            named = (*study, *STUDY_COLUMNS)
            uid_column = next((name for name in named if name in columns), None)
            if uid_column is None:
                separator = "; cells are parted by commas" if ";" in "".join(columns) else ""
                raise ValueError(f"needs a column of {', '.join(named)}{separator}")
            if len(set(columns)) < len(columns):
                raise ValueError(f"line {reader.line_num}: column {max(columns, key=columns.count)!r} occurs twice")
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"line {reader.line_num}: expected {len(columns)} cells")
                cells = {name: _as_written(cell) for name, cell in row.items()}
                uid = cells.pop(uid_column).strip()
                if not uid:
                    raise ValueError(f"line {reader.line_num}: no {uid_column}")
                uid = volume_study(uid) if uid_column == "VolumeName" else uid
                rows.append((reader.line_num, printable(uid), cells))
            if not rows:
                raise ValueError("it has no rows")
        return cls(path, tuple(name for name in columns if name != uid_column), tuple(rows))

    def labels(self, leave: Collection[str] = (), wanted: Collection[str] | None = None) -> dict[str, dict[str, float]]:
        """Labels by study: columns of numbers, in order; an empty cell is no label.

        Args:
            leave: columns that are no labels.
            wanted: columns that are. If None, those whose numbers all lie within -1 and 1: accession numbers, dates
                and ages do not. Others are named in the log, and so are those of which a study has several values.

        Raises:
            ValueError: a wanted column that there is not, that has words, or several values of a study; names the
                file, and the line.
        """
        wanted = None if wanted is None else as_texts(wanted, "columns of labels", 0)
        if absent := [name for name in wanted or () if name not in self.columns]:
            raise ValueError(f"{self.path}: no column {absent[0]!r} of labels; there are {', '.join(self.columns)}")
        given = [name for name in self.columns if name and name not in leave and (wanted is None or name in wanted)]
        columns = [name for name in given if self._numbers(name, strict=wanted is not None)]
        likely = columns if wanted is not None else self.likely_labels(leave)
        if others := ", ".join(name for name in columns if name not in likely):
            what = "columns that are not taken as labels unless they are asked for (--label_columns)"
            logger.warning("%s: %s: %s", self.path, what, others)
        return self.by_study(lambda row: {n: float(cell) for n in likely if (cell := row[n].strip())}, "labels")

    def likely_labels(self, leave: Collection[str] = ()) -> list[str]:
        """The columns, but for those of `leave`, whose numbers all lie within -1 and 1, one value for each study."""
        return [
            name
            for name in self.columns
            if name and name not in leave
            if (numbers := self._numbers(name, strict=False)) and all(-1 <= number <= 1 for number in numbers)
            if not self._has_several(name)
        ]

    def _numbers(self, column: str, strict: bool) -> list[float]:
        """Of a column; none if it has words."""
        cells = [(line, row[column].strip()) for line, _, row in self.rows if row[column].strip()]
        words = [(line, cell) for line, cell in cells if not _is_number(cell)]
        if words and strict:
            line, cell = words[0]
            raise ValueError(f"{self.path}: line {line}: column {column!r} of labels: expected a number, got {cell!r}")
        return [] if words else [float(cell) for _, cell in cells]

    def _has_several(self, column: str) -> bool:
        """Whether a study's rows differ."""
        cells: dict[str, str] = {}
        return any(cells.setdefault(uid, row[column].strip()) != row[column].strip() for _, uid, row in self.rows)

    def by_study(self, read: Callable[[dict[str, str]], Value], what: str) -> dict[str, Value]:
        """What `read` makes of the rows, by study; a study's rows must agree."""
        values: dict[str, Value] = {}
        for line, uid, row in self.rows:
            value = read(row)
            if values.setdefault(uid, value) != value:
                raise ValueError(f"{self.path}: line {line}: another {what} of study {uid} than in a line before")
        return values


def volume_study(name: str) -> str:
    """The study of a volume by its file's name: CT-RATE numbers a study's volumes at the end of the name."""
    name = stem(name.replace("\\", "/").rpartition("/")[2])
    match = re.fullmatch(r"((?:train|valid)_\d+_[a-z]+)_\d+", name)
    return match[1] if match else name


def check_join(path: Path | str | None, entries: Collection[str], uids: Collection[str]) -> None:
    """Refuse a file without an entry for any of the studies; the number of entries for others goes to the log."""
    strange = [uid for uid in entries if uid not in uids]
    if uids and strange and len(strange) == len(entries):
        raise ValueError(
            f"{path}: none of its {len(entries)} studies was found; it has {strange[0]}, there is {min(uids)}"
        )
    if strange:
        logger.warning("%s: %d of %d studies were not found", path, len(strange), len(entries))


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
