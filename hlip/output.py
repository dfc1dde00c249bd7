"""Files that are written whole, and what goes into them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import filelock

from .terminal import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Spreadsheets run a cell that begins so as a formula, some of them behind spaces. Numbers they only read.
FORMULA = re.compile(r"'*(\s*[=+\-@＝＋－＠].|[\t\r\n])", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@contextlib.contextmanager
def replacing(path: Path, work: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path for a file that takes the place of `path` once it is whole and safely on disk.

    work: a folder on the same file system for the temporary file; else it lies beside `path`, hidden.
    """
    name = f"{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    partial = path.with_name(f".{name}") if work is None else work / name
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        with contextlib.suppress(OSError):  # some systems sync no folders; the file is in its place
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file whole or not at all. A link within its folder stays, and what it points to is written; the file
    takes the place of a link that leads out, which whoever made the folder may have left there.

    Raises:
        ValueError: there is something else than a file, such as a folder or a device.
    """
    folder, target = path.parent.resolve(), path.resolve()
    path = target if target.is_relative_to(folder) else folder / path.name
    if path.exists() and not path.is_symlink() and not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON to be read by people too, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `folder`, or of what it links to, once it is whole."""
    folder = folder.resolve()
    name = f".{folder.name}.{uuid.uuid4().hex[:8]}"
    partial, old = folder.with_name(f"{name}.tmp"), folder.with_name(f"{name}.old")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock file, which is made where there is none. Raises ValueError with `message` if another process does."""
    try:
        held = filelock.FileLock(path, timeout=0).acquire()
    except filelock.Timeout as error:
        raise ValueError(message) from error
    with held:
        yield


def check_writable(path: Path) -> None:
    """Raises ValueError where no file could be written at `path`, or into a folder of that name; leaves nothing."""
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{path}: {nearest} cannot be written to ({error.strerror})") from error


def check_folder(path: Path) -> None:
    """Raises ValueError where `path` is no folder that results could be written into, nor can be made one."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a folder")
    check_writable(path)


def label(text: str) -> str:
    """A text as matplotlib draws it: dollars are no mathematics, and letters that its font has not are escaped."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(
        c if c.isspace() or font.get_char_index(ord(c)) else c.encode("unicode_escape").decode()
        for c in visible(text, "\n")
    ).replace("$", r"\$")


def shown_name(given: Path | str) -> str:
    """What a file or folder is called, without where it lies, as results are shared; a name on the hub as it is."""
    prefix, sign, behind = str(given).partition(":")
    for before, path in (("", str(given)), (prefix + sign, behind)):  # open_clip:FOLDER
        if path and (Path(path).is_absolute() or os.path.lexists(path)):
            return before + Path(os.path.normpath(Path(path).absolute())).name
    return str(given)


def table(rows: Iterable[Sequence[object]]) -> list[str]:
    """Rows of cells as lines of text, in columns."""
    cells = [[visible(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table whole or not at all."""
    write_whole(path, lambda file: file.write(csv_text(rows)))


def csv_text(rows: Iterable[Sequence[Any]]) -> bytes:
    """A table as CSV in UTF-8. A text that a spreadsheet would run gets an apostrophe in front of it, which says that
    it is text, and which `Table.read` takes away; so does one that has such an apostrophe already."""
    return "".join(map(_line, rows)).encode("utf-8", "backslashreplace")


def _line(row: Sequence[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(map(_harmless, row))  # quotes what has either of the two
    return text.getvalue().removesuffix("\r\n") + "\n"


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell) else cell


def new_figure(width: float, height: float) -> Figure:
    """An empty matplotlib figure, in inches, for files alone: no window and no state is shared.

    Raises:
        ImportError: no matplotlib, or no Pillow, without which matplotlib cannot be imported.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib and Pillow ({error}): pip install 'hlip-kernels[viz]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
