"""Plain values from files that others made: JSON, YAML, tensors and arrays, of which nothing is ever run.

What is hostile is refused before it takes memory or time: pipes and devices, nesting without an end, values that repeat
themselves, archives that inflate, tensors that are larger than their data. Functions raise `OSError` or `ValueError`
with the reason alone; callers add what the file was to be.
"""

from __future__ import annotations

import difflib
import errno
import json
import math
import pickle
import re
import stat
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

MOST_YAML = 2**18  # bytes, for which the parser takes seconds
MOST_TEXT = 2**24  # bytes of a report, or of one line of a table


def check_regular(path: Path) -> None:
    """Raises OSError where there is no file, or one that reading may wait on for ever, such as a pipe."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_text(path: Path, most: int | None = None) -> str:
    """A text in UTF-8, with or without a byte order mark, of at most so many bytes."""
    check_regular(path)
    if most is not None and path.stat().st_size > most:
        raise ValueError(f"more than {most} bytes")
    return path.read_text(encoding="utf-8-sig")


def read_lines(path: Path) -> Generator[str, None, None]:
    """The lines of a text with their ends, none longer than `MOST_TEXT`."""
    check_regular(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        while line := file.readline(MOST_TEXT):
            if len(line) == MOST_TEXT:
                raise ValueError(f"a line of more than {MOST_TEXT} characters")
            yield line


class _GivenTwice(ValueError):
    """Says that an object has a name twice; and, once it is known, on which line the object begins."""

    line: int | None = None

    def __str__(self) -> str:
        return super().__str__() + (f" in the object that begins on line {self.line}" if self.line else "")


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of pairs. Raises ValueError where a key stands in several, of which it could hold only one."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _GivenTwice(f"{key!r} occurs twice")
    return content


class _Locating(json.JSONDecoder):
    """The same in plain Python, which is slow, and says where an object is that has a name twice."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=unique_keys)
        self.parse_object = self._object
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _object(self, place: tuple[str, int], *rest: Any) -> Any:
        try:
            return json.decoder.JSONObject(place, *rest)  # type: ignore[attr-defined]
        except _GivenTwice as error:
            error.line = error.line or place[0].count("\n", 0, place[1]) + 1  # objects around it come later
            raise


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, whose errors are all ValueError, of objects that have no name twice."""
    try:
        try:
            return json.loads(text, object_pairs_hook=unique_keys)
        except _GivenTwice:
            return json.loads(text, cls=_Locating)  # raises it again, with its line
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> Any:
    return parse_json(read_text(path))


class _Loader(yaml.SafeLoader):
    """Of values that are written out: a few lines of references can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line}: a reference to another value (*{event.anchor}); write the value out")
        if event.tag is not None:
            raise ValueError(f"line {line}: a tag ({event.tag}); write the plain value, texts in quotes")
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
        return int(text)
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is beyond all numbers that can be held")
    return float(text)


def _value(node: yaml.Node, texts: bool) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, texts) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line}: expected a name before the colon, got a list or names with values")
            if key.value in lines:
                raise ValueError(f"line {line}: {key.value!r} occurs twice, first on line {lines[key.value]}")
            lines[key.value] = line
        return {key.value: _value(value, texts) for key, value in node.value}
    assert isinstance(node, yaml.ScalarNode)
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
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _value(node, texts)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, OverflowError, IndexError) as error:
        raise ValueError(str(error)) from error  # tokens that are none raise the others


def read_yaml(path: Path, texts: bool = False) -> Any:
    """What `parse_yaml` makes of a file of at most `MOST_YAML` bytes."""
    return parse_yaml(read_text(path, MOST_YAML), texts)


def as_texts(value: object, what: str = "texts", least: int = 1) -> list[str]:
    """A list of texts, of which one may stand alone.

    Raises:
        ValueError: fewer than `least`, or something else than texts, such as the number that stands for an empty cell.
    """
    if isinstance(value, str):
        return [value]
    unordered = isinstance(value, (bytes, Mapping, Set))
    texts = list(value) if isinstance(value, Iterable) and not unordered else None
    if texts is None or len(texts) < least:
        raise ValueError(f"{what}: expected a text or a list of texts, got {value!r}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{what}: expected a text at place {i} of the list, got {text!r}")
    return texts


def hint(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown name: those that are like it, or else all."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(known)}"


def check_keys(content: Iterable[str], known: Collection[str], also: bool = False) -> None:
    """Raises ValueError at a name that is not among the known ones; with `also`, only if it looks like one misspelt."""
    for name in content:
        if name not in known and (not also or difflib.get_close_matches(name.lower(), known, 1, 0.8)):
            raise ValueError(f"unknown field {name!r}{hint(name, known)}")


def load_tensors(path: Path, checksums: bool = False) -> Any:
    """Tensors and plain values that `torch.save` wrote, mapped to memory where the form of the file allows.

    checksums: compare those that the file has, which torch does not; older forms, without any, are refused.
    """
    check_regular(path)
    try:
        packed = zipfile.is_zipfile(path)
        if packed:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("compressed within, as torch.save leaves no file")
                if checksums and (damaged := archive.testzip()):
                    raise ValueError(f"the checksum of {damaged} differs")
        elif checksums:
            raise ValueError("truncated, or without checksums")
        elif tarfile.is_tarfile(path):  # torch would unpack it first
            raise ValueError("a tar archive, as torch.save wrote before 0.1.10; save it again with a later PyTorch")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds more than weights, {found[1]}" if found else "truncated, or not made by torch.save"
        raise ValueError(f"{reason}; nothing of it was run") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def is_whole(tensor: Tensor) -> bool:
    """Whether a dense tensor holds as many numbers as its shape has: repeating one, a few bytes can pose as any."""
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


def load_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a .npz file, none of them of objects."""
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > 100 * path.stat().st_size:
                raise ValueError("it inflates to more than 100 times its size")
        with np.load(path, allow_pickle=False) as content:
            arrays = dict(content)
        for name, value in arrays.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufUS":
                raise ValueError(f"{name} is no array of numbers or texts")
            if value.dtype.kind == "U":  # of which NumPy makes strings without a look at every character
                characters = np.frombuffer(value.tobytes(), np.dtype(np.uint32).newbyteorder(value.dtype.byteorder))
                if characters.max(initial=0) > sys.maxunicode:
                    raise ValueError(f"{name} holds what is no character")
        return arrays
    except Exception as error:  # numpy's parser of headers raises many kinds
        raise ValueError(str(error) or type(error).__name__) from error
