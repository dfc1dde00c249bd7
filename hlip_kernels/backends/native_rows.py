"""Residual add, regroup and LayerNorm, and the gradient of GELU, on CPUs by the native library (`hlip_kernels.native`).

Shapes: R rows, C width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native as library
from ..native import DTYPES
from ..native.interface import ISAS, Gelu, Norm
from .groups import Regroup, check_norm, check_tensor

CPU = torch.device("cpu")


def norm_not_supported_reasons(device: str, dtype: torch.dtype, update_dtype: torch.dtype) -> list[str]:
    return library.not_supported_reasons(device, dtype)


def norm_forward(
    residual: Tensor,
    update: Tensor,
    path_scale: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    regroup: Regroup,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    src, dst = (groups * regroup.num_prefix for groups in (regroup.src_groups, regroup.dst_groups))
    tokens = _tokens(residual, src)
    x = residual.new_empty(dst + tokens, residual.shape[1])
    y = x.new_empty(x.shape, dtype=_known(update.dtype))
    mean, rstd = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    _run(
        regroup,
        tokens,
        eps,
        residual=residual,
        update=update.to(y.dtype),
        path_scale=_single(path_scale),
        layer_scale=_single(layer_scale),
        weight=_single(weight),
        bias=_single(bias),
        x=x,
        y=y,
        mean=mean,
        rstd=rstd,
    )
    return x, y.to(update.dtype), mean, rstd


def norm_backward(
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
    src, dst = (groups * regroup.num_prefix for groups in (regroup.src_groups, regroup.dst_groups))
    tokens = _tokens(x, dst)
    dtype = _known(grad_y.dtype)
    grad_residual = x.new_empty(src + tokens, x.shape[1])
    shared = path_scale is None and layer_scale is None and grad_y.dtype == x.dtype
    grad_update = grad_y.new_empty(0) if shared else grad_residual.new_empty(grad_residual.shape, dtype=dtype)
    sums = x.new_empty(3, x.shape[1], dtype=torch.float32)
    _run(
        regroup,
        tokens,
        0.0,
        update=None if update is None else update.to(dtype),
        path_scale=_single(path_scale),
        layer_scale=_single(layer_scale),
        weight=_single(weight),
        x=x,
        mean=mean,
        rstd=rstd,
        grad_x=grad_x,
        grad_y=grad_y.to(dtype),
        grad_residual=grad_residual,
        grad_update=None if shared else grad_update,
        sums=sums,
    )
    grad_weight, grad_bias, grad_scale = sums
    return (  # results of an op may not share memory
        grad_residual,
        grad_update.to(grad_y.dtype),
        weight.new_empty(0) if layer_scale is None else grad_scale.to(layer_scale.dtype, copy=True),
        grad_weight.to(weight.dtype, copy=True),
        grad_bias.to(weight.dtype, copy=True),
    )


def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The LayerNorm of x (R, C) in bfloat16 or float32, with the bits that `norm_forward` gave its rows."""
    y = x.new_empty(x.shape, dtype=dtype)
    _run(None, len(x), eps, residual=x, weight=_single(weight), bias=_single(bias), y=y)
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


def _run(regroup: Regroup | None, tokens: int, eps: float, **tensors: Tensor | None) -> None:
    functions, isa = _functions()
    groups = {}
    if regroup is not None:
        tensors |= {"cu_seqlens": regroup.cu_seqlens, "children": regroup.children}
        groups = {name: getattr(regroup, name) for name in ("src_groups", "dst_groups", "num_prefix")}
    kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}  # alive until the call is over
    x, y = (kept[a] if a in kept else kept[b] for a, b in (("x", "residual"), ("y", "grad_y")))
    check_tensor("x", x, (len(x), x.shape[-1]), CPU, *DTYPES)
    check_tensor("y", y, (len(y), x.shape[-1]), CPU, *DTYPES)
    check_norm(regroup, tokens, x, y, **kept)
    call = Norm(
        **{name: t.data_ptr() for name, t in kept.items()},
        **groups,
        tokens=tokens,
        width=x.shape[1],
        bfloat16_x=x.dtype == torch.bfloat16,
        bfloat16_y=y.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        eps=eps,
    )
    backward = "grad_residual" in kept
    if backward:
        partial = torch.empty(functions.hlip_norm_blocks(ctypes.byref(call)), 3, x.shape[1])
        call.partial = partial.data_ptr()
    if functions.hlip_norm(ctypes.byref(call), isa, backward):
        bounds = ", ".join(f"{name} {kept[name]}" for name in ("cu_seqlens", "children") if name in kept)
        raise ValueError(f"expected bounds that rise from 0 to {tokens} patches and to the finer groups, got {bounds}")


def _functions() -> tuple[ctypes.CDLL, int]:
    """The library, and its number of the ISA to use."""
    functions, isa, reason = library.native()
    if functions is None:
        raise ValueError(reason)
    return functions, ISAS.index(isa)


def _tokens(rows: Tensor, prefix_rows: int) -> int:
    if not 0 <= prefix_rows <= len(rows):
        raise ValueError(f"expected {prefix_rows} rows of prefixes and those of patches, got {len(rows)}")
    return len(rows) - prefix_rows


def _known(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in library.DTYPES else torch.float32


def _single(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)
