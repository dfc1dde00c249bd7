"""Plain values from texts that others wrote, as JSON and YAML, and checks of names and numbers in them.

What is hostile is refused before it takes memory or time: nesting without an end, values that repeat themselves, texts
of any length. Functions raise `OSError` or `ValueError` with the reason alone; callers add what the file was to be.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml

from .paths import check_regular, check_text

MOST_YAML = 2**18  # bytes, for which the parser takes seconds
MOST_TEXT = 2**24  # bytes of a report, or of one line of a table
MOST_SETTINGS = 2**24  # bytes of the configuration of a model or store


@contextlib.contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Whatever is wrong with a file becomes a ValueError that names it, and what it was to be: "a readable table"."""
    try:
        yield
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not {what} ({error})") from error


def read_text(path: Path, most: int | None = None) -> str:
    """A text in UTF-8, with or without a byte order mark, of at most so many bytes, or else as the memory holds."""
    check_text(path)
    if most is not None and path.stat().st_size > most:
        raise ValueError(f"more than {most} bytes")
    try:
        return path.read_text(encoding="utf-8-sig")
    except MemoryError as error:
        raise ValueError(f"no memory for its {path.stat().st_size} bytes") from error


def read_lines(path: Path, errors: str = "strict") -> Generator[str, None, None]:
    """The lines of a text with their ends, none longer than `MOST_TEXT`; `errors` as `open` takes it."""
    check_regular(path)
    with path.open(newline="", encoding="utf-8-sig", errors=errors) as file:
        while line := file.readline(MOST_TEXT):
            if len(line) == MOST_TEXT:
                raise ValueError(f"a line of more than {MOST_TEXT} characters")
            yield line


def short(value: object) -> str:
    """A value for an error, as Python writes it, in at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than some thousand digits
        text = f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_held(number: float) -> bool:
    """Whether a number is finite, and of 64 bits if it is whole."""
    return math.isfinite(number) if isinstance(number, float) else -(2**63) <= number < 2**63


def whole_number(text: str) -> int:
    """A whole number of 64 bits.

    Raises:
        ValueError: no such number.
    """
    if len(text) > 20 or not is_held(int(text)):
        raise ValueError(f"{short(text)} is beyond the whole numbers of 64 bits")
    return int(text)


class _GivenTwice(ValueError):
    """Says that an object has a name twice."""


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of pairs. Raises ValueError where a key stands in several, of which it could hold only one."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _GivenTwice(f"{short(key)} occurs twice")
    return content


def parse_json(text: str | bytes, finite: bool = False) -> Any:
    """`json.loads`, whose errors are all ValueError, of objects that have no name twice.

    finite: refuse NaN and numbers that are infinite, which Python writes and reads otherwise, and whole ones of more
        than 64 bits.
    """
    options: dict[str, Any] = dict.fromkeys(("parse_constant", "parse_float"), finite_number) if finite else {}
    if finite:
        options["parse_int"] = whole_number
    try:
        try:
            return json.loads(text, object_pairs_hook=unique_keys, **options)
        except _GivenTwice:
            if len(text) <= MOST_YAML:
                with contextlib.suppress(yaml.YAMLError):  # JSON is YAML, but for tabs between its values
                    _value(_Loader(text).get_single_node(), texts=True)  # raises it again, with the lines
            raise
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except MemoryError as error:
        raise ValueError("no memory for its values") from error


def read_json(path: Path, most: int | None = None) -> Any:
    return parse_json(read_text(path, most))


def read_settings(path: Path) -> Any:
    """Read JSON of at most `MOST_SETTINGS` bytes whose numbers are all finite."""
    return parse_json(read_text(path, MOST_SETTINGS), finite=True)


class _Loader(yaml.SafeLoader):
    """A loader of values that are written out: a few lines of references can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line}: a reference to another value (*{event.anchor:.80}); write the value out")
        if event.tag is not None:
            raise ValueError(f"line {line}: a tag ({event.tag:.80}); write the plain value, texts in quotes")
        return super().compose_node(parent, index)


# What YAML 1.2 and JSON agree on. Of YAML 1.1 also yes, 012, 1:30, 1_000 and 2024-01-01 would be something else than
# the text that they are, and 1e-4 would be none.
_NULLS, _BOOLS = ("", "~", "null", "Null", "NULL"), {"true": True, "false": False}
_NUMBER = re.compile(r"[-+]?(?:0|[1-9][0-9]*|(?=\.[0-9]))(?P<rest>(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)")


