"""Rows that backward computes again, in Triton: a LayerNorm, and GELU with its gradient.

Shapes: R rows, C width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base import check_tensor

GELU = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}  # of a launch; BLOCK: values of a program
NORM_VALUES = 8  # of a row, that a thread of `norm_rows` holds
SQRT_HALF = tl.constexpr(0.7071067811865476)
PDF_SCALE = tl.constexpr(0.3989422804014327)  # of the normal distribution's density, 1 / sqrt(2 pi)
VARYING = ["num_values"]


@triton.jit(do_not_specialize=VARYING)
def gelu_backward(Grad, X, Active, num_values, BLOCK: tl.constexpr):
    """GELU of X into Active, and the gradient of X in place of Grad, the gradient of gelu(X)."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < num_values
    b_x = tl.load(X + o, mask=m, other=0.0).to(tl.float32)
    b_grad = tl.load(Grad + o, mask=m, other=0.0).to(tl.float32)
    b_cdf = 0.5 + 0.5 * tl.erf(b_x * SQRT_HALF)
    b_pdf = PDF_SCALE * tl.exp(-0.5 * b_x * b_x)
    tl.store(Active + o, (b_x * b_cdf).to(Active.dtype.element_ty), mask=m)
    tl.store(Grad + o, (b_grad * (b_cdf + b_x * b_pdf)).to(Grad.dtype.element_ty), mask=m)


@triton.jit
def norm_rows(X, Weight, Bias, Y, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The LayerNorm of a program's row."""
    row = tl.program_id(0).to(tl.int64) * C
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_x = tl.load(X + row + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_centred = tl.where(m_c, b_x - tl.sum(b_x, 0) / C, 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 0) / C + eps)
    b_w = tl.load(Weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(Bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(Y + row + o_c, (b_centred * b_rstd * b_w + b_b).to(Y.dtype.element_ty), mask=m_c)


def gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """gelu(x), which is returned, and the gradient of x from that of gelu(x), which `grad` then holds.

    Args:
        grad, x: of one shape and dtype, contiguous.

    Raises:
        ValueError: they are not.
    """
    check_tensor("grad", grad, tuple(x.shape), x.device, x.dtype)
    if not (grad.is_contiguous() and x.is_contiguous()):
        raise ValueError(f"grad and x: expected contiguous rows, got strides {grad.stride()} and {x.stride()}")
    active = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            gelu_backward[(triton.cdiv(x.numel(), GELU["BLOCK"]),)](grad, x, active, x.numel(), **GELU)
    return active


def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The LayerNorm of the rows of x (R, C), in `dtype`.

    Raises:
        ValueError: weight or bias are not (C) on the device of x.
    """
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor(name, parameter, x.shape[1:], x.device, parameter.dtype)
    y = torch.empty_like(x, dtype=dtype)
    if len(x):
        with torch.cuda.device_of(x):
            norm_rows[(len(x),)](x, weight, bias, y, eps, **norm_constants(x.shape[1]))
    return y


@functools.cache
def norm_constants(width: int) -> dict[str, Any]:
    """Of a launch; not to be changed, as it is made once."""
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // (32 * NORM_VALUES)))
    return {"C": width, "BLOCK_C": block, "num_warps": warps, "enable_fp_fusion": True}
