"""Residual add, regroup and LayerNorm, and the gradient of GELU, on CPUs by the native library (`hlip_kernels.native`).

Shapes: R rows, C width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .. import native as library
from ..native import DTYPES
from ..native.interface import ISAS, Gelu, Norm
from .base import NormBackend, Regroup, check_norm, check_tensor, shares_gradient

CPU = torch.device("cpu")


class NativeNorm(NormBackend):
    name = "native"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, update_dtype: torch.dtype) -> list[str]:
        return library.not_supported_reasons(device, dtype)

    def forward(
        self,
        residual: Tensor,
        update: Tensor,
        path_scale: Tensor | None,
        layer_scale: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        regroup: Regroup,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs: dict[str, Any] = {
            "residual": residual,
            "update": update.to(_computed(update.dtype)),
            "path_scale": _single(path_scale),
            "layer_scale": _single(layer_scale),
            "weight": _single(weight),
            "bias": _single(bias),
        }
        check_norm(regroup, len(residual), residual, inputs["update"], **inputs)
        x = residual.new_empty(len(residual) + regroup.rows_added, residual.shape[1])
        y = x.new_empty(x.shape, dtype=_computed(update.dtype))
        mean, rstd = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
        _run(regroup, x, y, eps, **inputs, x=x, y=y, mean=mean, rstd=rstd)
        return x, y.to(update.dtype), mean, rstd

    def backward(
        self,
        grad_x: Tensor | None,
        grad_y: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        update: Tensor | None,
        path_scale: Tensor | None,
        layer_scale: Tensor | None,
        weight: Tensor,
        regroup: Regroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dtype = _computed(grad_y.dtype)
        inputs: dict[str, Any] = {
            "grad_x": grad_x,
            "grad_y": grad_y.to(dtype),
            "x": x,
            "mean": mean,
            "rstd": rstd,
            "update": None if update is None else update.to(dtype),
            "path_scale": _single(path_scale),
            "layer_scale": _single(layer_scale),
            "weight": _single(weight),
        }
        src_rows = len(x) - regroup.rows_added
        check_norm(regroup, src_rows, x, inputs["grad_y"], **inputs)
        grad_residual = x.new_empty(src_rows, x.shape[1])
        shared = shares_gradient(x, grad_y, path_scale, layer_scale)
        grad_update = grad_y.new_empty(0) if shared else grad_residual.new_empty(grad_residual.shape, dtype=dtype)
        sums = x.new_empty(3, x.shape[1], dtype=torch.float32)
        outputs = {"grad_residual": grad_residual, "grad_update": None if shared else grad_update, "sums": sums}
        _run(regroup, x, inputs["grad_y"], 0.0, **inputs, **outputs)
        grad_weight, grad_bias, grad_scale = sums
        return (  # results of an op may not share memory
            grad_residual,
            grad_update.to(grad_y.dtype),
            weight.new_empty(0) if layer_scale is None else grad_scale.to(layer_scale.dtype, copy=True),
            grad_weight.to(weight.dtype, copy=True),
            grad_bias.to(weight.dtype, copy=True),
        )


def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The LayerNorm of x (R, C) in bfloat16 or float32, with the bits that `NativeNorm.forward` gave its rows."""
    y = x.new_empty(x.shape, dtype=dtype)
    vectors = {"weight": _single(weight), "bias": _single(bias)}
    check_norm(None, len(x), x, y, residual=x, **vectors)
    _run(None, x, y, eps, residual=x, **vectors, y=y)
    return y


def gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """Make the gradient of gelu(x) that of x, in its place, and return gelu(x). Both contiguous, bfloat16 or float32.

    The relative error of the normal distribution's two tails is that of rounding to float32.
    """
    functions, isa = _functions()
    check_tensor("x", x, x.shape, CPU, *DTYPES)
    check_tensor("grad", grad, x.shape, CPU, x.dtype)
    if not (x.is_contiguous() and grad.is_contiguous()):
        raise ValueError(f"x and grad: expected contiguous memory, got strides {x.stride()} and {grad.stride()}")
    y = torch.empty(x.shape, dtype=x.dtype)
    call = Gelu(
        x.data_ptr(), y.data_ptr(), grad.data_ptr(), x.numel(), x.dtype == torch.bfloat16, torch.get_num_threads()
    )
    functions.hlip_gelu(ctypes.byref(call), isa)
    return y


def _run(regroup: Regroup | None, rows_x: Tensor, rows_y: Tensor, eps: float, **tensors: Tensor | None) -> None:
    """Call the library on tensors, named as in `struct Norm`, that `check_norm` has passed.

    rows_x, rows_y: rows of dst, in the dtypes of residuals and of updates.
    """
    functions, isa = _functions()
    check_tensor("x", rows_x, rows_x.shape, CPU, *DTYPES)
    check_tensor("y", rows_y, rows_x.shape, CPU, *DTYPES)
    groups = {}
    if regroup is not None:
        tensors |= {name: getattr(regroup, name) for name in ("src", "dst", "children")}
        groups = {name: getattr(regroup, name) for name in ("src_groups", "dst_groups", "num_prefix")}
    kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}  # alive until the call is over
    call = Norm(
        **{name: t.data_ptr() for name, t in kept.items()},
        **groups,
        tokens=len(rows_x) - groups.get("dst_groups", 0) * groups.get("num_prefix", 0),
        width=rows_x.shape[1],
        bfloat16_x=rows_x.dtype == torch.bfloat16,
        bfloat16_y=rows_y.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        eps=eps,
    )
    backward = "grad_residual" in kept
    if backward:
        partial = torch.empty(functions.hlip_norm_blocks(ctypes.byref(call)), 3, rows_x.shape[1])
        call.partial = partial.data_ptr()
    if functions.hlip_norm(ctypes.byref(call), isa, backward):
        bounds = ", ".join(f"{name} {kept[name]}" for name in ("src", "dst", "children") if name in kept)
        raise ValueError(
            f"expected groups of {call.num_prefix} prefix rows or more that make up the rows of src and of dst, and of "
            f"which the coarser ones are runs of the finer ones, got {bounds}"
        )


def _functions() -> tuple[ctypes.CDLL, int]:
    """The library, and its number of the ISA to use."""
    functions, isa, reason = library.native()
    if functions is None:
        raise ValueError(reason)
    return functions, ISAS.index(isa)


def _computed(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in library.DTYPES else torch.float32


def _single(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)
