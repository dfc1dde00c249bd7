"""The C interface as Python sees it: the structures and functions of the headers in `src`, and whether a library has
them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from itertools import takewhile
from pathlib import Path
from typing import Any

ISAS = ("scalar", "avx2", "avx512", "amx")  # as `HLIP_GENERIC` and the next of attention.h number them
# A number for the text of the headers, comments too, as setup.py makes it: a library built from others has another.
ABI = 0x7478A2084AFE7EC


class Attention(ctypes.Structure):
    """`struct Attention` of attention.h."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in (
                "q", "k", "v", "q_bounds", "k_bounds", "q_used", "k_used",
                "out", "lse", "grad_out", "grad_q", "grad_k", "grad_v", "scratch",
            )
        ),
        *((name, c_int64) for name in ("q_rows", "k_rows", "q_stride", "k_stride", "grad_q_stride", "grad_k_stride")),
        *((name, c_int32) for name in ("groups", "heads", "head_dim", "bfloat16", "threads")),
        ("softmax_scale", c_float),
    )  # fmt: skip


class Norm(ctypes.Structure):
    """`struct Norm` of norm_gelu.h."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in (
                "residual", "update", "path_scale", "layer_scale", "weight", "bias", "src", "dst", "children",
                "x", "y", "mean", "rstd", "grad_x", "grad_y", "grad_residual", "grad_update", "partial", "sums",
            )
        ),
        ("tokens", c_int64),
        *((name, c_int32) for name in ("src_groups", "dst_groups", "num_prefix", "width")),
        *((name, c_int32) for name in ("bfloat16_x", "bfloat16_y", "threads")),
        ("eps", c_float),
    )  # fmt: skip


class Gelu(ctypes.Structure):
    """`struct Gelu` of norm_gelu.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "y", "grad")),
        ("size", c_int64),
        *((name, c_int32) for name in ("bfloat16", "threads")),
    )


class Layer(ctypes.Structure):
    """`struct Layer` of linear.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("tiles", "bias")),
        *((name, c_int32) for name in ("inner", "columns")),
    )


class Product(ctypes.Structure):
    """`struct Product` of linear.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "y", "scratch")),
        ("rows", c_int64),
        *((name, Layer) for name in ("first", "second")),
        *((name, c_int32) for name in ("gelu", "threads")),
        *((name, c_void_p) for name in ("hidden", "active")),
    )


class WeightGradient(ctypes.Structure):
    """`struct WeightGradient` of linear.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("grad", "x", "weight", "bias", "scratch")),
        ("rows", c_int64),
        *((name, c_int32) for name in ("inner", "columns", "add", "threads")),
    )


STRUCTURES = (Attention, Norm, Gelu, Layer, Product, WeightGradient)  # in the order of abi.cpp
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # name -> type of its result, and of its arguments
    "hlip_abi": (POINTER(c_int64), []),
    "hlip_isa": (c_int32, []),
    "hlip_attention_scratch": (c_int64, [POINTER(Attention), c_int32, c_int32]),
    "hlip_attention": (c_int32, [POINTER(Attention), c_int32, c_int32]),
    "hlip_norm_blocks": (c_int64, [POINTER(Norm)]),
    "hlip_norm": (c_int32, [POINTER(Norm), c_int32, c_int32]),
    "hlip_gelu": (None, [POINTER(Gelu), c_int32]),
    "hlip_pack_weight": (None, [c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "hlip_product_scratch": (c_int64, [POINTER(Product)]),
    "hlip_product": (None, [POINTER(Product)]),
    "hlip_weight_gradient_scratch": (c_int64, [POINTER(WeightGradient)]),
    "hlip_weight_gradient": (None, [POINTER(WeightGradient)]),
}


def load(path: Path) -> ctypes.CDLL:
    """The library, its functions declared.

    Raises:
        OSError: the file is not a library for this machine, or not whole.
        ValueError: it was not built from these headers.
    """
    if _is_cut(path):  # the loader would map what is not there, and the process would end
        raise OSError(f"{path}: file too short")
    library = ctypes.CDLL(str(path))
    expected = [ABI, len(ISAS), *map(ctypes.sizeof, STRUCTURES)]
    numbers = []
    if hasattr(library, "hlip_abi"):
        library.hlip_abi.restype = FUNCTIONS["hlip_abi"][0]
        numbers = list(takewhile(bool, library.hlip_abi()))
    if numbers != expected:
        raise ValueError(f"{path}: built from other sources (expected {_in_hex(expected)}, got {_in_hex(numbers)})")
    for name, (result, arguments) in FUNCTIONS.items():
        if function := getattr(library, name, None):  # products are for x86 only
            function.restype, function.argtypes = result, arguments
    return library


def _is_cut(path: Path) -> bool:
    """Whether the table of sections, at the end of a 64-bit ELF file, reaches beyond the file."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02" or len(header) < 64:
        return False
    start, size, count = (int.from_bytes(header[at:end], "little") for at, end in ((40, 48), (58, 60), (60, 62)))
    return start + size * count > path.stat().st_size


def _in_hex(numbers: list[int]) -> str:
    return "interface " + " ".join(f"{number:x}" for number in numbers) if numbers else "no interface number"
