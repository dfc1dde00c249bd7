"""Linear layers in bfloat16 on CPUs with AMX, by the native library (`hlip_kernels.native`).

Shapes: R rows, C and D widths.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import native, scratch

LINE = 64  # bytes to which tiles are aligned


class Tiles(NamedTuple):
    """A weight as the library multiplies with it. memory: its tiles. inner, columns: widths of what it is given, and of
    what it gives."""

    memory: Tensor
    inner: int
    columns: int


class _Layer(ctypes.Structure):
    """`struct Layer` of product.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tiles", "bias")),
        *((name, ctypes.c_int32) for name in ("inner", "columns")),
    )


class _Product(ctypes.Structure):
    """`struct Product` of product.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "scratch")),
        ("rows", ctypes.c_int64),
        *((name, _Layer) for name in ("first", "second")),
        *((name, ctypes.c_int32) for name in ("gelu", "threads")),
    )


def available() -> bool:
    return native().isa == "amx"


def pack(weight: Tensor, transposed: bool = False) -> Tiles:
    """Of a bfloat16 weight (D, C) that gives D values for C, or, `transposed`, C for D."""
    library = native().library
    assert library is not None
    library.hlip_weight_bytes.restype = ctypes.c_int64
    weight = weight.detach().contiguous()
    inner, columns = weight.shape if transposed else reversed(weight.shape)
    widths = ctypes.c_int64(inner), ctypes.c_int64(columns)
    memory = torch.empty(library.hlip_weight_bytes(*widths) + LINE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % LINE :]
    library.hlip_pack_weight(
        ctypes.c_void_p(weight.data_ptr()), *widths, int(transposed), ctypes.c_void_p(memory.data_ptr()),
        torch.get_num_threads(),
    )  # fmt: skip
    return Tiles(memory, inner, columns)


def product(x: Tensor, weight: Tiles, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x @ weight.T + bias of bfloat16 rows (R, C) to (R, D), and its GELU if `gelu`."""
    return _run(x, [(weight, bias)], gelu)


def mlp(x: Tensor, weight1: Tiles, bias1: Tensor, weight2: Tiles, bias2: Tensor) -> Tensor:
    """gelu(x @ weight1.T + bias1) @ weight2.T + bias2 of bfloat16 rows. The hidden rows do not go to memory."""
    return _run(x, [(weight1, bias1), (weight2, bias2)], gelu=False)


def _run(x: Tensor, layers: list[tuple[Tiles, Tensor | None]], gelu: bool) -> Tensor:
    library = native().library
    assert library is not None
    library.hlip_product_scratch.restype = ctypes.c_int64
    x, biases = x.contiguous(), [None if bias is None else bias.float().contiguous() for _, bias in layers]
    y = x.new_empty(len(x), layers[-1][0].columns)
    call = _Product(
        x.data_ptr(),
        y.data_ptr(),
        rows=len(x),
        gelu=gelu,
        threads=torch.get_num_threads(),
    )
    for name, (weight, _), bias in zip(("first", "second"), layers, biases, strict=False):
        address = None if bias is None else bias.data_ptr()
        setattr(call, name, _Layer(weight.memory.data_ptr(), address, weight.inner, weight.columns))
    call.scratch, memory = scratch(library.hlip_product_scratch(ctypes.byref(call)))
    library.hlip_product(ctypes.byref(call))
    del memory  # not before
    return y
