"""Files about studies, as JSON objects and CSV tables with one entry per study."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .files import check_regular, printable, stem

STUDY_COLUMNS = ("study", "study_uid", "VolumeName")
Labels = tuple[tuple[str, float], ...]
Value = TypeVar("Value")

# In a column's name, anywhere or as a word of its own; better one label less than one patient named.
_IDENTIFIER = re.compile(r"patient|accession|birth|mrn|ssn|phone|address|hospital|insurance|surname|date")
_IDENTIFIER_WORDS = {"name", "dob", "id", "uid", "nr", "no", "num", "number", "pid", "time"}


def read_json_studies(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object with one entry per study, none of them twice.

    Raises:
        ValueError: not such a file; names it.
    """
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
        if isinstance(content, dict):
            content = _unique_keys([(printable(uid), entry) for uid, entry in content.items()])
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable {what} ({error})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected an object with one entry per study")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return content


@dataclass(frozen=True)
class Table:
    """A CSV with a column of study ids.

    rows: (line, study, cells by column) of each.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[int, str, dict[str, str]], ...]

    @classmethod
    def read(cls, path: Path | str) -> Table:
        """Read a CSV. Of `VolumeName`, an image file's name, the study is what comes before the scan's number.

        Raises:
            ValueError: not such a file; names it, and the line.
        """
        path = Path(path)
        try:
            check_regular(path)
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                columns = [name.strip() for name in reader.fieldnames or ()]
                reader.fieldnames = columns
                uid_column = next((name for name in STUDY_COLUMNS if name in columns), None)
                if uid_column is None or len(set(columns)) < len(columns):
                    raise ValueError(f"needs a column of {', '.join(STUDY_COLUMNS)}, and no column twice")
                rows = []
                for row in reader:
                    line = reader.line_num
                    if None in row or None in row.values():
                        raise ValueError(f"line {line}: expected {len(columns)} cells")
                    uid = row[uid_column].strip()
                    uid = volume_study(uid) if uid_column == "VolumeName" else uid
                    if not uid:
                        raise ValueError(f"line {line}: no {uid_column}")
                    rows.append((line, printable(uid), {k: v for k, v in row.items() if k != uid_column}))
        except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
            raise ValueError(f"{path}: not a readable table ({error})") from error
        if not rows:
            raise ValueError(f"{path}: not a readable table (it has no rows)")
        return cls(path, tuple(name for name in columns if name != uid_column), tuple(rows))

    def labels(self, leave: Collection[str] = ()) -> dict[str, Labels]:
        """Labels by study: the columns of numbers, in order; an empty cell is no label.

        Columns whose name speaks of a patient, name, date, number or id are left out, as are those in `leave` and
        those without numbers.

        Raises:
            ValueError: numbers and words in one column, or two different rows of a study; names file and line.
        """
        columns = [name for name in self.columns if name and name not in leave and not _is_identifier(name)]
        columns = [name for name in columns if self._has_numbers(name)]
        return self.by_study(lambda row: tuple((n, float(row[n])) for n in columns if row[n].strip()), "labels")

    def _has_numbers(self, column: str) -> bool:
        cells = [(line, row[column].strip()) for line, _, row in self.rows if row[column].strip()]
        words = [(line, cell) for line, cell in cells if not _is_number(cell)]
        if words and len(words) < len(cells):
            line, cell = words[0]
            raise ValueError(f"{self.path}: line {line}: column {column!r} has numbers, and {cell!r}")
        return bool(cells) and not words

    def by_study(self, read: Callable[[dict[str, str]], Value], what: str) -> dict[str, Value]:
        """What `read` makes of the rows, by study; a study's rows must agree."""
        found: dict[str, Value] = {}
        for line, uid, row in self.rows:
            value = read(row)
            if found.setdefault(uid, value) != value:
                raise ValueError(f"{self.path}: line {line}: another {what} of study {uid} than in a line before")
        return found


def volume_study(name: str) -> str:
    """The study of a volume by its file's name: CT-RATE numbers a study's volumes at the end of the name."""
    name = stem(name.replace("\\", "/").rpartition("/")[2])
    match = re.fullmatch(r"((?:train|valid)_\d+_[a-z]+)_\d+", name)
    return match[1] if match else name


def _is_identifier(column: str) -> bool:
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower())
    return bool(_IDENTIFIER.search("".join(words)) or _IDENTIFIER_WORDS.intersection(words))


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
