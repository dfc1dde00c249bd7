"""What lies in a folder, and what files are called.

A `ScanError` for a file that cannot be used is returned, not raised: the rest goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from .safe import hint
from .scan import ScanError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
TENSOR_SUFFIX = ".pt"

Kind = Literal["nifti", "dicom", "tensor"]
Progress = Callable[..., Iterable]  # called as tqdm is: (iterable, total=, desc=, unit=)
Item = TypeVar("Item")
Result = TypeVar("Result")
# False, too, where a name is too long or one may not look
is_file, is_folder = os.path.isfile, os.path.isdir


def silent(items: Iterable[Item], **_: Any) -> Iterable[Item]:
    """A `Progress` that shows nothing."""
    return items


def kind_of(path: Path | str) -> Kind | None:
    """By the name; None if the content must say."""
    name = str(path).lower()
    if name.endswith(NIFTI_SUFFIXES):
        return "nifti"
    return "tensor" if name.endswith(TENSOR_SUFFIX) else None


def stem(name: str) -> str:
    """A file's name without the suffix of an image."""
    return re.sub(r"(?i)\.(nii(\.gz)?|pt)$", "", name)


def printable(text: str) -> str:
    """The text in one Unicode form, with escapes for what cannot be printed or encoded."""
    if text.isascii() and text.isprintable():
        return text
    text = unicodedata.normalize("NFC", text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def why(error: Exception) -> str:
    """An error in words, without the path that `OSError` adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def near(path: Path) -> str:
    """Names beside a missing path that are close to its own, as words to add to an error."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    return hint(path.name, names, ())


def walk(root: Path) -> tuple[list[str], list[ScanError]]:
    """All files below a folder in sorted order, and what could not be entered.

    Hidden files and folders are passed by. A link to a file within the folder counts as that file, unless the file
    itself is found; any other link is an error, so that links can neither loop nor lead out.
    """
    home = root.resolve()
    files, problems, folders = [], [], [str(root)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink():
                        reason = _link(Path(entry.path), home)
                        if reason:
                            problems.append(ScanError(entry.path, reason, "link"))
                        elif reason is None:
                            files.append(entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        files.append(entry.path)
                    else:
                        problems.append(ScanError(entry.path, "not a regular file"))
        except OSError as error:
            problems.append(ScanError(folder, f"the folder cannot be read ({why(error)})"))
    return sorted(files), sorted(problems, key=str)


def _link(path: Path, home: Path) -> str | None:
    """None if the link stands for a file, the reason if it is refused, "" if its file is found anyway."""
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: the link leads to itself
        return "the link leads nowhere"
    if not target.is_relative_to(home):
        return "the link leads out of the folder"
    if not stat.S_ISREG(mode):
        return "the link leads to a folder or device"
    return None if any(name.startswith(".") for name in target.relative_to(home).parts) else ""


def in_runs(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    per_job: int,
    workers: int,
    progress: Progress,
    **words: str,
) -> Iterator[Result]:
    """`function` of all items, in so many processes, which take them in runs. Keeps their order."""
    if not items:
        return
    workers = min(workers, -(-len(items) // per_job))
    if workers <= 1:
        yield from progress(map(function, items), total=len(items), **words)
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield from progress(pool.map(function, items, chunksize=per_job), total=len(items), **words)
    finally:
        pool.shutdown(cancel_futures=True)
