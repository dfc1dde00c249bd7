"""Where scans lie before they are prepared: studies found in folders, lists and tables."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from ..read.files import (
    NIFTI_SUFFIXES,
    TENSOR_SUFFIX,
    Progress,
    is_file,
    is_folder,
    kind_of,
    near,
    printable,
    silent,
    stem,
    walk,
)
from ..read.headers import Header, read_headers
from ..read.repeated import find_repeated
from ..read.scan import Rejection, ScanError, ScanSource
from ..study import StudyRecord
from .lists import Named, each_once, read_csv_list, read_json_list
from .reports import SectionRules, check_texts, read_reports, text_columns
from .scans import clean, make_scans, named
from .tables import Table, check_join, volume_study

logger = logging.getLogger(__name__)
Join = Literal["uid", "accession"]
TENSOR_NAME = "img.pt"  # says nothing of the scan; the folder does
MANY_SCANS = 200  # of a study; the largest of the paper's has 162
WANTED = f"{', '.join(NIFTI_SUFFIXES)}, {TENSOR_SUFFIX}, DICOM"


@dataclass(frozen=True)
class Found:
    """Studies that were found, and what was left out."""

    studies: list[StudyRecord[ScanSource]]
    rejected: list[Rejection]


def find_studies(
    path: Path | str,
    *,
    root: Path | str | None = None,
    reports: Path | str | None = None,
    labels: Path | str | None = None,
    label_columns: Collection[str] | None = None,
    join: Join = "uid",
    sections: SectionRules | None = None,
    workers: int = 1,
    progress: Progress = silent,
) -> Found:
    """Find studies and their scans; `docs/input.md` says where. No image is decoded.

    The result is the same whatever the order of the file system and the number of workers.

    Args:
        path: a folder, a study list (`.json`) or a table (`.csv`).
        root: what the paths of a list or table are relative to; its folder if None.
        reports: see `read_reports`; a report there takes the place of one in the list. A table of reports gives no
            labels, unless it is that of `labels`, too.
        labels: a CSV with a column of studies and columns of numbers; in place of those in the list.
        label_columns: of that CSV, or of the table; see `Table.labels`.
        join: what reports and labels call a study: its uid, or DICOM's AccessionNumber, which is not kept.
        sections: how reports are split.
        workers: processes that read the headers of DICOM files.
        progress: such as `tqdm`; called with an iterable, `total`, `desc` and `unit`.

    Returns:
        Studies by uid, each with at least one scan; and what was left out, with its reason.

    Raises:
        ValueError: there is nothing at `path`; a list, table or report cannot be used; none of the reports or
            labels belongs to a study.
    """
    path, rules = Path(path), sections or SectionRules()
    texts = {} if reports is None else read_reports(reports, rules)
    numbers = {} if labels is None else Table.read(labels).labels((), label_columns)
    if label_columns is not None and labels is None and path.suffix.lower() != ".csv":
        raise ValueError(f"label_columns {', '.join(label_columns)}: there is no table of labels; give labels, too")
    if reports is not None and labels is None:
        _say_untaken_labels(Path(reports))
    search = _Search(workers, progress)
    base = Path(root) if root is not None else path.parent
    studies = search.usable(search.at(path, base, rules, label_columns if labels is None else ()))
    keys = [search.accessions.get(study.uid, "") if join == "accession" else study.uid for study in studies]
    check_join(reports, texts, set(keys))
    check_join(labels, numbers, set(keys))
    check_texts(reports, [texts[key] for key in keys if key in texts])
    studies = [
        replace(study, labels=numbers.get(key, study.labels), **(texts[key]._asdict() if key in texts else {}))
        for study, key in zip(studies, keys, strict=True)
    ]
    return Found(studies, sorted(search.rejected, key=attrgetter("study", "scan", "rule", "reason")))


def find_study(paths: Path | str | Iterable[Path | str]) -> StudyRecord[ScanSource]:
    """One study from its files or one folder, without a name, and what is left out of it, such as a DICOM series
    without pixels.

    Raises:
        ValueError: no scan, one that is given twice, DICOM files of two studies, or a folder of many studies.
        ScanError: a file that cannot be used; names it.
    """
    listed: Any = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    listed = list(listed) if isinstance(listed, Iterable) and not isinstance(listed, Mapping) else [listed]
    if wrong := [path for path in listed if not isinstance(path, (str, os.PathLike))]:
        raise ValueError(f"expected a path or a list of paths, got {wrong[0]!r}")
    given = each_once(list(map(Path, listed)))
    if not given:
        raise ValueError("a study needs at least one scan file, got none")
    search = _Search()
    names, problems = _files([("", path) for path in given])
    headers = search.headers(names)
    problems += _no_images(names, given, headers)
    if problems:
        raise problems[0]
    studies = sorted({header.study for header in headers.values() if isinstance(header, Header)})
    if len(studies) > 1:
        raise ValueError(f"{given[0]}: DICOM files of {len(studies)} studies: {', '.join(studies[:3])}")
    inside = Counter(Path(path).parent for path in names if kind_of(path) is not None and len(given) == 1)
    if len(inside) > 1 and min(inside.values()) > 1:
        if inside.total() > MANY_SCANS:
            raise ValueError(
                f"{given[0]}: {inside.total()} scans in {len(inside)} folders are more than a study has; give each "
                "study's folder by itself"
            )
        logger.warning(
            "%s: taken as one study, with several scans in each of %d folders; if these are studies, give each",
            given[0],
            len(inside),
        )
    scans = named(make_scans(names, headers, "", search.rejected))
    if not scans:
        raise ValueError(f"{given[0]}: no scans ({WANTED}) in this folder")
    return StudyRecord("", scans, rejected=search.rejected)


class _Search:
    """A look for studies.

    rejected: what was left out so far.
    accessions: what reports may call a study, by its uid.
    """

    def __init__(self, workers: int = 1, progress: Progress = silent) -> None:
        self.workers, self.progress = workers, progress
        self.rejected: list[Rejection] = []
        self.accessions: dict[str, str] = {}

    def at(
        self, path: Path, base: Path, rules: SectionRules, wanted: Collection[str] | None
    ) -> list[StudyRecord[ScanSource]]:
        """The studies at a path; see `find_studies`. wanted: as `Table.labels` takes it."""
        kind = "folder" if is_folder(path) else path.suffix.lower()
        if kind == ".json":
            return self.listed(read_json_list(path, base, rules), base)
        if kind == ".csv":
            rows = read_csv_list(path, base, rules, wanted)
            return self.listed(rows, base) if any(row.scans for row in rows) else self.listed_in_folder(rows, base)
        if kind == "folder":
            if (studies := self.folder(path)) or self.rejected:
                return studies
            raise ValueError(f"{path}: no scans ({WANTED}) in this folder")
        if path.exists():
            raise ValueError(f"{path}: expected a folder, a study list (.json) or a table (.csv)")
        raise ValueError(f"{path}: no such file or folder{near(path)}")

    def headers(self, files: Iterable[str]) -> dict[str, Header | ScanError | None]:
        """The headers of those of the files that may be DICOM."""
        others = sorted({file for file in files if kind_of(file) is None})
        return dict(zip(others, read_headers(others, self.workers, self.progress), strict=True))

    def study(
        self, uid: str, names: Mapping[str, str], headers: Mapping[str, Header | ScanError | None]
    ) -> StudyRecord[ScanSource]:
        """A study of files, given with their names."""
        mine = [header for path in names if isinstance(header := headers.get(path), Header)]
        self.accessions[uid] = min((header.accession for header in mine if header.accession), default="")
        return StudyRecord(uid, make_scans(names, headers, uid, self.rejected))

    def folder(self, root: Path) -> list[StudyRecord[ScanSource]]:
        """The studies below a folder, by uid."""
        files, problems = walk(root)
        known = set(files)
        names: dict[str, dict[str, str]] = defaultdict(dict)
        for file in files:
            if kind_of(file) is None:
                continue
            place = Path(file).relative_to(root)
            if "derivatives" in place.parts[:-1]:
                problems.append(ScanError(file, "in a folder of derivatives", "derived"))
            elif _has_fixed(place, root, known):
                problems.append(ScanError(file, "the folder of fixed volumes has it too", "superseded"))
            else:
                uid, name = _place(place)
                names[uid][file] = name
        _doubt_large(root, names)
        headers: dict[str, dict[str, Header]] = defaultdict(dict)
        for header in self.headers(files).values():
            if isinstance(header, Header):
                headers[header.study][header.path] = header
            elif header is not None:
                problems.append(header)
        self.rejected += [error.of("", printable(Path(error.path).relative_to(root).as_posix())) for error in problems]
        self._keep_series_in_one_study(headers)
        written: dict[str, str] = {}
        for folder in sorted(names):
            if written.setdefault(printable(folder), folder) != folder:  # two forms of one letter, say
                self.rejected.append(
                    Rejection(printable(folder), "", "name_clash", "another folder's name reads the same")
                )
        studies = []
        for uid in sorted({*written, *headers}):
            series = headers.get(uid, {})
            mine = {**(names[written[uid]] if uid in written else {}), **dict.fromkeys(series, "")}
            studies.append(self.study(uid, mine, series))
        return studies

    def _keep_series_in_one_study(self, headers: dict[str, dict[str, Header]]) -> None:
        """Of a series that lies in two studies with the same instances, drop the one of the later study."""
        homes: dict[str, dict[str, list[Header]]] = defaultdict(lambda: defaultdict(list))
        for uid, files in headers.items():
            for header in files.values():
                homes[header.series][uid].append(header)
        for series, studies in homes.items():
            seen: dict[str, str] = {}
            for uid, mine in sorted(studies.items()):
                other = next((seen[header.instance] for header in mine if header.instance in seen), None)
                if other is None:
                    seen.update({header.instance: uid for header in mine if header.instance})
                    continue
                for header in mine:
                    del headers[uid][header.path]
                self.rejected.append(
                    Rejection(uid, series, "duplicate", f"a series of study {other}, with the same instances")
                )

    def listed(self, rows: Sequence[StudyRecord[Named]], base: Path) -> list[StudyRecord[ScanSource]]:
        """The studies of a list with paths, by uid."""
        rows = [replace(row, scans=self._within(row, base)) for row in rows]
        files = [_files(row.scans) for row in rows]
        headers = self.headers(path for names, _ in files for path in names)
        studies = []
        for row, (names, problems) in zip(rows, files, strict=True):
            problems += _no_images(names, [path for _, path in row.scans], headers)
            self.rejected += [error.of(row.uid, printable(Path(error.path).name)) for error in problems]
            studies.append(row.having(self.study(row.uid, names, headers).scans))
        return sorted(studies, key=attrgetter("uid"))

    def _within(self, row: StudyRecord[Named], base: Path) -> list[Named]:
        """The scans of a listed study without those whose relative path climbs out of the folder it starts from."""
        kept = []
        for name, path in row.scans:
            if path.is_relative_to(base) and Path(os.path.normpath(path.relative_to(base))).parts[:1] == ("..",):
                self.rejected.append(
                    Rejection(
                        row.uid,
                        name or printable(path.name),
                        "outside",
                        "the path leads out of the list's folder: write it absolute, or give another root",
                    )
                )
            else:
                kept.append((name, path))
        return kept

    def listed_in_folder(self, rows: Sequence[StudyRecord[Named]], base: Path) -> list[StudyRecord[ScanSource]]:
        """The studies of a list without paths, which are those of a folder."""
        listed = {row.uid: row for row in rows}
        studies = {study.uid: study for study in self.folder(base)}
        self.rejected = [error for error in self.rejected if not error.study or error.study in listed]
        absent = [uid for uid in listed if uid not in studies]
        self.rejected += [Rejection(uid, "", "missing", "no scans of it in the folder") for uid in absent]
        return [listed[uid].having(study.scans) for uid, study in studies.items() if uid in listed]

    def usable(self, studies: Sequence[StudyRecord[ScanSource]]) -> list[StudyRecord[ScanSource]]:
        """The studies with their scans named and in order, without repeated ones; those without a scan are left
        out."""
        studies = [replace(study, scans=named(study.scans)) for study in studies]
        parts = [[scan.parts for scan in study.scans] for study in studies]
        kept = []
        for study, repeated in zip(studies, find_repeated(parts, self.workers, self.progress), strict=True):
            for i, first in repeated.items():
                self.rejected.append(
                    Rejection(
                        study.uid, study.scans[i].name, "duplicate", f"the same image as {study.scans[first].name}"
                    )
                )
            scans = tuple(replace(scan, offsets=()) for i, scan in enumerate(study.scans) if i not in repeated)
            if scans:
                kept.append(replace(study, scans=scans))
            else:
                self.rejected.append(Rejection(study.uid, "", "no_scans", "no scan of it can be used"))
        return kept


def _no_images(
    names: Iterable[str], given: Iterable[Path], headers: Mapping[str, Header | ScanError | None]
) -> list[ScanError]:
    """Errors of files whose header cannot be read, and of those that were named as scans and are none."""
    wrong = [header for path in names if isinstance(header := headers.get(path), ScanError)]
    none = [path for path in given if headers.get(str(path), path) is None]
    return wrong + [ScanError(path, f"not an image ({WANTED})") for path in none]


def _doubt_large(root: Path, names: Mapping[str, Mapping[str, str]]) -> None:
    """Warn of folders taken for a study that may be folders of studies."""
    for uid, files in names.items():
        inside = {parts[1] for file in files if len(parts := Path(file).relative_to(root).parts) > 2}
        if len(inside) > 1 and (len(names) == 1 or len(files) > MANY_SCANS):
            logger.warning(
                "%s: taken as one study of %d files in %d folders; if each of these is a study, prepare %s instead",
                root / uid,
                len(files),
                len(inside),
                root / uid,
            )


def _has_fixed(place: Path, root: Path, files: Collection[str]) -> bool:
    """Whether a volume of CT-RATE also lies in `valid_fixed` beside `valid`, where its header is mended."""
    parts = place.parts
    return volume_study(place.name) != stem(place.name) and any(
        str(root.joinpath(*parts[:i], f"{parts[i]}_fixed", *parts[i + 1 :])) in files for i in range(len(parts) - 1)
    )


def _place(place: Path) -> tuple[str, str]:
    """Study, as the files have it, and scan's name of a file that is no DICOM, by its path below the root."""
    *folders, name = place.parts
    subject = re.match(r"(sub-[^_]+)(?:_(ses-[^_]+))?_", name)
    if subject:  # BIDS: the name repeats subject and session
        above = folders[: folders.index(subject[1])] if subject[1] in folders else folders[:0]
        return "/".join([*above, "_".join(filter(None, subject.groups()))]), clean(name)
    if volume_study(name) != stem(name):  # CT-RATE
        return volume_study(name), clean(name)
    if not folders:
        return stem(name), clean(name)
    return folders[0], _path_name(Path(*place.parts[1:]))