def _scalar(text: str, texts: bool) -> Any:
    """The value of a scalar without quotes."""
    if text in _NULLS:
        return None
    if texts:
        return text
    if text in (text.lower(), text.title(), text.upper()) and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if not (number := _NUMBER.fullmatch(text)):
        return text
    if not number["rest"]:
        return whole_number(text)
    return finite_number(text)


def _value(node: Any, texts: bool) -> Any:
    """The plain values of a node of YAML."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, texts) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line}: expected a name before the colon, got a list or names with values")
            if key.value in lines:
                raise ValueError(f"line {line}: {short(key.value)} occurs twice, first on line {lines[key.value]}")
            lines[key.value] = line
        return {key.value: _value(value, texts) for key, value in node.value}
    if node.style is not None:  # in quotes, or a block of text
        return node.value
    try:
        return _scalar(node.value, texts)
    except ValueError as error:
        raise ValueError(f"line {node.start_mark.line + 1}: {error}") from error


def parse_yaml(text: str, texts: bool = False) -> Any:
    """Plain values from YAML without references and tags. Names are texts, as they are written, and none stands twice.

    texts: values are, too, but for null. Otherwise true, false and decimal numbers, as JSON has them, are no texts.
    """
    if len(text) > MOST_YAML:
        raise ValueError(f"more than {MOST_YAML} characters")
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _value(node, texts)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, OverflowError, IndexError) as error:
        raise ValueError(str(error)) from error  # tokens that are none raise the others


def read_yaml(path: Path, texts: bool = False) -> Any:
    """Read what `parse_yaml` makes of a file of at most `MOST_YAML` bytes."""
    return parse_yaml(read_text(path, MOST_YAML), texts)


def as_texts(value: object, what: str = "texts", least: int = 1) -> list[str]:
    """A list of texts, of which one may stand alone.

    Raises:
        ValueError: fewer than `least`, or something else than texts, such as the number that stands for an empty cell.
    """
    value = [value] if isinstance(value, str) else value
    unordered = isinstance(value, (bytes, Mapping, Set)) or getattr(value, "ndim", 1) != 1  # tables give column names
    texts = list(value) if isinstance(value, Iterable) and not unordered else None
    if texts is None or len(texts) < least:
        raise ValueError(f"{what}: expected a text or a list of texts, got {short(value)}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{what}: expected a text at place {i} of the list, got {short(text)}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{what}: {short(text)} has half of a character (a lone surrogate)")
    return texts


@functools.lru_cache(1024)  # entries of a list have the same names, one after another
def _alike(name: str, known: tuple[str, ...], cutoff: float) -> list[str]:
    return difflib.get_close_matches(name, known, 3, cutoff)


def hint(name: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """Words to add to an error about an unknown name: the known names that are like it, or else those in `listed`,
    which is all of them unless it is given."""
    known = tuple(known)
    close, others = _alike(name[:100], known, 0.5), ", ".join(known if listed is None else listed)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {others}" if others else ""


def check_keys(content: Iterable[str], known: Collection[str], also: bool = False) -> None:
    """Raises ValueError at a name that is not among the known ones; with `also`, only if it looks like one misspelt,
    which `report_id` and `reported` do not."""
    for name in content:
        if name not in known and not (also and _is_another(name.lower(), tuple(known))):
            raise ValueError(f"unknown field {short(name)}{hint(name, known)}")


def _is_another(name: str, known: tuple[str, ...]) -> bool:
    longer = any(name.startswith(other) and len(name) - len(other) > 1 for other in known)
    return longer or not _alike(name, known, 0.8)


def finite_number(text: str | float) -> float:
    """A number that is neither infinite nor NaN, as a setting must be; also a `type` of argparse.

    Raises:
        ValueError: no such number.
    """
    try:
        number = float(text)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {short(text)}")
    return number


def check_finite(settings: Any) -> None:
    """Raises ValueError where a field of a dataclass is, or has in it, a number that is infinite or NaN, or a whole one
    of more than 64 bits."""
    for name, value in vars(settings).items():
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, (int, float)) and not is_held(number):
                raise ValueError(f"{name} must be finite, and of 64 bits if it is whole, got {short(value)}")


def check_format(number: Any, known: int) -> None:
    """Raises ValueError where the number of a file's format is not the one that this version writes and reads."""
    if type(number) is not int or number != known:
        raise ValueError(
            f"of format {number!r:.40}; this version reads format {known}: update hlip-kernels "
            "(pip install -U hlip-kernels), or make it anew"
        )
