"""Report texts: read in three forms, split into sections and sentences without losing a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlip.prepare.reports import ReportText, SectionRules, read_reports
from hlip.prepare.tables import Table
from hlip.read.texts import normalise, split_sentences

RULES = SectionRules()

# Sections

CHEST = """\
CT CHEST WITHOUT CONTRAST  01/02/2020

CLINICAL HISTORY:   Cough.   Prior impression: pneumonia.
COMPARISON: None.
TECHNIQUE:
Axial images, 1.25 mm.

FINDINGS:
Lungs: A 3.5 cm mass in the
right upper lobe.
Heart:  Normal in size.

IMPRESSION:
1.  Mass, likely
malignant.
2.  No effusion.

Electronically signed by: J. Smith, MD
"""


def test_sections_of_a_usual_report() -> None:
    assert RULES.split(CHEST) == ReportText(
        impression="1. Mass, likely malignant.\n2. No effusion.",
        findings="Lungs: A 3.5 cm mass in the right upper lobe. Heart: Normal in size.",
    )


@pytest.mark.parametrize(
    ("text", "impression", "findings"),
    [
        ("FINDINGS: a. IMPRESSION: b.", "b.", "a."),
        ("Findings: a. Impression: b.", "b.", "a."),
        ("findings: a\nimpression: b", "b", "a"),
        ("FINDINGS\na\nIMPRESSION\nb", "b", "a"),
        ("FINDINGS - a\nIMPRESSION – b", "b", "a"),
        ("**FINDINGS:** a\n\n## Impression\nb", "b", "a"),
        ("\r\n  FINDINGS :\r\na\r\n\tCONCLUSION :\tb", "b", "a"),
        ("FINDINGS (limited study): a\nIMPRESSION (final): b", "b", "a"),
        ("FINDINGS: a\nOPINION: b\nRECOMMENDATION: c", "b", "a"),
        ("IMPRESSION: b\nFINDINGS: a", "b", "a"),
        ("FINDINGS: a\nADDENDUM: x\nIMPRESSION: b\nFINDINGS: c", "b", "a\n\nc"),
        ("FINDINGS: IMPRESSION: b", "b", ""),
        ("DIAGNOSIS: b", "b", ""),
        ("No acute bleed.", "", "No acute bleed."),
        ("", "", ""),
        (" \n\t\n", "", ""),
        # words of a heading that are none
        ("FINDINGS: These findings: x. My impression: y.", "", "These findings: x. My impression: y."),
        ("FINDINGS: in my Impression: y.", "", "in my Impression: y."),
        ("FINDINGS: x. Impression of a mass.", "", "x. Impression of a mass."),
        ("FINDINGS: The study\nis limited. Technique\nis poor.", "", "The study is limited. Technique is poor."),
        ("FINDINGS: as in the prior\nimpression\nof May", "", "as in the prior impression of May"),
        ("FINDINGS: a\nImpressions of the gyri are flat.", "", "a Impressions of the gyri are flat."),
    ],
)  # fmt: skip
def test_styles_of_headings(text: str, impression: str, findings: str) -> None:
    assert RULES.split(text) == ReportText(impression, findings)


def test_rules_can_be_set(tmp_path: Path) -> None:
    rules = SectionRules(impression=("beurteilung",), findings=("befund",), other=("technik",), unlabelled="impression")
    text = "Technik: CT.\nBefund: Keine Blutung.\nBeurteilung: Unauffällig."
    assert rules.split(text) == ReportText("Unauffällig.", "Keine Blutung.")
    assert rules.split("Unauffällig.") == ReportText(impression="Unauffällig.")
    path = tmp_path / "sections.yaml"
    path.write_text("impression: [beurteilung]\nfindings: [befund]\nother: [technik]\nunlabelled: impression\n")
    assert SectionRules.read(path) == rules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[impression]", "expected fields, got"),
        ("impresion: [x]", r"unknown field 'impresion'; did you mean impression\?"),
        ("impression: x", "impression: expected a list, got 'x'"),
        ("impression: [[3]]", r"impression\[0\]: expected a text, got .*3"),
        ("impression: [Befund]", "impression: a heading must be words in lower case"),
        ("impression: [findings]", "findings: heading 'findings' is given twice"),
        ("impression: []", "each need at least one heading"),
        ("unlabelled: other", "unlabelled: expected one of impression, findings"),
        ("unlabelled: [other]", "unlabelled: expected one of impression, findings"),
        ("{", "not readable section rules"),
        ("!!python/object/apply:os.system [ls]", "not readable section rules"),
    ],
)
def test_malformed_rules(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "sections.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        SectionRules.read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_headings_are_words_not_patterns() -> None:
    rules = SectionRules(impression=("(a+)+$",), findings=("b.c",), other=())
    assert rules.split("(A+)+$: yes. bxc: no.\nb.c: so") == ReportText("yes. bxc: no.", "so")


WORD = st.text("abcxyzäß.,;()", min_size=1, max_size=6)
BODY = st.lists(WORD, min_size=1, max_size=12).map(" ".join).map(normalise)


@given(BODY, BODY, st.sampled_from(["{}: {}\n{}: {}", "{}\n\n{}\n\n{}\n{}", "\n{} - {}\n {}:\n{}"]), st.booleans())
def test_what_is_put_into_sections_comes_out(impression: str, findings: str, layout: str, upper: bool) -> None:
    headings = ("IMPRESSION", "FINDINGS") if upper else ("Impression", "Findings")
    text = layout.format(headings[0], impression, headings[1], findings)
    report = RULES.split(text)
    assert (report.impression, report.findings) == (impression, findings)


PIECES = st.sampled_from(
    ["FINDINGS:", "Findings", "impression:", "IMPRESSION", "TECHNIQUE:", "\n", "\n\n", " ", ": ", "-", ". ", "x", "Dr.",
     "1.", "2)", "- ", "(", "3.5 cm", "No", "e.g.", "?", '"', "A", "\t", "\u2028", "**"]
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join), st.lists(PIECES, max_size=30).map(" ".join))


@given(TEXTS)
def test_no_word_is_lost_between_sections(text: str) -> None:
    """The kept sections, the rest and the headings together are the text's words, in order."""
    from hlip.read.texts import tidy

    pieces = list(RULES._pieces(tidy(text)))
    assert "".join(heading + body for _, heading, body in pieces) == tidy(text)
    report = RULES.split(text)
    if len(pieces) > 1:
        for section, kept in (("impression", report.impression), ("findings", report.findings)):
            assert kept.split() == [word for kind, _, body in pieces if kind == section for word in body.split()]
    else:
        assert (report.impression, report.findings.split()) == ("", text.replace("\0", " ").split())


