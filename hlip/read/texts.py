"""Running text: its lines, its sentences and its items."""

from __future__ import annotations

import re

_ABBREVIATIONS = frozenset(
    [
        "approx",
        "ca",
        "cf",
        "dr",
        "drs",
        "inc",
        "incl",
        "jr",
        "mr",
        "mrs",
        "ms",
        "prof",
        "resp",
        "sr",
        "st",
        "susp",
        "vs",
    ]
)
_BEFORE_NUMBERS = frozenset(["fig", "figs", "im", "img", "no", "nos", "nr", "ser", "vol"])  # "No. 5", but "Mass? No."
_MARKER = r"(?:\(?\d{1,2}[.)]|[-*•·‣–—]|\(?(?:[ivx]{1,4}|[a-h])\))"
_LIST_ITEM = re.compile(rf"{_MARKER} ", re.IGNORECASE)
_SENTENCE_END = re.compile(r"""[.!?]+["'”’)\]]* """)


def tidy(text: str) -> str:
    """Lines without white space at their ends, and single spaces within."""
    return "\n".join(" ".join(line.split()) for line in text.replace("\0", " ").splitlines())


def normalise(text: str) -> str:
    """The text with single spaces; wrapped lines are joined.

    What remains of its lines: a list's items begin one, and blank lines part paragraphs.
    """
    pieces: list[str] = []
    fresh = True
    for line in tidy(text).split("\n"):
        if line and pieces:
            pieces.append("\n\n" if fresh else "\n" if _LIST_ITEM.match(line) else " ")
        if line:
            pieces.append(line)
        fresh = not line
    return "".join(pieces)


def split_sentences(text: str) -> list[str]:
    """The sentences of a report, in order; joined by spaces, they are the text with its white space made single.

    A sentence ends at `.`, `!` or `?` before a space, at a blank line, and where a list's item begins. Not at
    decimals ("3.5 cm"), initials ("J. Smith"), common abbreviations ("Dr.", "vs.", "e.g."), or a list's own numbers
    ("1. No mass."), which stay with their item.

    Limits: made for English. A sentence that ends in a single letter or an abbreviation runs on into the next
    ("vitamin C. No mass."), unknown abbreviations end a sentence, and one without a stop ends only with its line.
    """
    sentences = []
    for line in normalise(text).split("\n"):
        begin = 0
        for match in _SENTENCE_END.finditer(line):
            stop, end = match.start(), match.end()
            word = line[max(line.rfind(" ", begin, stop) + 1, begin) : stop]
            is_list_number = begin + len(word) == stop and _LIST_ITEM.fullmatch(f"{word}. ")
            if not is_list_number and _ends_sentence(word, line[end : end + 1]):
                sentences.append(line[begin : end - 1])
                begin = end
        sentences.append(line[begin:])
    return [sentence for sentence in sentences if sentence]


def split_items(text: str) -> list[str]:
    """The items of a report, in order: the lines that `normalise` keeps, which are paragraphs and a list's items. A
    text of one line has its sentences."""
    lines = [line for line in normalise(text).split("\n") if line]
    return lines if len(lines) > 1 else split_sentences(text)


def _ends_sentence(word: str, following: str) -> bool:
    """Whether a full stop behind `word` ends a sentence, if `following` is the first character after the space."""
    word = word.lstrip("([\"'").lower()
    if not following or (word in _BEFORE_NUMBERS and following.isdigit()):
        return False
    return word not in _ABBREVIATIONS and not re.fullmatch(r"[a-z](?:\.[a-z])*", word)
