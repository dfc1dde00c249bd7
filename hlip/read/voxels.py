"""What all readers do with a file, and with the numbers in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .rules import Rules, is_rescaled
from .scan import ScanError

BLOCK = 2**24  # bytes that are read and converted at a time


def check_file(path: Path) -> None:
    """Raises ScanError where there is no file, or nothing in it."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ScanError(path, "no such file", "missing") from error
    except OSError as error:
        raise ScanError(path, f"cannot be read ({error.strerror})") from error
    if not path.is_file():
        raise ScanError(path, "not a regular file")
    if size == 0:
        raise ScanError(path, "empty file")


def rescale(array: np.ndarray, slope: float, intercept: float, rules: Rules) -> np.ndarray:
    """`array * slope + intercept`, in place where its type can hold that; else as int32 or float32.

    Where `rules` want Hounsfield units and the numbers are such already, they stay as they are: many archives keep
    converted volumes under headers that ask to convert them again.
    """
    if (slope, intercept) == (1, 0) or (rules.hounsfield and is_rescaled(array, slope, intercept)):
        return array
    if array.dtype.kind in "iu" and slope == 1 and intercept == int(intercept):
        low, high = int(array.min()) + int(intercept), int(array.max()) + int(intercept)
        for kind in (array.dtype, np.dtype(np.int16), np.dtype(np.int32)):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                result = array if kind == array.dtype else np.empty_like(array, kind)
                return np.add(array, int(intercept), out=result, dtype=np.int64, casting="unsafe")
    assert array.flags.forc  # else the numbers raveled would be a copy
    flat = array.ravel("K")
    result = flat.view(np.float32) if array.itemsize == 4 else np.empty_like(flat, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(0, flat.size, BLOCK // 8):
            result[k : k + BLOCK // 8] = flat[k : k + BLOCK // 8].astype(np.float64) * slope + intercept
    return result.reshape(array.shape, order="F" if array.flags.f_contiguous else "C")
