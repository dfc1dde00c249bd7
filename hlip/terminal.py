"""What programs print, with everything made visible that a terminal would obey: names and texts come from anyone."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import sys
import traceback
import unicodedata
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

JOINERS = "\u200c\u200d"  # spell words of some scripts, and move nothing
LAYOUT = "\n\r\t"  # of a stream: its lines, and tqdm's way back to the start of one
MOVES = re.compile(r"\n*(\x1b\[A)*")  # tqdm's way from bar to bar, which it writes by itself


def visible(text: str, keep: str = "") -> str:
    r"""The text with escapes, such as `\x1b`, for what a terminal would obey, hide or refuse to encode.

    These are controls, line breaks too, marks that turn the direction of writing, and lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _is_obeyed(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_obeyed(c: str) -> bool:
    kind = unicodedata.category(c)
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and c not in JOINERS)


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, each of which stays one whatever names are in it."""
    for line in lines:
        print(visible(str(line)), file=file or sys.stdout, flush=file is not None)


class _Visible:
    """A stream of text that writes all but line breaks and tabs visibly, in letters that its encoding has."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        shown = text if MOVES.fullmatch(text) else visible(text, LAYOUT)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class VisibleFormatter(logging.Formatter):
    """A format whose arguments, names and texts of anyone, are visible and end no line."""

    def format(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)
        if isinstance(record.args, tuple):
            shown.args = tuple(arg if isinstance(arg, (int, float)) else visible(str(arg)) for arg in record.args)
        return super().format(shown)


def guard_streams() -> None:
    """Make visible what this process prints and logs from now on, by whichever library."""
    if logging.lastResort is not None:  # which writes the log of a program that sets up none
        logging.lastResort.setFormatter(VisibleFormatter())
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Visible):
            setattr(sys, name, _Visible(stream))


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """As `guard_streams`, for a while; also for the error that ends it, which the interpreter prints later."""
    before = sys.stdout, sys.stderr
    guard_streams()
    try:
        yield
    except Exception:
        sys.excepthook = _show_error
        raise
    finally:
        sys.stdout, sys.stderr = before


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _Visible(sys.__stderr__ or sys.stderr).write("".join(traceback.format_exception(kind, error, trace)))