def _files(scans: Sequence[Named]) -> tuple[dict[str, str], list[ScanError]]:
    """The files of one study, each with a name, from named or unnamed files and folders.

    Without a name they are called by their path below the folder that they have in common.
    """
    names, problems = {}, []
    top = _common_folder([path for _, path in scans])
    for name, path in scans:
        if is_folder(path):
            inside, more = walk(path)
            problems += more
            for file in inside:
                below = Path(file).relative_to(path) if name else Path(file).absolute().relative_to(top)
                names[file] = _path_name(Path(clean(name)) / below)
        elif kind_of(path) is None and not is_file(path):
            problems.append(ScanError(path, "no such file", "missing"))
        else:
            names[str(path)] = clean(name) or _path_name(path.absolute().relative_to(top))
    return names, problems


def _common_folder(paths: Sequence[Path]) -> Path:
    if len(paths) == 1 and is_folder(paths[0]):
        return paths[0].absolute()
    folders = [path.parent.parent if path.name == TENSOR_NAME else path.parent for path in map(Path.absolute, paths)]
    return Path(os.path.commonpath(folders)) if folders else Path()


def _path_name(below: Path) -> str:
    """A name from a path. A space sorts before what file names are made of, as the end of a folder's name does."""
    parts = below.parts[:-1] if below.name == TENSOR_NAME else below.parts
    return " ".join(map(clean, parts or below.parts))


def _say_untaken_labels(reports: Path) -> None:
    """A table of reports gives texts only, so that no column gets into a store which nobody has asked for."""
    if reports.suffix.lower() != ".csv" or is_folder(reports):
        return
    table = Table.read(reports)
    if columns := table.likely_labels(text_columns(table)):
        logger.warning(
            "%s: columns that are not taken as labels, as this is a table of reports: %s; to take them, give it as "
            "--labels, too",
            reports,
            ", ".join(columns),
        )
