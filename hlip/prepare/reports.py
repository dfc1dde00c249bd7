"""Reports of studies: files of them, their texts and their sections.

A file of reports is the user's own: one that cannot be used stops the work before it begins, with an error that names
the file and the place.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..read.files import printable
from ..read.safe import MOST_TEXT, check_keys, read_text, read_yaml, readable
from ..read.schema import check_types, structure
from ..read.texts import normalise, tidy
from .tables import Table, read_json_studies

logger = logging.getLogger(__name__)
# Keys of JSON entries and columns of tables, in lower case, "_en" cut off.
_TEXT_KEYS = {
    "impression": ("impression", "impressions"),
    "findings": ("findings",),
    "report": ("report", "text"),
}
_SPELLINGS = [spelling for spellings in _TEXT_KEYS.values() for spelling in spellings]


class ReportText(NamedTuple):
    """The two sections of a report that are used; empty if absent."""

    impression: str = ""
    findings: str = ""


@dataclass(frozen=True)
class SectionRules:
    """Headings that begin the sections of a report. They are plain words, so no setting can make matching slow.

    impression, findings: headings of the sections that are kept, in lower case.
    other: headings of sections that are left out.
    unlabelled: the section that a text without any heading is.
    entries: what is made of a list of texts that a section is given as: "joined" to running text, or "paragraphs",
        which are items to train with.
    """

    impression: tuple[str, ...] = (
        "impression", "impressions", "impression and recommendation", "impression/recommendation", "impression/plan",
        "conclusion", "conclusions", "diagnosis", "diagnoses", "interpretation", "opinion", "summary", "assessment",
    )  # fmt: skip
    findings: tuple[str, ...] = (
        "finding", "findings", "findings and impression", "findings/impression", "observation", "observations",
        "radiological findings", "imaging findings", "report",
    )  # fmt: skip
    other: tuple[str, ...] = (
        "addendum", "attestation", "clinical data", "clinical details", "clinical history", "clinical indication",
        "clinical information", "clinical question", "comparison", "comparisons", "comparison studies", "contrast",
        "dictated by", "dose", "electronically signed by", "exam", "examination", "history", "indication",
        "indications", "medications", "method", "notification", "patient", "procedure", "protocol",
        "reason for exam", "reason for examination", "reason for study", "recommendation", "recommendations",
        "sequences", "signed by", "study", "technique", "technique and findings",
    )  # fmt: skip
    unlabelled: Literal["impression", "findings"] = "findings"
    entries: Literal["joined", "paragraphs"] = "joined"

    def __post_init__(self) -> None:
        check_types(self)
        given = [(name, heading) for name in ("impression", "findings", "other") for heading in getattr(self, name)]
        for i, (section, heading) in enumerate(given):
            if heading != " ".join(heading.lower().split()) or not heading:
                raise ValueError(f"{section}: a heading must be words in lower case, got {heading!r}")
            if any(heading == before for _, before in given[:i]):
                raise ValueError(f"{section}: heading {heading!r} is given twice")
        if not self.impression or not self.findings:
            raise ValueError("impression and findings each need at least one heading")

    @classmethod
    def read(cls, path: Path | str) -> SectionRules:
        """Read a YAML file with some of the fields.

        Raises:
            ValueError: not such a file; names it and the field.
        """
        with readable(Path(path), "readable section rules"):
            return structure(cls, read_yaml(Path(path), texts=True))

    def split(self, text: str) -> ReportText:
        """The impression and the findings in a report's text.

        A heading begins a line, alone or with a colon or dash behind it; or it stands within a line with a colon
        behind it, in capitals or capitalised after a sentence. A section ends where the next heading of any kind
        begins. Sections of the same kind are joined; what stands before the first heading is left out.
        """
        parts: dict[str, list[str]] = {"impression": [], "findings": [], "other": []}
        pieces = list(self._pieces(tidy(text)))
        if len(pieces) == 1:
            pieces = [(self.unlabelled, "", pieces[0][2])]
        for section, _, body in pieces:
            parts[section].append(normalise(body))
        return ReportText(*("\n\n".join(filter(None, parts[name])) for name in ("impression", "findings")))

    def _pieces(self, text: str) -> Iterator[tuple[str, str, str]]:
        """Tidy text cut into (section, heading, body); the first piece has no heading."""
        section, heading, begin = "other", "", 0
        for match in _heading_pattern(self).finditer(text):
            if _is_heading(text, match):
                yield section, heading, text[begin : match.start()]
                words = " ".join(match["words"].lower().split())
                section = next(s for s in ("impression", "findings", "other") if words in getattr(self, s))
                heading, begin = match.group(), match.end()
        yield section, heading, text[begin:]


@functools.lru_cache
def _heading_pattern(rules: SectionRules) -> re.Pattern[str]:
    words = sorted({*rules.impression, *rules.findings, *rules.other}, key=lambda heading: (-len(heading), heading))
    return re.compile(  # every repetition is bounded: the time is linear in the text
        rf"(?:^[*#_]{{0,4}} ?|(?<= ))(?P<words>{'|'.join(map(re.escape, words))})"
        r" ?(?:\([^()\n]{0,60}\) ?)?[*_]{0,4}(?P<end>:[*_]{0,4}| ?[-–—] |$)",
        re.IGNORECASE | re.MULTILINE,
    )


def _is_heading(text: str, match: re.Match[str]) -> bool:
    words, before = match["words"], text[max(0, match.start() - 2) : match.start()]
    if not before or before.endswith("\n"):
        return match["end"] != "" or words[0].isupper()
    return match["end"].startswith(":") and (words.isupper() or (words[0].isupper() and before[0] in ".!?;:)]"))


def read_reports(path: Path | str, rules: SectionRules | None = None) -> dict[str, ReportText]:
    """Read reports by study.

    Args:
        path: JSON `{STUDY: TEXT or {"impression": .., "findings": .., "report": ..}}`; a CSV with a column of
            `STUDY_COLUMNS` and one or more of impression, findings, report; or a folder of `STUDY.txt`.
        rules: how a whole report is split into sections.

    Raises:
        ValueError: not such a file; names it and the study or line.
    """
    path, rules = Path(path), rules or SectionRules()
    if path.is_dir():
        return _folder_reports(path, rules)
    if path.suffix.lower() == ".csv":
        table = Table.read(path)
        say_misspelt(table)
        return table_reports(table, rules)
    if path.suffix.lower() != ".json":
        raise ValueError(f"{path}: reports must be a .json or .csv file, or a folder of .txt files")

    def read(uid: str, entry: Any) -> ReportText:
        entry = entry if isinstance(entry, dict) else {"report": entry}
        check_keys((key.lower().removesuffix("_en") for key in entry), _SPELLINGS, also=True)
        return report_of(entry, rules)

    return read_json_studies(path, "file of reports", read)


def _folder_reports(folder: Path, rules: SectionRules) -> dict[str, ReportText]:
    reports = {}
    for file in sorted(p for p in folder.iterdir() if p.suffix.lower() == ".txt" and not p.name.startswith(".")):
        if file.is_symlink():
            raise ValueError(f"{file}: a report must be a file, not a link")
        if printable(file.stem) in reports:
            raise ValueError(f"{file}: the study has another report")
        with readable(file, "a readable report"):
            reports[printable(file.stem)] = rules.split(read_text(file, MOST_TEXT))
    if not reports:
        raise ValueError(f"{folder}: no reports (.txt) in this folder")
    return reports


def table_reports(table: Table, rules: SectionRules) -> dict[str, ReportText]:
    """Reports by study from a table's columns of text.

    Raises:
        ValueError: no such column, or two different reports of a study; names the file and the line.
    """
    columns = text_columns(table)
    if not columns:
        raise ValueError(f"{table.path}: needs a column of impression, findings or report")
    return table.by_study(lambda row: report_of({name: row[name] for name in columns}, rules), "report")


def say_misspelt(table: Table, others: Sequence[str] = ()) -> None:
    """Name on the log the columns that look like one that would be read; a table may have any others."""
    for name in table.columns:
        try:
            check_keys([name.lower().removesuffix("_en")], [*_SPELLINGS, *others], also=True)
        except ValueError as error:
            logger.warning("%s: column %r is not read: %s", table.path, name, error)


def text_columns(table: Table) -> list[str]:
    return [name for name in table.columns if name.lower().removesuffix("_en") in _SPELLINGS]


def report_of(entry: Mapping[str, Any], rules: SectionRules) -> ReportText:
    """The report in a JSON entry or a table's row. Sections that are given apart go before those of a whole report.

    Raises:
        ValueError: a text that is neither a string nor a list of strings.
    """
    texts = {}
    keys: dict[str, str] = {}
    for key in entry:
        if (other := keys.setdefault(key.lower().removesuffix("_en"), key)) != key:
            raise ValueError(f"'{other}' and '{key}' are the same section")
    for section, spellings in _TEXT_KEYS.items():
        given = [keys[s] for s in spellings if s in keys and entry[keys[s]] is not None]
        values = [entry[key] for key in given]
        for value, key in zip(values, given, strict=True):
            if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                raise ValueError(f"'{key}' must be a text or a list of sentences")
        joint = "\n\n" if rules.entries == "paragraphs" else "\n" if section == "report" else " "
        texts[section] = joint.join(v if isinstance(v, str) else joint.join(v) for v in values)
    whole = rules.split(texts["report"])
    return ReportText(
        normalise(texts["impression"]) or whole.impression, normalise(texts["findings"]) or whole.findings
    )


def check_texts(path: Path | str | None, reports: Sequence[ReportText]) -> None:
    """Refuse a file whose reports, of the studies that there are, have no text in the sections that are used."""
    blank = sum(not report.impression and not report.findings for report in reports)
    if reports and blank == len(reports):
        raise ValueError(
            f"{path}: none of the {blank} reports of these studies has an impression or findings: their texts are "
            "empty, or under other headings (--sections)"
        )
    if blank:
        logger.warning("%s: %d of %d reports have neither an impression nor findings", path, blank, len(reports))
