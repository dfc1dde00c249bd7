"""Study lists: JSON and CSV files that say which files are the scans of which study."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..read.files import NIFTI_SUFFIXES, TENSOR_SUFFIX, is_file
from ..read.safe import check_keys
from ..study import StudyRecord
from .reports import ReportText, SectionRules, report_of, say_misspelt, table_reports, text_columns
from .tables import Table, read_json_studies

PATH_COLUMNS = ("path", "scan", "file", "scan_path", "file_name", "filename")
TEXTS = ("report", "impressions", "findings")
Named = tuple[str, Path]  # a scan's name, empty if it is to be made from the path, and its file or folder


def read_json_list(path: Path, root: Path, rules: SectionRules) -> list[StudyRecord[Named]]:
    """Read `{STUDY: {...}}` where each entry has one of

        "scans": [FILE, ...]       files or folders, relative to `root`
        "recons": [FILE, ...]      the same; or bare file names of CT-RATE, looked for in its folders
        "series": {NAME: {...}}    `root/STUDY/NAME` with a suffix, or as a folder

    and may have "report", "impressions" and "findings", each a list of texts.

    Raises:
        ValueError: not such a file; names it and the study.
    """

    def read(uid: str, entry: Any) -> StudyRecord[Named]:
        given = [key for key in ("scans", "recons", "series") if isinstance(entry, dict) and key in entry]
        if len(given) != 1 or not isinstance(entry[given[0]], dict if given == ["series"] else list):
            raise ValueError("expected an object with a list of 'scans', or of 'recons', or an object 'series'")
        check_keys(entry, ("scans", "recons", "series", *TEXTS), also=True)
        scans = _listed(given[0], entry[given[0]], root, uid)
        texts = {key: entry[key] for key in TEXTS if key in entry}
        if alone := [key for key, value in texts.items() if not isinstance(value, list)]:
            raise ValueError(f"'{alone[0]}' must be a list of sentences")
        return StudyRecord(uid, scans, *report_of(texts, rules))

    return list(read_json_studies(path, "study list", read).values())


def _listed(key: str, scans: Any, root: Path, uid: str) -> tuple[Named, ...]:
    if not all(map(_is_file_name, scans)):
        raise ValueError(f"'{key}' must be file names")
    if key == "series":
        return tuple((name, _series_path(root / uid, name)) for name in sorted(scans))
    paths = [_recon_path(root, scan) if key == "recons" else root / scan for scan in scans]
    return tuple(("", path) for path in each_once(paths))


def _is_file_name(text: Any) -> bool:
    """Whether it is text that a file system can hold."""
    try:
        return isinstance(text, str) and text != "" and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def each_once(paths: list[Path]) -> list[Path]:
    """The paths in sorted order.

    Raises:
        ValueError: a path occurs twice.
    """
    paths = sorted(paths)
    if twice := [path for path, following in pairwise(paths) if path == following]:
        raise ValueError(f"{twice[0]}: the same scan is given twice")
    return paths


def _series_path(study: Path, name: str) -> Path:
    places = [study / f"{name}{suffix}" for suffix in (TENSOR_SUFFIX, *NIFTI_SUFFIXES)]
    return next(filter(is_file, places), study / name)


def _recon_path(root: Path, name: str) -> Path:
    """CT-RATE keeps valid_1_a_1.nii.gz in valid_fixed/valid_1/valid_1_a, with a mended header, and in valid/.."""
    split, *rest = name.partition(".")[0].split("_")
    if len(rest) != 3:
        return root / name
    folder = Path(f"{split}_{rest[0]}", f"{split}_{rest[0]}_{rest[1]}", name)
    places = [root / name, root / folder, root / f"{split}_fixed" / folder, root / split / folder]
    return next(filter(is_file, places), root / name)


def read_csv_list(
    path: Path, root: Path, rules: SectionRules, wanted: Collection[str] | None = None
) -> list[StudyRecord[Named]]:
    """Read a table with a column of studies, one row per scan or per study.

    It may have a column of paths relative to `root` (`PATH_COLUMNS`), columns of text (impression, findings, report),
    in which a study's rows must agree, and labels (see `Table.labels`). Without a column of paths, studies have no
    scans, and are to be found in a folder.

    Raises:
        ValueError: not such a file; names it and the line.
    """
    table = Table.read(path)
    say_misspelt(table, PATH_COLUMNS)
    column = next((name for name in PATH_COLUMNS if name in table.columns), "")
    texts = text_columns(table)
    reports = table_reports(table, rules) if texts else {}
    labels = table.labels({*texts, *PATH_COLUMNS}, wanted)
    files: dict[str, list[Path]] = defaultdict(list)
    for line, uid, row in table.rows if column else ():
        if not _is_file_name(row[column].strip()):
            raise ValueError(f"{path}: line {line}: no {column}")
        files[uid].append(root / row[column].strip())
    studies = []
    for uid, study_labels in labels.items():
        try:
            scans = tuple(("", file) for file in each_once(files[uid]))
        except ValueError as error:
            raise ValueError(f"{path}: study {uid}: {error}") from error
        studies.append(StudyRecord(uid, scans, *reports.get(uid, ReportText()), study_labels))
    return studies
