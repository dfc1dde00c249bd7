"""Tensors and arrays from files that others made: nothing of them is run, and they take no more than they hold.

Functions raise `OSError` or `ValueError` with the reason alone; callers add what the file was to be.
"""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .paths import check_memory, check_regular
from .pickled import Pickles

MOST_PICKLE = 2**24  # bytes, as of a hundred thousand tensors
MOST_MEMBERS = 2**15  # of an archive; torch.save makes one for each tensor
MOST_HEADER = 10**8  # bytes of a header of safetensors, which reads no more itself


def load_tensors(path: Path, checksums: bool = False) -> Any:
    """Tensors and plain values that `torch.save` wrote, mapped to memory where the form of the file allows.

    checksums: compare those that the file has, which torch does not; older forms, without any, are refused.
    """
    packed = check_tensors(path, checksums)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def check_tensors(path: Path, checksums: bool = False) -> bool:
    """Whether a file that `torch.save` wrote is a zip archive; as `load_tensors`, raises before anything is loaded."""
    check_memory(path)
    try:
        with path.open("rb") as file:
            packed = file.read(4) == b"PK\3\4"  # as torch tells the two forms
            if packed:
                _check_packed(path, checksums)
            elif checksums:
                raise ValueError("truncated, or without checksums")
            else:
                file.seek(0)
                _check_unpacked(file.read(MOST_PICKLE), path.stat().st_size)
            return packed
    except Exception as error:  # as above
        raise ValueError((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def _check_packed(path: Path, checksums: bool) -> None:
    """Check a file in the form of a zip archive."""
    with open_zip(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("compressed within, as torch.save leaves no file")
        if checksums and (damaged := archive.testzip()):
            raise ValueError(f"the checksum of {damaged} differs")
        home = next(iter(members)).partition("/")[0]  # as torch finds it
        if outside := [name for name in members if not name.startswith(f"{home}/")]:
            raise ValueError(f"{outside[0]!r:.80} outside {home!r:.80}, as torch.save leaves no file")
        data = f"{home}/data/"
        if large := [name for name in members if not name.startswith(data) and members[name].file_size > MOST_PICKLE]:
            raise ValueError(f"{large[0]!r:.80} of more than {MOST_PICKLE} bytes")
        records = {name.removeprefix(data): members[name].file_size for name in members if name.startswith(data)}
        Pickles(records).check(io.BytesIO(archive.read(f"{home}/data.pkl")))


def _check_unpacked(content: bytes, size: int) -> None:
    """Check a file in the form before PyTorch 1.6: a mark, a version, facts, the pickle itself, keys, storages."""
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(content[:512], "utf-8", "surrogateescape")  # torch would unpack it first
        raise ValueError("a tar archive, as torch.save wrote before 0.1.10; save it again with a later PyTorch")
    file, pickles = io.BytesIO(content), Pickles()
    for _ in range(5):
        pickles.check(file)
    if file.tell() + pickles.size > size:
        raise ValueError("truncated: shorter than its storages")


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive of at most `MOST_MEMBERS` files, whose directory every reader finds at the same place.

    A reader that sees another directory than this one would not see what was checked. Two files of one name, whatever
    their case and folder, are refused for the same reason; and two that share bytes, of which a few bytes could hold
    any number.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - 98, 0))
        tail = file.read().rjust(98, b"\0")
    _, entries, length, begin, comment = struct.unpack("<4s6xHIIH", tail[76:])
    end = size - 22
    if tail[56:60] == b"PK\6\7":  # its larger form
        entries, length, begin = struct.unpack("<32xQQQ", tail[:56])
        end = size - 98
        if tail[:4] != b"PK\6\6" or struct.unpack("<8xQ4x", tail[56:76]) != (end,):
            raise ValueError("truncated or damaged (its directory is not where it says)")
    if tail[76:80] != b"PK\5\6" or comment or begin + length != end:
        raise ValueError("truncated or damaged (no directory at its end)")
    if entries > MOST_MEMBERS or length > 128 * MOST_MEMBERS:
        raise ValueError(f"an archive of more than {MOST_MEMBERS} files")
    with zipfile.ZipFile(path) as archive:
        names = [member.filename.partition("/")[2].lower() or member.filename for member in archive.infolist()]
        if not names or len(set(names)) != entries:
            raise ValueError("an archive of no files, or of two of one name")
        _check_places(path, archive.infolist(), begin)
        yield archive


def _check_places(path: Path, members: list[zipfile.ZipInfo], directory: int) -> None:
    """Raises ValueError where files of a zip archive share bytes, with each other or with its directory, or where one
    that is not compressed is larger than its bytes."""
    members = sorted(members, key=lambda member: member.header_offset)
    limits = [*(member.header_offset for member in members[1:]), directory]
    with path.open("rb") as file:
        for member, limit in zip(members, limits, strict=True):
            file.seek(member.header_offset)
            mark, name, extra = struct.unpack("<4s22xHH", file.read(30).ljust(30, b"\0"))
            end = member.header_offset + 30 + name + extra + member.compress_size
            stored = member.compress_type == zipfile.ZIP_STORED
            if mark != b"PK\3\4" or end > limit or (stored and member.compress_size != member.file_size):
                raise ValueError(f"{member.filename!r:.80} shares its bytes, or has not as many as the directory says")


def load_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a .npz file, none of them of objects."""
    check_memory(path)
    try:
        with open_zip(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > 100 * path.stat().st_size:
                raise ValueError("it inflates to more than 100 times its size")
        with np.load(path, allow_pickle=False) as content:
            arrays = dict(content)
        for name, value in arrays.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufUS" or not value.itemsize:
                raise ValueError(f"{name} is no array of numbers or texts")
            if not value.size and max(value.shape) > MOST_MEMBERS:  # any number of lists of nothing
                raise ValueError(f"{name} is empty, and of shape {value.shape}")
            if value.dtype.kind == "U":  # of which NumPy makes strings without a look at every character
                characters = np.frombuffer(value.tobytes(), np.dtype(np.uint32).newbyteorder(value.dtype.byteorder))
                if characters.max(initial=0) > sys.maxunicode:
                    raise ValueError(f"{name} holds what is no character")
        return arrays
    except Exception as error:  # numpy's parser of headers raises many kinds
        if "allow_pickle" in str(error):  # NumPy recommends what would run what the file says
            raise ValueError("it holds objects, not numbers or texts alone; none was read") from error
        raise ValueError(str(error) or type(error).__name__) from error


def check_safetensors(path: Path) -> bytes:
    """The header of a file, which is JSON.

    Raises:
        ValueError: more than some `MOST_MEMBERS` tensors: a header needs no data to name any number of them, and each
            takes time to set up.
    """
    check_regular(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER:
            raise ValueError(f"truncated, or a header of {length} bytes (at most {MOST_HEADER})")
        header = file.read(length)
        if (braces := header.count(b"{")) > 4 * MOST_MEMBERS:
            raise ValueError(f"a header of {braces} entries (at most {4 * MOST_MEMBERS})")
    return header
