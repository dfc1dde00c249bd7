"""Checks of a file before it is opened, and of what is written in its place."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path


def check_regular(path: Path, home: Path | None = None) -> None:
    """Raises OSError where there is no file, or one that reading may wait on for ever, such as a pipe; as
    `check_within` if `home` is given."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if home is not None:
        check_within(path, home)


def check_within(path: Path, home: Path) -> None:
    """Raises ValueError, with the path, where a link below the folder `home`, on the way to `path`, leads out of it.

    `home` may itself be a link. In the hub's cache, a snapshot's links lead to the blobs beside all snapshots.
    """
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(home))
    blobs = [above.parents[1] / "blobs" for above in (folder, *folder.parents) if above.parent.name == "snapshots"]
    if not any(map(target.is_relative_to, [folder, *blobs])):
        raise ValueError(f"{path}: a link leads out of its folder; put the file itself there, or link the whole folder")


def check_memory(path: Path) -> None:
    """As `check_regular`. Raises ValueError, too, for a file that is larger than this machine's memory, as one of holes
    may be, where the system says how much there is."""
    check_regular(path)
    if not hasattr(os, "sysconf"):
        return
    size, memory = path.stat().st_size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(f"a file of {size} bytes, where this machine has {memory} of memory")


def check_text(path: Path) -> None:
    """Raises OSError or ValueError where a file is not regular, larger than this machine's memory, or has holes, which
    are zeros that take no place on the disk: a text has none."""
    check_memory(path)
    if hasattr(os, "SEEK_HOLE"):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size and (hole := os.lseek(file.fileno(), 0, os.SEEK_HOLE)) < size:
                raise ValueError(f"a file of {size} bytes with a hole at byte {hole}, which no text has")


@contextlib.contextmanager
def usual_permissions(path: Path) -> Iterator[None]:
    """Give a new file that is written in the meantime what the umask leaves: safetensors lets nobody else read."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)
