"""Plain values from files that others made: JSON, YAML, tensors and arrays, of which nothing is ever run.

What is hostile is refused before it takes memory or time: pipes and devices, nesting without an end, values that repeat
themselves, archives that inflate, tensors that are larger than their data. Functions raise `OSError` or `ValueError`
with the reason alone; callers add what the file was to be.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import stat
import sys
import tarfile
import zipfile
from collections.abc import Generator, Mapping
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


def parse_json(text: str, **options: Any) -> Any:
    """`json.loads`, whose errors are all ValueError."""
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, **options: Any) -> Any:
    return parse_json(read_text(path), **options)


class _Loader(yaml.SafeLoader):
    """Of plain values, each written out: a few lines of references can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"a reference to another value (*{self.peek_event().anchor}); write the value out")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Plain values from YAML of at most `MOST_YAML` bytes, without references."""
    text = read_text(path, MOST_YAML)
    try:
        return _Loader(text).get_single_data()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, OverflowError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(str(error)) from error  # dates and numbers that are none raise the others


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
