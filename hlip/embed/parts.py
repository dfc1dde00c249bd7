"""Finished parts of a job, so that one that is broken off goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..output import locked, write_text, write_whole
from ..processes import Processes
from ..read.paths import check_within
from ..read.safe import MOST_SETTINGS, read_json
from .table import Embeddings


def parts_of(out: Path) -> Path:
    """Where a job keeps what is finished."""
    return out.with_name(f"{out.name}.parts")


def holds(out: Path, job: dict[str, Any]) -> bool:
    """Whether a file is what the job would write.

    Raises:
        ValueError: it is something else, which is not to be lost.
    """
    if not out.exists():
        return False
    known = Embeddings.read(out).facts.get("job")
    if known != job:
        raise ValueError(f"{out} is of another job ({_differ(known, job)}): remove it, or choose another name")
    return True


def _differ(known: Any, job: dict[str, Any]) -> str:
    names = [key for key in job if not isinstance(known, dict) or known.get(key) != job[key]]
    return f"{', '.join(names)} {'differs' if len(names) == 1 else 'differ'}"


class Parts:
    """The parts of a job by number: files, or in memory if there is no folder."""

    def __init__(self, path: Path | None, count: int) -> None:
        self.path, self.count = path, count
        self.memory: dict[int, Embeddings] = {}
        self.finished = {i for i in range(count) if path and self._file(i).exists()}

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path | None, job: dict[str, Any], count: int, among: Processes) -> Iterator[Parts]:
        """The folder, held by one run at a time. If the run fails before there is a part, the folder goes too.

        Raises:
            ValueError: held by another run, or of another job.
        """
        if path is None:
            yield cls(None, count)
            return
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if among.first:
                for file in (path, *path.iterdir()):
                    check_within(file, path.parent)
                stack.enter_context(locked(path / "lock", f"{path}: another run is at work here"))
                _check_job(path / "job.json", job)
            among.wait()
            parts = cls(path, count)
            try:
                yield parts
            finally:
                if among.first and not any(parts._file(i).exists() for i in range(count)):
                    parts.remove()

    def _file(self, number: int) -> Path:
        assert self.path is not None
        return self.path / f"{number:06d}.npz"

    def write(self, number: int, table: Embeddings) -> None:
        if self.path is None:
            self.memory[number] = table
            return
        write_whole(self._file(number), lambda file: table.write(file, ".npz"))

    def read(self) -> list[Embeddings]:
        """All parts, in order."""
        return [self.memory[i] if self.path is None else Embeddings.read(self._file(i)) for i in range(self.count)]

    def remove(self) -> None:
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)


def _check_job(path: Path, job: dict[str, Any]) -> None:
    try:
        known = read_json(path, MOST_SETTINGS)
    except FileNotFoundError:
        write_text(path, json.dumps(job, indent=1))
        return
    except ValueError:
        known = None
    if known != job:
        raise ValueError(
            f"{path.parent} holds parts of another job ({_differ(known, job)}): go on with that, remove the folder, or "
            "choose another name to write to"
        )