@pytest.mark.parametrize(
    "unit", [" ", "\n", "FINDINGS", "FINDINGS:", "FINDINGS (", "Impression ", "*", "1. ", "- ", "a. "]
)
def test_long_and_dull_texts_come_to_an_end(unit: str) -> None:
    """A million characters: a pattern or loop of quadratic time would hang here."""
    text = unit * (1_000_000 // len(unit))
    assert " ".join(split_sentences(text)).split() == text.split()
    report = RULES.split(text)
    assert len(report.impression) + len(report.findings) <= len(text)


# Sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("No bleed. No mass.", ["No bleed.", "No mass."]),
        ("no bleed. no mass", ["no bleed.", "no mass"]),
        ("A 3.5 cm mass, e.g. glioma vs. abscess. Stable.", ["A 3.5 cm mass, e.g. glioma vs. abscess.", "Stable."]),
        ("Discussed with Dr. J. Smith at 5 p.m. today.", ["Discussed with Dr. J. Smith at 5 p.m. today."]),
        ("1. Mass. 2. No bleed.", ["1. Mass.", "2. No bleed."]),
        ("1. Mass\n2. No bleed\n   and no shift", ["1. Mass", "2. No bleed and no shift"]),
        ("- Mass\n- No bleed", ["- Mass", "- No bleed"]),
        ("1) Mass. 2) No bleed.", ["1) Mass.", "2) No bleed."]),
        ("Grade 2. Next.", ["Grade 2.", "Next."]),
        ("See image No. 5. Bleed? No. Mass? No.", ["See image No. 5.", "Bleed?", "No.", "Mass?", "No."]),
        ("Nodule (series 3, im. 41). 5 mm cyst.", ["Nodule (series 3, im. 41).", "5 mm cyst."]),
        ('Read as "normal." Agreed! Really?', ['Read as "normal."', "Agreed!", "Really?"]),
        ("One line\nwrapped here.\n\nA paragraph\n\nX", ["One line wrapped here.", "A paragraph", "X"]),
        ("Heart: normal. Lungs... clear.", ["Heart: normal.", "Lungs...", "clear."]),
        ("", []),
        (" \n ", []),
        (".", ["."]),
    ],
)  # fmt: skip
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@given(TEXTS)
def test_sentences_are_the_text(text: str) -> None:
    sentences = split_sentences(text)
    assert " ".join(sentences).split() == text.replace("\0", " ").split()
    assert all(sentence == " ".join(sentence.split()) != "" for sentence in sentences)
    for sentence in sentences:
        assert split_sentences(sentence) == [sentence]


