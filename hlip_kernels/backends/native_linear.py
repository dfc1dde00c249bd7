"""Linear layers in bfloat16 on CPUs with AMX, by the native library (`hlip_kernels.native`).

Shapes: R rows, C and D widths.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..native import native, scratch
from ..native.interface import Layer, Product, WeightGradient
from ..ops import define
from .base import check_tensor

TILE = 1024  # bytes
CPU = torch.device("cpu")


def available() -> bool:
    return native().isa == "amx"


def tiles_shape(inner: int, columns: int) -> tuple[int, int]:
    """Of the tiles of a weight that makes `columns` values of `inner`."""
    panels, steps = (max(1, -(-width // 32)) for width in (columns, inner))
    return panels, steps * 2 * TILE


def pack(weight: Tensor, transposed: bool) -> Tensor:
    """The tiles of a bfloat16 weight (D, C) that makes D values of C, or, `transposed`, C of D."""
    check_tensor("weight", weight, (len(weight), weight.shape[-1]), CPU, torch.bfloat16)
    library = _library()
    weight = weight.contiguous()
    inner, columns = weight.shape if transposed else weight.shape[::-1]
    tiles = torch.empty(tiles_shape(inner, columns), dtype=torch.uint8)
    library.hlip_pack_weight(
        *(x.data_ptr() for x in (weight, tiles)), inner, columns, transposed, torch.get_num_threads()
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
    return active, _product(grad, [tiles], [], [hidden.shape[-1]], hidden=hidden, active=active)


def _product(
    x: Tensor,
    tiles: Sequence[Tensor],
    biases: Sequence[Tensor],
    columns: Sequence[int],
    gelu: bool = False,
    hidden: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    x, biases = x.contiguous(), [bias.to(torch.float32).contiguous() for bias in biases]
    check_tensor("x", x, (len(x), x.shape[-1]), CPU, torch.bfloat16)
    if not 0 < len(tiles) == len(columns) <= 2 or len(biases) not in (0, len(tiles)):
        raise ValueError(f"expected one layer or two, got {len(tiles)} tiles, {len(biases)} biases, {columns=}")
    for rows in (hidden, active):
        check_tensor("hidden", rows, (len(x), columns[0]), CPU, torch.bfloat16)
    y = x.new_empty(len(x), columns[-1])
    call = Product(x.data_ptr(), y.data_ptr(), rows=len(x), gelu=gelu, threads=torch.get_num_threads())
    for i, (name, given) in enumerate(zip(("first", "second"), (x.shape[1], *columns[:-1]), strict=False)):
        check_tensor("tiles", tiles[i], tiles_shape(given, columns[i]), CPU, torch.uint8)
        check_tensor("bias", biases[i] if biases else None, (columns[i],), CPU, torch.float32)
        if not tiles[i].is_contiguous() or tiles[i].data_ptr() % 64:
            raise ValueError("tiles: expected contiguous memory, aligned to 64 bytes, as `pack` makes it")
        setattr(call, name, Layer(tiles[i].data_ptr(), biases[i].data_ptr() if biases else None, given, columns[i]))
    library = _library()
    call.hidden, call.active = (None if t is None else t.data_ptr() for t in (hidden, active))
    call.scratch, memory = scratch(library.hlip_product_scratch(ctypes.byref(call)))
    library.hlip_product(ctypes.byref(call))
    del memory  # not before
    return y


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, add: bool) -> None:
    """Writes, or adds, to float32 weight (D, C) and bias (D) what bfloat16 grad (R, D) and x (R, C) give them."""
    grad, x = grad.contiguous(), x.contiguous()
    check_tensor("grad", grad, (len(grad), grad.shape[-1]), CPU, torch.bfloat16)
    check_tensor("x", x, (len(grad), x.shape[-1]), CPU, torch.bfloat16)
    check_tensor("weight", weight, (grad.shape[1], x.shape[1]), CPU, torch.float32)
    check_tensor("bias", bias, grad.shape[1:], CPU, torch.float32)
    if not (weight.is_contiguous() and bias.is_contiguous()):
        raise ValueError(f"weight and bias: expected contiguous memory, got strides {weight.stride()}, {bias.stride()}")
    library = _library()
    call = WeightGradient(
        *(t.data_ptr() for t in (grad, x, weight, bias)), rows=len(x), inner=x.shape[1], columns=grad.shape[1],
        add=add, threads=torch.get_num_threads(),
    )  # fmt: skip
    call.scratch, memory = scratch(library.hlip_weight_gradient_scratch(ctypes.byref(call)))
    library.hlip_weight_gradient(ctypes.byref(call))
    del memory  # not before


def _library() -> ctypes.CDLL:
    library, isa, reason = native()
    if library is None or isa != "amx":
        raise ValueError(reason or f"the products of the native library need AMX, this processor has {isa}")
    return library


# The ops, which are called where no graph is made: see `products`.


def _tiles_fake(weight: Tensor, transposed: bool) -> Tensor:
    inner, columns = weight.shape if transposed else weight.shape[::-1]
    return weight.new_empty(tiles_shape(inner, columns), dtype=torch.uint8)


def _layers_fake(x: Tensor, tiles: list[Tensor], biases: list[Tensor], columns: list[int], gelu: bool) -> Tensor:
    return x.new_empty(x.shape[0], columns[-1])


def _mlp_fake(x: Tensor, tiles: Any, biases: Any, columns: list[int]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], columns[1]), x.new_empty(x.shape[0], columns[0])


def _hidden_gradient_fake(grad: Tensor, tiles: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


def _layers_flops(x: Tensor, tiles: Any, biases: Any, columns: Sequence[int], *_: Any, out_val: Any) -> int:
    return sum(2 * len(x) * inner * outer for inner, outer in pairwise((x.shape[1], *columns)))


def _hidden_gradient_flops(grad: Tensor, tiles: Any, hidden: Tensor, *, out_val: Any) -> int:
    return 2 * grad.numel() * hidden.shape[1]


def _weight_gradient_flops(grad: Tensor, x: Tensor, *_: Any, out_val: Any) -> int:
    return 2 * grad.numel() * x.shape[1]


define("amx_tiles", "Tensor weight, bool transposed", "Tensor", pack, _tiles_fake)
define(
    "amx_layers",
    "Tensor x, Tensor[] tiles, Tensor[] biases, int[] columns, bool gelu",
    "Tensor",
    layers,
    _layers_fake,
    _layers_flops,
)
define(
    "amx_mlp",
    "Tensor x, Tensor[] tiles, Tensor[] biases, int[] columns",
    "(Tensor out, Tensor hidden)",
    mlp,
    _mlp_fake,
    _layers_flops,
)
define(
    "amx_hidden_gradient",
    "Tensor grad, Tensor tiles, Tensor hidden",
    "(Tensor active, Tensor grad_hidden)",
    hidden_gradient,
    _hidden_gradient_fake,
    _hidden_gradient_flops,
)
define(
    "amx_weight_gradient",
    "Tensor grad, Tensor x, Tensor(a!) weight, Tensor(b!) bias, bool add",
    "()",
    weight_gradient,
    lambda *_: None,
    _weight_gradient_flops,
)
