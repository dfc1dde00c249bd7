"""Where scans lie before they are prepared: studies found in folders, lists and tables."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from ..read.files import (
    NIFTI_SUFFIXES,
    TENSOR_SUFFIX,
    Header,
    Problem,
    Progress,
    find_repeated,
    is_file,
    is_folder,
    kind_of,
    near,
    printable,
    read_headers,
    silent,
    stem,
    walk,
)
from ..read.scan import Rejection as Rejection
from ..read.scan import ScanError
from ..read.scan import ScanSource as ScanSource
from .lists import ListedStudy, each_once, read_csv_list, read_json_list
from .reports import ReportText, SectionRules, read_reports, text_columns
from .scans import Scan, accession_of, clean, make_scans, named
from .tables import Labels, Table, volume_study

logger = logging.getLogger(__name__)
Join = Literal["uid", "accession"]
TENSOR_NAME = "img.pt"  # says nothing of the scan; the folder does
MANY_SCANS = 200  # of a study; the largest of the paper's has 162


@dataclass(frozen=True)
class StudySource:
    """A study as it lies on disk: its scans in their fixed order, what was written about it, and its labels."""

    uid: str
    scans: tuple[ScanSource, ...]
    impression: str = ""
    findings: str = ""
    labels: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Found:
    """What `find_studies` found: the studies, and what it left out."""

    studies: list[StudySource]
    rejected: list[Rejection]


@dataclass(frozen=True)
class _Study:
    uid: str
    scans: list[Scan]
    report: ReportText = field(default_factory=ReportText)
    labels: Labels = ()
    accession: str = ""


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
    base = Path(root) if root is not None else path.parent
    texts = {} if reports is None else read_reports(reports, rules)
    numbers = {} if labels is None else Table.read(labels).labels((), label_columns)
    if label_columns is not None and labels is None and path.suffix.lower() != ".csv":
        raise ValueError(f"label_columns {', '.join(label_columns)}: there is no table of labels; give labels, too")
    if reports is not None and labels is None:
        _say_untaken_labels(Path(reports))
    rejected: list[Rejection] = []
    if path.suffix.lower() in (".json", ".csv") and not is_folder(path):
        if path.suffix.lower() == ".json":
            listed = read_json_list(path, base, rules)
        else:
            listed = read_csv_list(path, base, rules, label_columns if labels is None else ())
        if any(study.scans is None for study in listed):
            studies = _listed_in_folder(listed, base, workers, progress, rejected)
        else:
            studies = _listed_studies(listed, base, workers, progress, rejected)
    elif is_folder(path):
        studies = _folder_studies(path, workers, progress, rejected)
        if not studies and not rejected:
            raise ValueError(f"{path}: no scans ({_wanted()}) in this folder")
    elif path.exists():
        raise ValueError(f"{path}: expected a folder, a study list (.json) or a table (.csv)")
    else:
        raise ValueError(f"{path}: no such file or folder{near(path)}")
    studies = _without_unusable(studies, workers, progress, rejected)
    keys = {study.uid: study.accession if join == "accession" else study.uid for study in studies}
    _check_join(reports, texts, set(keys.values()))
    _check_join(labels, numbers, set(keys.values()))
    _check_not_blank(reports, [texts[key] for key in keys.values() if key in texts])
    found = []
    for study in studies:
        report = texts.get(keys[study.uid], study.report)
        scans = tuple(scan.source for scan in study.scans)
        marks = numbers.get(keys[study.uid], study.labels)
        found.append(StudySource(study.uid, scans, report.impression, report.findings, marks))
    return Found(found, sorted(rejected, key=attrgetter("study", "scan", "rule", "reason")))


def find_scans(paths: Path | str | Iterable[Path | str], rejected: list[Rejection] | None = None) -> list[ScanSource]:
    """The scans of one study in their fixed order, from its files or one folder.

    Args:
        rejected: what is left out is added to it, such as a DICOM series without pixels.

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
    names, problems = _files([("", path) for path in given])
    others = [path for path in names if kind_of(path) is None]
    headers = dict(zip(others, read_headers(others), strict=True))
    problems += [header for header in headers.values() if isinstance(header, Problem)]
    problems += _no_images(given, headers)
    if problems:
        raise ScanError(problems[0].path, problems[0].reason, problems[0].rule)
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
    scans = named(make_scans(names, headers, "", [] if rejected is None else rejected))
    if not scans:
        raise ValueError(f"{given[0]}: no scans ({_wanted()}) in this folder")
    return [scan.source for scan in scans]


