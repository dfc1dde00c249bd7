"""Linear layers in bfloat16 on CPUs with AMX, by the native library (`hlip_kernels.native`).

Shapes: R rows, C and D widths.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import native, scratch

TILE = 1024  # bytes


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
        *((name, ctypes.c_void_p) for name in ("hidden", "active")),
    )


class _WeightGradient(ctypes.Structure):
    """`struct WeightGradient` of product.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "x", "weight", "bias", "scratch")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("inner", "columns", "add", "threads")),
    )


def available() -> bool:
    return native().isa == "amx"


def tiles_shape(inner: int, columns: int) -> tuple[int, int]:
    """Of the tiles of a weight that makes `columns` values of `inner`."""
    return -(-columns // 32), -(-inner // 32) * 2 * TILE


def pack(weight: Tensor, transposed: bool) -> Tensor:
    """The tiles of a bfloat16 weight (D, C) that makes D values of C, or, `transposed`, C of D."""
    library = native().library
    assert library is not None
    weight = weight.contiguous()
    inner, columns = weight.shape if transposed else weight.shape[::-1]
    tiles = torch.empty(tiles_shape(inner, columns), dtype=torch.uint8)
    library.hlip_pack_weight(
        *(ctypes.c_void_p(x.data_ptr()) for x in (weight, tiles)), inner, columns, transposed, torch.get_num_threads()
    )
    return tiles


def layers(x: Tensor, tiles: Sequence[Tensor], biases: Sequence[Tensor], columns: Sequence[int], gelu: bool) -> Tensor:
    """One linear layer or two, with a GELU between, of bfloat16 rows x (R, C): (R, D), and its GELU if `gelu`.

    Args:
        biases: of each layer, or none.
        columns: D of each layer.
    """
    return _product(x, tiles, biases, columns, gelu=gelu)


def mlp(x: Tensor, tiles: Sequence[Tensor], biases: Sequence[Tensor], columns: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Two layers as in `layers`; and the rows between them, before the GELU."""
    hidden = x.new_empty(len(x), columns[0])
    return _product(x, tiles, biases, columns, hidden=hidden), hidden


def hidden_gradient(grad: Tensor, tiles: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(hidden) (R, D), and the gradient of `hidden` from that of layer(gelu(hidden)), (R, C).

    Args:
        tiles: of the layer's weight, as it makes D values of C.
    """
    hidden = hidden.contiguous()
    active = torch.empty_like(hidden)
    return active, _product(grad, [tiles], [], [hidden.shape[1]], hidden=hidden, active=active)


def _product(
    x: Tensor,
    tiles: Sequence[Tensor],
    biases: Sequence[Tensor],
    columns: Sequence[int],
    gelu: bool = False,
    hidden: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    library = native().library
    assert library is not None
    library.hlip_product_scratch.restype = ctypes.c_int64
    x, biases = x.contiguous(), [bias.to(torch.float32).contiguous() for bias in biases]
    y = x.new_empty(len(x), columns[-1])
    call = _Product(x.data_ptr(), y.data_ptr(), rows=len(x), gelu=gelu, threads=torch.get_num_threads())
    for i, (name, given) in enumerate(zip(("first", "second"), (x.shape[1], *columns[:-1]), strict=False)):
        bias = biases[i].data_ptr() if biases else None
        setattr(call, name, _Layer(tiles[i].data_ptr(), bias, given, columns[i]))
    call.hidden, call.active = (None if t is None else t.data_ptr() for t in (hidden, active))
    call.scratch, memory = scratch(library.hlip_product_scratch(ctypes.byref(call)))
    library.hlip_product(ctypes.byref(call))
    del memory  # not before
    return y


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, add: bool) -> None:
    """Writes, or adds, to float32 weight (D, C) and bias (D) what bfloat16 grad (R, D) and x (R, C) give them."""
    library = native().library
    assert library is not None
    library.hlip_weight_gradient_scratch.restype = ctypes.c_int64
    grad, x = grad.contiguous(), x.contiguous()
    call = _WeightGradient(
        *(t.data_ptr() for t in (grad, x, weight, bias)), rows=len(x), inner=x.shape[1], columns=grad.shape[1],
        add=add, threads=torch.get_num_threads(),
    )  # fmt: skip
    call.scratch, memory = scratch(library.hlip_weight_gradient_scratch(ctypes.byref(call)))
    library.hlip_weight_gradient(ctypes.byref(call))
    del memory  # not before