@given(TEXTS)
def test_normal_text_stays(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert split_sentences(once) == split_sentences(text)


# Files


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def as_json(root: Path) -> Path:
    entries = {
        "p7": "FINDINGS: Größe normal.\nIMPRESSION: Normal.",
        "p8": ["Clear.", "Dry."],
        "p9": {"impressions": ["No", "stroke."], "report": "FINDINGS: Clear.\nIMPRESSION: other"},
    }
    return write(root / "r.json", entries)


def as_csv(root: Path) -> Path:
    return write(
        root / "r.csv",
        "\ufeffstudy,date,Report,Impressions_EN\n"
        'p7,2020,"FINDINGS: Größe normal.\nIMPRESSION: Normal.",\n'
        'p8,2021,"Clear.\nDry.",\n'
        "p9,2022,FINDINGS: Clear.  IMPRESSION: other,No stroke.\n",
    )


def as_folder(root: Path) -> Path:
    write(root / "r" / "p7.txt", "FINDINGS: Größe normal.\r\nIMPRESSION: Normal.")
    write(root / "r" / "p8.TXT", "Clear.\nDry.")
    write(root / "r" / "p9.txt", "Impression: No stroke. Findings: Clear.")
    write(root / "r" / "._p9.txt", "x")
    write(root / "r" / "notes.md", "x")
    return root / "r"


@pytest.mark.parametrize("make", [as_json, as_csv, as_folder])
def test_three_forms_of_reports(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert read_reports(make(tmp_path)) == {
        "p7": ReportText("Normal.", "Größe normal."),
        "p8": ReportText("", "Clear. Dry."),
        "p9": ReportText("No stroke.", "Clear."),
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", "{", "r.json: not a readable file of reports"),
        ("r.json", "[]", "r.json: expected an object"),
        ("r.json", {"p7": 3}, "r.json: study p7: 'report' must be a text or a list"),
        ("r.json", {"p7": {"findings": [None]}}, "r.json: study p7: 'findings' must be a text or a list"),
        ("r.json", '{"p7": "a", "p7": "b"}', "'p7' occurs twice"),
        ("r.csv", "study,x\np7,1\n", "r.csv: needs a column of impression, findings or report"),
        ("r.csv", "study,report\np7,a\np7,b\n", "r.csv: line 3: another report of study p7"),
        ("r.csv", "", "r.csv: not a readable table"),
        ("r.txt", "x", "r.txt: reports must be a .json or .csv file, or a folder"),
        ("r/x.md", "x", "r: no reports"),
    ],
)
def test_malformed_reports(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        read_reports(path.parent if name.startswith("r/") else path)


def test_reports_in_a_folder_are_files_in_utf8(tmp_path: Path) -> None:
    folder = as_folder(tmp_path)
    (folder / "p8.TXT").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"p8.TXT: not a readable report .*codec can't decode"):
        read_reports(folder)
    (folder / "p8.TXT").unlink()
    (folder / "p8.txt").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"p8.txt: a report must be a file, not a link"):
        read_reports(folder)


# Labels


def test_labels_are_the_columns_of_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "l.csv",
        "AccessionNumber,study,stroke,Patient ID,note,birth_date,empty,mass volume\n"
        "17,p8,1,3,,19500101,,2.5e1\n"
        "18,p7,0,4,n/a,19500102,,\n",
    )
    assert Table.read(path).labels() == {"p8": {"stroke": 1.0}, "p7": {"stroke": 0.0}}
    assert Table.read(path).labels((), ["mass volume", "stroke"]) == {
        "p8": {"stroke": 1.0, "mass volume": 25.0},
        "p7": {"stroke": 0.0},
    }


def test_volumes_of_a_study_share_its_labels(tmp_path: Path) -> None:
    rows = "valid_1_a_1.nii.gz,1\nvalid_1_a_2.nii.gz,1\nvalid_1_b_1.nii.gz,0\ntrn00001.npz,0\n"
    path = write(tmp_path / "l.csv", "VolumeName,Nodule\n" + rows)
    assert {uid: labels["Nodule"] for uid, labels in Table.read(path).labels().items()} == {
        "valid_1_a": 1.0,
        "valid_1_b": 0.0,
        "trn00001.npz": 0.0,
    }
    write(path, "VolumeName,Nodule\nvalid_1_a_1.nii.gz,1\nvalid_1_a_2.nii.gz,0\n")
    assert Table.read(path).labels() == {"valid_1_a": {}}
    with pytest.raises(ValueError, match=r"l.csv: line 3: another labels of study valid_1_a"):
        Table.read(path).labels((), ["Nodule"])


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"impresion": "x"}, "unknown field 'impresion'; did you mean impression"),
        ({"Findings_EN": "x", "findngs": "y"}, "unknown field 'findngs'"),
        ({"findings": "x", "Findings_EN": "y"}, "'findings' and 'Findings_EN' are the same section"),
    ],
)
def test_misspelt_and_repeated_sections(entry: dict[str, str], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"p7": entry}))
    with pytest.raises(ValueError, match=f"r.json: study p7: {reason}"):
        read_reports(path)


def test_two_columns_of_one_section_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("study,Findings,Findings_EN\np7,x,y\n")
    with pytest.raises(ValueError, match="are the same section"):
        read_reports(path)