def _no_images(given: Iterable[Path], headers: Mapping[str, Header | Problem | None]) -> list[Problem]:
    """Files that were named as scans and are none."""
    reason = f"not an image ({_wanted()})"
    return [Problem(str(path), "unreadable", reason) for path in given if headers.get(str(path), path) is None]


def _wanted() -> str:
    return f"{', '.join(NIFTI_SUFFIXES)}, {TENSOR_SUFFIX}, DICOM"


def _folder_studies(root: Path, workers: int, progress: Progress, rejected: list[Rejection]) -> list[_Study]:
    files, problems = walk(root)
    known = set(files)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for file in files:
        if kind_of(file) is None:
            continue
        place = Path(file).relative_to(root)
        if "derivatives" in place.parts[:-1]:
            problems.append(Problem(file, "derived", "in a folder of derivatives"))
            continue
        if _has_fixed(place, root, known):
            problems.append(Problem(file, "superseded", "the folder of fixed volumes has it too"))
            continue
        uid, name = _place(place)
        names[uid][file] = name
    _doubt_large(root, names)
    headers: dict[str, dict[str, Header]] = defaultdict(dict)
    for header in read_headers([file for file in files if kind_of(file) is None], workers, progress):
        if isinstance(header, Header):
            headers[header.study][header.path] = header
        elif header is not None:
            problems.append(header)
    for path, rule, reason in problems:
        rejected.append(Rejection("", printable(Path(path).relative_to(root).as_posix()), rule, reason))
    _keep_series_in_one_study(headers, rejected)
    written: dict[str, str] = {}
    for folder in sorted(names):
        if written.setdefault(printable(folder), folder) != folder:  # two forms of one letter, say
            rejected.append(Rejection(printable(folder), "", "name_clash", "another folder's name reads the same"))
    studies = []
    for uid in sorted({*written, *headers}):
        series = headers.pop(uid, {})
        mine = {**(names[written[uid]] if uid in written else {}), **dict.fromkeys(series, "")}
        scans = make_scans(mine, series, uid, rejected)
        studies.append(_Study(uid, scans, accession=accession_of(series.values())))
    return studies


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
    if volume_study(place.name) == stem(place.name):
        return False
    return any(
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


def _listed_studies(
    listed: Sequence[ListedStudy], base: Path, workers: int, progress: Progress, rejected: list[Rejection]
) -> list[_Study]:
    listed = [replace(study, scans=_within(study, base, rejected)) for study in listed]
    files = []
    for study in listed:
        names, problems = _files(study.scans or ())
        files.append(names)
        rejected += [Rejection(study.uid, printable(Path(p.path).name), p.rule, p.reason) for p in problems]
    others = sorted({path for names in files for path in names if kind_of(path) is None})
    headers = dict(zip(others, read_headers(others, workers, progress), strict=True))
    studies = []
    for study, names in zip(listed, files, strict=True):
        problems = [header for path in names if isinstance(header := headers.get(path), Problem)]
        problems += _no_images([path for _, path in study.scans or ()], headers)
        rejected += [Rejection(study.uid, printable(Path(p.path).name), p.rule, p.reason) for p in problems]
        scans, accession = make_scans(names, headers, study.uid, rejected), accession_of(map(headers.get, names))
        studies.append(_Study(study.uid, scans, study.report, study.labels, accession))
    return sorted(studies, key=attrgetter("uid"))


def _within(study: ListedStudy, base: Path, rejected: list[Rejection]) -> tuple[tuple[str, Path], ...]:
    """The scans of a listed study without those whose relative path climbs out of the folder it starts from."""
    kept = []
    for name, path in study.scans or ():
        if path.is_relative_to(base) and Path(os.path.normpath(path.relative_to(base))).parts[:1] == ("..",):
            reason = "the path leads out of the list's folder: write it absolute, or give another root"
            rejected.append(Rejection(study.uid, name or printable(path.name), "outside", reason))
        else:
            kept.append((name, path))
    return tuple(kept)


def _listed_in_folder(
    listed: Sequence[ListedStudy], base: Path, workers: int, progress: Progress, rejected: list[Rejection]
) -> list[_Study]:
    """Studies of a list without paths: those of a folder."""
    rows = {study.uid: study for study in listed}
    left_out: list[Rejection] = []
    found = {study.uid: study for study in _folder_studies(base, workers, progress, left_out)}
    rejected += [rejection for rejection in left_out if not rejection.study or rejection.study in rows]
    rejected += [Rejection(uid, "", "missing", "no scans of it in the folder") for uid in rows if uid not in found]
    return [
        replace(study, report=rows[uid].report, labels=rows[uid].labels) for uid, study in found.items() if uid in rows
    ]


def _files(scans: Sequence[tuple[str, Path]]) -> tuple[dict[str, str], list[Problem]]:
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
            problems.append(Problem(str(path), "missing", "no such file"))
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


def _keep_series_in_one_study(headers: dict[str, dict[str, Header]], rejected: list[Rejection]) -> None:
    """Of a series that lies in two studies with the same instances, drop the one of the later study."""
    homes: dict[str, set[str]] = defaultdict(set)
    for uid, files in headers.items():
        for header in files.values():
            homes[header.series].add(uid)
    for series, uids in homes.items():
        seen: dict[str, str] = {}
        for uid in sorted(uids) if len(uids) > 1 else ():
            mine = [header for header in headers[uid].values() if header.series == series]
            other = next((seen[header.instance] for header in mine if header.instance in seen), None)
            if other is None:
                seen.update({header.instance: uid for header in mine if header.instance})
                continue
            for header in mine:
                del headers[uid][header.path]
            rejected.append(Rejection(uid, series, "duplicate", f"a series of study {other}, with the same instances"))


def _without_unusable(
    studies: Sequence[_Study], workers: int, progress: Progress, rejected: list[Rejection]
) -> list[_Study]:
    """The studies with their scans named and in order, without repeated scans; those without a scan are left out."""
    studies = [replace(study, scans=named(study.scans)) for study in studies]
    parts = [[scan.parts for scan in study.scans] for study in studies]
    kept = []
    for study, repeated in zip(studies, find_repeated(parts, workers, progress), strict=True):
        for i, first in repeated.items():
            reason = f"the same image as {study.scans[first].source.name}"
            rejected.append(Rejection(study.uid, study.scans[i].source.name, "duplicate", reason))
        scans = [scan for i, scan in enumerate(study.scans) if i not in repeated]
        if scans:
            kept.append(replace(study, scans=scans))
        else:
            rejected.append(Rejection(study.uid, "", "no_scans", "no scan of it can be used"))
    return kept


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


def _check_join(path: Path | str | None, entries: Collection[str], uids: Collection[str]) -> None:
    """Refuse a file without an entry for any of the studies; the number of entries for others goes to the log."""
    strange = [uid for uid in entries if uid not in uids]
    if uids and strange and len(strange) == len(entries):
        raise ValueError(
            f"{path}: none of its {len(entries)} studies was found; it has {strange[0]}, there is {min(uids)}"
        )
    if strange:
        logger.warning("%s: %d of %d studies were not found", path, len(strange), len(entries))


def _check_not_blank(path: Path | str | None, reports: Sequence[ReportText]) -> None:
    """Refuse a file whose reports, of the studies that there are, have no text in the sections that are used."""
    blank = sum(not report.impression and not report.findings for report in reports)
    if reports and blank == len(reports):
        raise ValueError(
            f"{path}: none of the {blank} reports of these studies has an impression or findings: their texts are "
            "empty, or under other headings (--sections)"
        )
    if blank:
        logger.warning("%s: %d of %d reports have neither an impression nor findings", path, blank, len(reports))
